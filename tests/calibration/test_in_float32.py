"""A model of 16-bit weights, run in float32 on a processor."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvstack import calibrate
from kvstack.calibration.calibrate import read_window
from kvstack.calibration.in_float32 import in_float32
from kvstack.model.layers import LayerGroups
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(tiny.MODELS))
def test_logits_and_gradients_are_those_of_a_float32_copy(family, dtype):
    model = tiny.model(family, dtype=dtype)
    wide = copy.deepcopy(model).float()
    ids, full = tiny.tokens(1, 40), LayerGroups(model, 1).full
    with in_float32(model), torch.no_grad():
        logits = model(ids).logits
        held, gradients = read_window(model, ids, 30, full, seed=0)
    torch.testing.assert_close(logits, wide(ids).logits, rtol=1e-4, atol=1e-4)
    exact, expected = read_window(wide, ids, 30, full, seed=0)
    for i in full:
        torch.testing.assert_close(held[i].keys, exact[i].keys, rtol=1e-4, atol=1e-4)
        largest = float(expected[i].values.abs().max())
        torch.testing.assert_close(gradients[i].values, expected[i].values, rtol=1e-3, atol=1e-3 * largest)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = tiny.model("qwen2", dtype=torch.bfloat16)
    before = {name: (x.dtype, x.data_ptr(), x.clone()) for name, x in model.state_dict().items()}
    logits = model(tiny.tokens(1, 9)).logits
    try:
        with in_float32(model):
            assert model(tiny.tokens(1, 9)).logits.dtype == torch.float32
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    for name, x in model.state_dict().items():
        dtype, place, numbers = before[name]
        assert (x.dtype, x.data_ptr()) == (dtype, place)
        assert torch.equal(x, numbers)
    assert torch.equal(model(tiny.tokens(1, 9)).logits, logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_not_plain_is_left_alone():
    """A model in float32, and one with a large weight that is no linear layer's."""
    model = tiny.model("llama")
    with in_float32(model):
        assert not any("forward" in vars(module) for module in model.modules())
    other = tiny.model("llama", dtype=torch.bfloat16, intermediate_size=88)
    other.model.layers[0].experts = torch.nn.Module()
    other.model.layers[0].experts.weight = torch.nn.Parameter(torch.zeros(1 << 23, dtype=torch.bfloat16))
    with in_float32(other):
        assert not any("forward" in vars(module) for module in other.modules())
    del other.model.layers[0].experts


def test_layers_that_do_not_go_together_are_left_alone():
    model = tiny.model("llama", dtype=torch.bfloat16, intermediate_size=80)

    def narrow(module, args):
        return torch.nn.functional.linear(args[0], torch.zeros(1, 64, dtype=torch.bfloat16)) and None

    handle = model.model.layers[0].mlp.register_forward_pre_hook(narrow)
    try:
        with in_float32(model):
            assert not any("forward" in vars(module) for module in model.modules())
    finally:
        handle.remove()


def test_calibrations_of_both_types_agree():
    """The same weights, rounded to bfloat16, in either type."""
    model = tiny.model("llama", dtype=torch.bfloat16)
    text = ["".join(map(chr, tiny.tokens(1, 3000)[0].tolist()))]

    class Letters:
        def __call__(self, text, **_):
            return {"input_ids": torch.tensor([[ord(letter) % 90 + 3 for letter in text]])}

    given = {"tokens": 1000, "layers": 2, "tokenizer": Letters()}
    half, wide = (calibrate(which, text, **given) for which in (model, copy.deepcopy(model).float()))
    for one, other in zip(half.groups, wide.groups, strict=True):
        torch.testing.assert_close(one.energy, other.energy, rtol=1e-3, atol=1e-4)


def test_a_cache_in_between_is_float32():
    model = tiny.model("llama", dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    with in_float32(model), torch.no_grad():
        model(tiny.tokens(1, 9), past_key_values=cache)
    assert cache.layers[0].keys.dtype == torch.float32


def test_a_forward_that_somebody_put_there_stays():
    model = tiny.model("llama", dtype=torch.bfloat16, intermediate_size=72)
    layer = model.model.layers[0].mlp.down_proj

    def patched(x):
        return 2 * torch.nn.functional.linear(x, layer.weight)

    layer.forward = patched
    try:
        with in_float32(model):
            assert vars(layer)["forward"] is patched
        assert vars(layer)["forward"] is patched
    finally:
        del layer.forward


def test_modules_that_check_types_are_left_alone():
    model = tiny.model("llama", dtype=torch.bfloat16, intermediate_size=56)

    def check(module, args):
        if args[0].dtype != torch.bfloat16:
            raise ValueError("only bfloat16")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(check)
    try:
        with in_float32(model), torch.no_grad():
            assert model(tiny.tokens(1, 9)).logits.dtype == torch.bfloat16
    finally:
        handle.remove()
