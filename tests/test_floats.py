"""Keys and values that are large for their type: where a dense cache gives numbers, every stage does."""

import copy
import itertools

import pytest
import torch

from kvstack import CommonKV, Evict, KVStack, Quant, UseError
from kvstack.authoring import fitting, saturated
from tests import tiny
from tests.stages import Pairs

SCORES = ("expected", "h2o", "keydiff", "knorm", "kvzap", "kvzip", "lookahead", "snapkv", "tova", "triattention")
STACKS = {
    "kivi": [Quant(2)],
    "nf4": [Quant(4, codec="nf4")],
    "unmerged": [CommonKV(keep=1.0, unmerged=0.25)],
    "all": [CommonKV(), Quant(4), Evict(0.5)],
} | {score: [Evict(0.5, score=score)] for score in SCORES}


def logits(model, stack):
    """Of a prompt, of steps until tokens are sealed more than once, and of some tokens at once."""
    found = [model(tiny.tokens(1, 150), past_key_values=stack).logits]
    found += [model(tiny.tokens(1, 1, i), past_key_values=stack).logits for i in range(36)]
    return torch.cat([*found, model(tiny.tokens(1, 4), past_key_values=stack).logits], dim=1)


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
def test_halves_stay_finite(stages):
    for kind, fused in itertools.product(("keys", "values"), (True, False)):
        stack = KVStack(stages, model=tiny.with_large(kind), window=16, fused=fused)
        assert bool(logits(stack.binding.model, stack).isfinite().all()), (kind, fused)


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
def test_doubles(stages):
    model, single = tiny.model("llama", dtype=torch.float64), tiny.model("llama")
    stack, expected = (KVStack(stages, model=each, window=16) for each in (model, single))
    found = logits(model, stack)
    assert found.dtype == torch.float64
    wanted = logits(single, expected).double()
    # nearly all tokens: a score may tip either way
    assert float((found - wanted).abs().median()) < 1e-4


def test_exact_in_halves():
    """With eight bits, and with all axes, the next token is that of a dense cache."""
    from transformers import DynamicCache

    model = tiny.with_large("keys")
    expected = logits(model, DynamicCache())
    for stages in ([Quant(8)], [CommonKV(keep=1.0)], [Evict(1.0)]):
        found = logits(model, KVStack(stages, model=model, window=16))
        agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        assert agree > 0.9, stages


def test_what_does_not_fit():
    x = torch.tensor([1.0, 7e4, -7e4])
    assert saturated(x, torch.float16).tolist() == [1.0, 65504.0, -65504.0]
    assert saturated(torch.tensor([float("inf")]).half(), torch.float16).tolist() == [65504.0]
    assert fitting(x, torch.float16).dtype == torch.float32
    assert fitting(x[:1], torch.float16).dtype == torch.float16
    assert saturated(x, torch.float32) is x


DROPS = [[Evict(0.3, score)] for score in ("snapkv", "h2o", "tova", "expected", "keydiff", "knorm")]
DROPS += [[Evict(0.3, score)] for score in ("streaming", "random")]
DROPS += [[Evict(0.3, "streaming", positions="cache")], [Evict(0.3, "streaming", refit=True)]]


@pytest.mark.parametrize("kind", ["k_proj", "v_proj"])
@pytest.mark.parametrize("stages", [*DROPS, [Quant(4)], [Pairs()], [Pairs(), Evict(0.3, "random"), Quant(4)]], ids=repr)
def test_nan_is_refused_where_tokens_are_compressed_or_evicted(stages, kind):
    """Also where the score does not look at keys, and in the last layer, whose values no other layer sees."""
    model = copy.deepcopy(tiny.model())
    getattr(model.model.layers[3].self_attn, kind).weight.data[0, 0] = float("nan")
    stack = KVStack(stages, sinks=2, window=8)
    with pytest.raises(UseError, match=r"on layer [23]: (keys|values|scores|latents) hold NaN or infinity"):
        model(tiny.tokens(1, 90), past_key_values=stack)
    with torch.no_grad():
        model(tiny.tokens(1, 9), past_key_values=KVStack(stages))  # nothing is compressed yet
