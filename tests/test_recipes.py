"""Recipes of docs/recipes.md that need more than its page: 4-bit weights, a task of the harness, a long answer."""

import importlib.util
import json

import pytest
import torch
from transformers import DynamicCache

from kvstack import Evict, KVStack, Quant
from tests import tiny


def test_reasoning_in_a_fixed_budget():
    """Thousands of generated tokens: what is held and its bytes stop growing at the budget."""
    model = tiny.model("llama", num_hidden_layers=1)
    stack, ids, sizes = KVStack([Evict(2048)], model=model), tiny.tokens(1, 30), []
    for length in (1500, 1000, 1000):
        ids = model.generate(ids, past_key_values=stack, max_new_tokens=length, do_sample=False)
        sizes.append((stack.held, stack.nbytes))
    assert stack.seen == 30 + 3500 - 1
    assert sizes[0][0] == 1529  # nothing had to go
    budget = 2048 + stack.sinks + stack.window
    assert all(0.8 * budget < held <= budget for held, _ in sizes[1:])
    assert max(nbytes for _, nbytes in sizes[1:]) < 1.2 * budget * stack.dense_nbytes / stack.seen
    assert torch.equal(torch.sort(stack.positions(0)[0, -64:]).values, torch.arange(stack.seen - 64, stack.seen).int())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_weights_in_4_bits(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.model("llama", intermediate_size=128).save_pretrained(tmp_path)  # the kernels want multiples of 64
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    ids = tiny.tokens(1, 200)
    exact = model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=20, do_sample=False)
    plain, stack = KVStack([]), KVStack([Quant(4)])
    assert torch.equal(model.generate(ids, past_key_values=plain, max_new_tokens=20, do_sample=False), exact)
    out = model.generate(ids, past_key_values=stack, max_new_tokens=20, do_sample=False)
    assert out.shape == exact.shape
    assert stack.compression > 0.3


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval")
def test_a_task_of_the_harness(tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from kvstack.lm_eval import KVStackLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    lines = []
    for seed in range(4):
        one, two, question = (" ".join(f"w{i}" for i in tiny.tokens(1, n, seed)[0].tolist()) for n in (3, 4, 120))
        lines.append(json.dumps({"question": question, "choices": [one, two], "answer": seed % 2}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.yaml").write_text(
        f"""task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{tmp_path}/questions.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
"""
    )
    lm = KVStackLM(tiny.model("llama"), tokenizer=tokenizer, stack="quant:4+evict:0.5", batch_size=2)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=["mine"], task_manager=tasks, bootstrap_iters=0)
    assert 0 <= found["results"]["mine"]["acc,none"] <= 1
    assert 0 < found["config"]["kvstack_share_of_dense_bytes"] < 0.9
