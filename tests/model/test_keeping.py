"""Phi-3 reads a text again, without its cache, where its rotary embedding switches: the stack stays in use."""

import gc

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from kvstack import KVStack, Quant, UseError
from tests import tiny

SWITCH = 64
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": SWITCH,
        "factor": 8.0,
    },
}


def phi3():
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**tiny.SHAPE, **LONGROPE)).eval()


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt_lookup"])
@pytest.mark.parametrize("length", [SWITCH - 10, SWITCH, SWITCH + 1])
def test_the_stack_stays_in_use(length, mode):
    model = phi3()
    ids = tiny.tokens(1, length)
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, **tiny.MODES[mode]}
    dense = model.generate(ids, **settings).sequences
    stack = KVStack(model=model)
    found = model.generate(ids, past_key_values=stack, **settings)
    assert torch.equal(found.sequences, dense)
    assert found.past_key_values is stack
    assert stack.seen >= length + 19


def test_a_text_that_does_not_cross_it_is_read_once():
    model, fed = phi3(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(tiny.tokens(1, 30), past_key_values=KVStack([Quant(4)]), max_new_tokens=20, do_sample=False)
    assert fed == [30] + [1] * 19


def test_a_stack_that_waits_for_its_model_says_that_it_is_left_out():
    model = phi3()
    with pytest.raises(
        UseError, match=r"leaves out the cache .* more than 64 tokens. Bind it before: KVStack\(\[...\], m"
    ):
        model.generate(tiny.tokens(1, 80), past_key_values=KVStack([Quant(4)]), max_new_tokens=2, do_sample=False)
    gc.collect()
    model.generate(tiny.tokens(1, 80), max_new_tokens=2, do_sample=False)


def test_new_tokens_alone_are_refused():
    """The beginning of the text is not there to be read again."""
    model, stack = phi3(), KVStack()
    first, more = tiny.tokens(1, 20), tiny.tokens(1, SWITCH + 5, seed=1)
    model(first, past_key_values=stack)
    mask = torch.ones(1, 20 + SWITCH + 5, dtype=torch.long)
    with pytest.raises(UseError, match="would read only the newest"):
        model.generate(more, attention_mask=mask, past_key_values=stack, max_new_tokens=2, do_sample=False)


def test_nothing_is_left_on_the_model():
    model = phi3()
    stack = KVStack(model=model)
    assert "prepare_inputs_for_generation" in vars(model)
    stack.unbind()
    assert "prepare_inputs_for_generation" not in vars(model)
