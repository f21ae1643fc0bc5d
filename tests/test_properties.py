"""Invariants, for whatever sizes hypothesis thinks of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack import Evict, KVStack, Quant, SnapKV
from kvstack.read.codes import CompiledCodes
from tests import tiny

LAYERS = 2


def model():
    return tiny.model("llama", num_hidden_layers=LAYERS)


def filled(stages, length, decode=0, **settings):
    stack = KVStack(stages, **settings)
    ids = tiny.tokens(1, length + decode)
    model()(ids[:, :length], past_key_values=stack)
    for i in range(length, length + decode):
        model()(ids[:, i : i + 1], past_key_values=stack)
    return stack


# ---- stacks


@given(
    length=st.integers(1, 150),
    decode=st.integers(0, 30),
    keep=st.one_of(st.sampled_from([0.05, 0.3, 0.9]), st.integers(1, 60)),
    quant=st.booleans(),
    layers=st.sampled_from([1, 2]),
    sinks=st.integers(0, 5),
    window=st.integers(0, 20),
)
def test_budget_sinks_window_positions(length, decode, keep, quant, layers, sinks, window):
    stages = [Evict(keep, SnapKV(window=8), layers=layers)] + [Quant(4, group=8)] * quant
    stack = filled(stages, length, decode, sinks=sinks, window=window, block=8)
    seen = length + decode
    middle = max(0, seen - sinks - window)
    budget = min(middle, keep) if isinstance(keep, int) else keep * middle
    assert stack.held <= budget + sinks + window + 1e-6
    assert stack.seen == seen
    ends = torch.cat([torch.arange(min(sinks, seen)), torch.arange(max(0, seen - window), seen)])
    for layer in range(LAYERS):
        for held in stack.positions(layer).long():
            assert bool((held.diff() > 0).all())
            assert bool(torch.isin(ends, held).all())
            assert held.numel() == stack.held


@pytest.mark.parametrize("quant", [[], [Quant(4)]])
def test_bytes_fall_with_keep(quant):
    sizes = [filled([Evict(keep), *quant], 600).nbytes for keep in (0.1, 0.3, 0.5, 0.8, 1.0)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("evict", [[], [Evict(0.5)]])
def test_bytes_fall_with_bits(evict):
    sizes = [filled([Quant(bits), *evict], 600).nbytes for bits in (2, 3, 4, 8)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < filled(evict, 600).nbytes


@given(length=st.integers(2, 80), cut=st.integers(1, 79))
def test_no_later_token_changes_an_earlier_logit(length, cut):
    cut = min(cut, length - 1)
    stages = [Evict(0.3), Quant(4, group=8)]
    one, other = (KVStack(stages, sinks=1, window=4, block=8) for _ in range(2))
    prompt = tiny.tokens(1, 60)
    for stack in (one, other):
        model()(prompt, past_key_values=stack)
    ids, changed = tiny.tokens(1, length, seed=1), tiny.tokens(1, length, seed=1)
    changed[:, cut:] = tiny.tokens(1, length - cut, seed=2)
    found = [model()(x, past_key_values=stack).logits[:, :cut] for x, stack in ((ids, one), (changed, other))]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


STAGES = st.one_of(
    st.builds(Quant, st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([None, 8, 64])),
    st.builds(Quant, st.just(4), codec=st.sampled_from(["nf4", "fp4"])),
    st.builds(
        Evict,
        st.one_of(st.floats(0.01, 1.0), st.integers(1, 10_000)),
        st.one_of(
            st.sampled_from(["h2o", "tova", "knorm", "streaming"]),
            st.builds(
                SnapKV, window=st.integers(1, 99), kernel=st.sampled_from([1, 5]), over=st.sampled_from(["mean"])
            ),
        ),
        layers=st.one_of(st.none(), st.integers(1, 9)),
        pool=st.sampled_from(["mean", "max"]),
    ),
)


@given(stages=st.lists(STAGES, max_size=2, unique_by=lambda stage: stage.kind), window=st.integers(0, 99))
def test_spec_dict_and_repr_build_the_same_stack(stages, window):
    import json

    import kvstack

    stack = KVStack(stages, window=window)
    assert KVStack.from_spec(stack.spec).stages == stack.stages
    again = KVStack.from_spec(json.loads(json.dumps(stack.to_dict())))
    assert (again.stages, again.to_dict()) == (stack.stages, stack.to_dict())
    names = {name: getattr(kvstack, name) for name in kvstack.__all__}
    assert repr(eval(repr(stack), names)) == repr(stack)


@given(
    length=st.integers(90, 140),
    bits=st.sampled_from([2, 3, 4, 8]),
    evict=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager"]),
)
def test_fused_agrees_with_plain(length, bits, evict, attention):
    stages = [Quant(bits, group=8), *([Evict(0.5)] * evict)]
    ids = tiny.tokens(2, length + 6)
    lm = tiny.model("llama", attention, num_hidden_layers=LAYERS)
    found = []
    for fused in (True, False):
        stack = KVStack(stages, sinks=2, window=8, block=8, fused=fused)
        lm(ids[:, :length], past_key_values=stack)
        steps_ = [lm(ids[:, i : i + 1], past_key_values=stack).logits for i in range(length, length + 6)]
        found.append(torch.cat(steps_, 1))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


def test_the_fused_path_reads_codes(monkeypatch):
    """Otherwise the test above compares one path with itself."""
    calls = []
    monkeypatch.setattr(CompiledCodes, "dot", lambda *a, dot=CompiledCodes.dot: calls.append(1) or dot(*a))
    for fused, expected in ((True, LAYERS), (False, 0)):
        stack = filled([Quant(4, group=8)], 60, sinks=2, window=8, block=8, fused=fused)
        calls.clear()  # of the check whether the reader is right
        model()(tiny.tokens(1, 1), past_key_values=stack)
        assert len(calls) == expected
