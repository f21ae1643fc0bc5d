"""Every stage with those of all other kinds, plugins that are installed included: a stack of them generates, holds
fewer bytes than the dense cache and as many tokens as it should, or is refused with the sentence named here."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from kvstack import KVStack, KVStackError, SpecError, StageError, registry
from kvstack.spec import parse
from tests import tiny

KINDS = ("share", "transform", "encode", "select")
SPECS = {
    "commonkv": "commonkv:0.5,layers=2",
    "evict": "evict:0.4",
    # half the layers are left, of 4 and of 8: pairs of them divide
    "kvsharer": "kvsharer:0.5,threshold=-1.0",
    "kvtc": "kvtc",
    "minicache": "minicache",
    "quant": "quant:4",
    "tiers": "tiers",
    "xkv": "xkv:layers=2",
}
"""How each stage is built here."""
REFUSED = {("kvtc", "quant"): "packs its numbers itself"}
"""Stages of two kinds that cannot be together, and words of the sentence that says so."""

SPREAD = {"commonkv", "quant"}
"""What `tiers` needs: somebody knows what bits are worth in each channel, and somebody spends them."""

SINKS, WINDOW, BLOCK = 4, 16, 16
TOKENS, NEW = 480, 40


def kind_of(name: str) -> str:
    """Empty for a plugin that is broken: its own test says so, and the others go on."""
    try:
        return registry.stage_type(name).kind
    except SpecError:
        return ""


def named(kind: str) -> list[str]:
    return [name for name in registry.stage_names() if name in SPECS and kind_of(name) == kind]


def refusal(names: tuple[str, ...]) -> str | None:
    if "tiers" in names and not ({*names} >= SPREAD or {*names} >= {"kvtc", "quant"}):
        return "spreads bits over tokens and channels"
    return next((REFUSED[pair] for pair in combinations(sorted(names), 2) if pair in REFUSED), None)


CHOICES = product(*([*named(kind), ""] for kind in KINDS))
STACKS = [names for choice in CHOICES if (names := tuple(filter(None, choice)))]


@pytest.mark.parametrize("name", registry.stage_names())
def test_every_stage_that_is_installed_takes_part(name):
    assert name in SPECS, f"{name!r} has no line in SPECS: write how it is built, so that its compositions are tested"
    assert parse(SPECS[name])[0][0].name == name


@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_a_stack_of(names, layers):
    model = tiny.model(num_hidden_layers=layers)
    spec = "+".join(SPECS[name] for name in names)
    if (words := refusal(names)) is not None:
        with pytest.raises(KVStackError, match=words):
            KVStack.from_spec(spec, model=model)
        return
    stack = KVStack(parse(spec)[0], model=model, sinks=SINKS, window=WINDOW, block=BLOCK)
    out = model.generate(tiny.tokens(2, TOKENS), past_key_values=stack, max_new_tokens=NEW, do_sample=False)
    assert out.shape == (2, TOKENS + NEW)
    assert stack.seen == TOKENS + NEW - 1
    assert stack.nbytes < 0.9 * stack.dense_nbytes
    assert KVStack.from_spec(stack.spec).stages == stack.stages
    assert len(stack.binding.shares) == (layers // 2 if "kvsharer" in names else 0)
    ends = SINKS + WINDOW
    assert stack.held <= ((stack.seen - ends) * 0.4 + ends if "evict" in names else stack.seen)
    for layer, row in product(range(layers), range(2)):
        kv = stack.read(layer, row)
        assert kv.keys.shape == kv.values.shape == (1, 2, stack.held, 16)
        assert torch.isfinite(kv.keys).all()
        assert torch.isfinite(kv.values).all()


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_one_kind_are_refused(kind):
    for one, other in product(named(kind), repeat=2):
        with pytest.raises(StageError, match=f"are both of the kind '{kind}'"):
            KVStack.from_spec(f"{SPECS[one]}+{SPECS[other]}")
