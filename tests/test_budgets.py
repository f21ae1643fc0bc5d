"""Stacks for a budget: what is predicted is what the tensors hold, and no budget is exceeded."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstack
from kvstack import BindError, CommonKV, Evict, KVStack, KVStackWarning, Quant, StageError, Tiers, budgets
from kvstack.bench.measure.sizes import dense_bfloat16, share_of_bfloat16
from kvstack.budgets import Caches, Candidate, candidates, for_budget, predicted, smallest
from tests import tiny

LONG = {"max_position_embeddings": 8192}


def wide():
    """Twenty layers: some stacks store ten of them together, others five."""
    return tiny.model("llama", num_hidden_layers=20, num_key_value_heads=4, **LONG)


def held(stack: KVStack, model, context: int) -> tuple[float, float]:
    """Bytes after a prompt, as shares of a dense cache's: in 16 bits, and as they are."""
    model(tiny.tokens(1, context), past_key_values=stack, logits_to_keep=1)
    return share_of_bfloat16(stack, model), stack.nbytes / stack.dense_nbytes


@settings(max_examples=40)
@given(
    context=st.integers(1, 700),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([None, 8, 16, 64]),
    keep=st.sampled_from([None, 0.05, 0.3, 0.9, 1.0, 40]),
    quant=st.booleans(),
    layers=st.sampled_from([None, 1, 2]),
    window=st.integers(0, 70),
)
def test_bytes_of_tokens_and_numbers_are_predicted(context, bits, group, keep, quant, layers, window):
    model = tiny.model("llama", head_dim=64, num_hidden_layers=2)
    stages = [Quant(bits, group)] * quant + ([] if keep is None else [Evict(keep, "keydiff", layers=layers)])
    share, own = held(KVStack(stages, model=model, window=window), model, context)
    caches = Caches.of(model)
    expected = predicted(KVStack(stages, window=window), caches, context) / caches.dense(context)
    assert share == pytest.approx(expected, rel=1e-9)
    assert own <= share + 1e-9


@pytest.mark.parametrize("share", [0.35, 0.1, 0.06])
@pytest.mark.parametrize("context", [500, 1500])
def test_no_candidate_exceeds_its_budget(share, context):
    model = wide()
    caches = Caches.of(model)
    found = candidates(share, context, caches)
    assert len(found) >= 3
    for candidate in found:
        stack = candidate.stack(model)
        real, own = held(stack, model, context)
        assert real <= candidate.share + 1e-9, stack
        assert candidate.share <= share
        assert own <= share
        # nearly all that was predicted is held: a formula that says too much would waste the budget
        assert real >= candidate.share * (0.85 if _tiers(candidate) else 0.995), stack


def _tiers(candidate: Candidate) -> bool:
    return any(isinstance(stage, Tiers) for stage in candidate.stages)


@pytest.mark.parametrize("name", ["gemma3", "deepseek_v3", "opt"])
def test_other_models(name):
    """Sliding windows, which no stack compresses; latents, and keys without rotation."""
    model = tiny.model(name)
    caches = Caches.of(model)
    context = 900
    assert caches.dense(context) == dense_bfloat16(empty(model, context), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVStackWarning)
        stack = for_budget(0.2, context, model)
    real, _ = held(stack, model, context)
    assert 0.1 < real <= 0.2


def empty(model, context: int) -> KVStack:
    """A stack without stages that has read a prompt."""
    stack = KVStack(model=model)
    model(tiny.tokens(1, context), past_key_values=stack, logits_to_keep=1)
    return stack


