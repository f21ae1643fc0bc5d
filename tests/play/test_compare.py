"""Two answers, side by side: those of `generate`, and a drift that is measured on the same tokens."""

import gc

import pytest
import torch
from transformers import DynamicCache

from kvstack import KVStack, KVStackError, SpecError
from kvstack.play.compare import compare
from tests import tiny


class Tokenizer:
    """A token for every word, which is its number."""

    chat_template = None

    def __call__(self, text, return_tensors=None):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def words(length, seed=0):
    return " ".join(map(str, tiny.tokens(1, length, seed=seed)[0].tolist()))


def generated(model, prompt, cache, tokens):
    ids = Tokenizer()(prompt)["input_ids"]
    out = model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return " ".join(map(str, out[0, ids.shape[1] :].tolist()))


@pytest.mark.parametrize("spec", ["", "quant:8", "quant:2+evict:0.1", "commonkv:0.3,layers=2+quant:2+evict:0.3"])
def test_answers_are_those_of_generate(spec):
    model, prompt = tiny.model("llama"), words(150)
    first, *events = compare(model, Tokenizer(), prompt, spec, 20)
    assert first["read"] == 150
    assert len(events) == 20
    assert events[-1]["dense"] == generated(model, prompt, DynamicCache(), 20)
    stack = KVStack.from_spec(spec)
    assert events[-1]["stack"] == generated(model, prompt, stack, 20)
    assert first["line"] == repr(stack)
    # the last token was chosen, and not fed
    assert events[-1]["dense_bytes"] == stack.dense_nbytes
    assert events[-1]["bytes"] == stack.nbytes


def test_drift_is_on_the_tokens_of_the_dense_answer():
    model, prompt, spec = tiny.model("llama"), words(150), "quant:2+evict:0.1"
    _, *events = compare(model, Tokenizer(), prompt, spec, 12)
    answer = [int(word) for word in events[-1]["dense"].split()]
    fed = [Tokenizer()(prompt)["input_ids"], *(torch.tensor([[token]]) for token in answer[:-1])]
    dense, stack = DynamicCache(), KVStack.from_spec(spec, model=model)
    with torch.no_grad():
        for ids, event in zip(fed, events, strict=True):
            p, q = (model(ids, past_key_values=cache).logits[0, -1].log_softmax(-1) for cache in (dense, stack))
            assert event["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)
    assert max(event["kl"] for event in events) > 0.01


def test_an_answer_ends_where_the_model_ends_it(monkeypatch):
    model, prompt = tiny.model("llama"), words(150)
    _, *events = compare(model, Tokenizer(), prompt, "quant:2+evict:0.1", 20)
    dense = events[-1]["dense"].split()
    end = next(i for i in range(2, 20) if dense[i] not in dense[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [int(dense[end])])
    _, *events = compare(model, Tokenizer(), prompt, "quant:2+evict:0.1", 20)
    assert events[-1]["dense"].split() == dense[: end + 1]
    assert [event["kl"] is None for event in events] == [i > end for i in range(len(events))]
    _, *same = compare(model, Tokenizer(), prompt, "", 20)
    assert len(same) == end + 1


def test_what_cannot_be_answered_is_said_before():
    model = tiny.model("llama")
    with pytest.raises(KVStackError, match="prompt is empty"):
        next(compare(model, Tokenizer(), "  ", "", 5))
    with pytest.raises(KVStackError, match="4,090 tokens, and the model reads 4,096"):
        next(compare(model, Tokenizer(), words(4090), "", 20))
    with pytest.raises(SpecError):
        next(compare(model, Tokenizer(), words(10), "no-such-stage", 5))


def test_no_hook_is_left_on_the_model():
    model = tiny.model("llama", num_hidden_layers=2)
    gc.collect()
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    events = compare(model, Tokenizer(), words(150), "quant:2+evict:0.1", 20)
    for _ in range(15):
        next(events)
    events.close()
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