@settings(max_examples=25)
@given(
    share=st.floats(0.005, 1.0),
    context=st.integers(1, 200_000),
    heads=st.integers(1, 16),
    size=st.sampled_from([16, 64, 128]),
    layers=st.integers(1, 80),
)
def test_candidates_of_any_model_fit(share, context, heads, size, layers):
    caches = Caches(((heads, size, size),) * layers)
    for candidate in candidates(share, context, caches):
        stack = candidate.stack()
        assert predicted(stack, caches, context) <= share * caches.dense(context)
        assert KVStack.from_spec(stack.spec).spec == stack.spec
        common = next((stage for stage in stack.stages if isinstance(stage, CommonKV)), None)
        assert common is None or layers % (common.layers or 1) == 0


@settings(max_examples=10)
@given(context=st.integers(50, 100_000), layers=st.integers(1, 40))
def test_the_smallest_budget_can_be_met_and_no_smaller_one(context, layers):
    caches = Caches(((4, 64, 64),) * layers)
    least = smallest(context, caches)
    assert least == 1 or candidates(least, context, caches)
    assert not candidates(least - 1e-4, context, caches)


def test_a_larger_budget_keeps_more():
    caches = Caches()
    kept = [bits * keep for share in (0.02, 0.05, 0.1, 0.2, 0.4) for keep, bits in [_numbers(share, caches)]]
    assert kept == sorted(set(kept))


def _numbers(share: float, caches: Caches) -> tuple[float, int]:
    stages = {type(stage): stage for stage in candidates(share, 8192, caches)[0].stages}
    return stages[CommonKV].keep, stages[Quant].bits


def test_without_a_model():
    assert kvstack.for_budget(0.6, context=8192).spec == "quant:bits=8"
    small = for_budget(0.05, context=8192)
    assert {type(stage) for stage in small.stages} == {CommonKV, Quant, Tiers}
    assert small.binding is None


def test_a_model_that_refuses_a_stage_gets_the_next_one_and_is_told():
    """Layers of DeepSeek cache latents, which LookAhead refuses."""
    model = tiny.model("deepseek_v3")
    with pytest.warns(KVStackWarning, match=r"takes the place of KVStack\(\[CommonKV.*Tiers"):
        stack = for_budget(0.2, 900, model)
    assert stack.binding is not None
    assert not any(isinstance(stage, Tiers) for stage in stack.stages)


def test_a_model_that_refuses_all(monkeypatch):
    def refuse(self, model=None):
        if model is not None:
            raise BindError("no.")
        return KVStack(self.stages, **self.settings)

    monkeypatch.setattr(budgets.Candidate, "stack", refuse)
    with pytest.raises(BindError, match=r"for_budget\(0.1\): no stack of \d+ can be bound to this LlamaForCausalLM"):
        for_budget(0.1, 4096, tiny.model())


@pytest.mark.parametrize(
    ("share", "context", "message"),
    [
        (0.0, 100, "share=0.0 is not a share of a dense cache's bytes. Use 0.1 for a tenth."),
        (True, 100, "share=True is not a share"),
        ("0.1", 100, "share='0.1' is not a share"),
        (float("nan"), 100, "share=nan is not a share"),
        (0.1, 0, "context=0 is not a number of tokens. Use 1 or more."),
        (0.1, 8192.0, "context=8192.0 is not a number of tokens."),
        (0.001, 8192, "no stack holds 0.001 of a dense cache's bytes after 8,192 tokens. Use 0.0"),
    ],
)
def test_refused(share, context, message):
    with pytest.raises(StageError, match=re.escape(message)):
        for_budget(share, context)


@pytest.mark.parametrize(
    "stages",
    [
        [Quant(4, codec="nf4")],
        [CommonKV(basis="weights")],
        [CommonKV(unmerged=0.25)],
        [Evict(0.5, "expected", refit=True)],
        [Evict(0.5, budgets="layers")],
        [Evict(0.5, budgets="heads")],
        [Evict(0.5, positions="cache")],
    ],
    ids=repr,
)
def test_what_cannot_be_predicted_is_refused(stages):
    with pytest.raises(StageError, match=r"cannot be predicted. Measure them"):
        predicted(KVStack(stages), Caches(), 1000)
