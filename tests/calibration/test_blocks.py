"""Axes of smaller blocks, from those of a larger one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstack import KV, BindError, Calibration, CalibrationError, CommonKV, KVStack, Quant, calibrate
from kvstack.calibration.axes import Axes, widths
from kvstack.calibration.blocks import by_heads, covariance, held_by, numbers_of
from kvstack.calibration.calibration import GroupAxes
from kvstack.heads import ALONE, Heads
from tests import tiny


@pytest.fixture(scope="module")
def every():
    return calibrate(tiny.model("llama"), layers=2, keep_axes=1.0, bits=16)


def test_a_covariance_has_the_axes_it_was_made_of(every):
    block = every.groups[0]
    again = torch.linalg.eigvalsh(covariance(block)).flip(0)
    torch.testing.assert_close(again, block.energy, rtol=1e-3, atol=1e-4 * float(block.energy[0]))


def test_what_dropped_axes_held_is_spread_over_other_directions():
    block = calibrate(tiny.model("llama"), layers=2, keep_axes=0.5, bits=16).groups[0]
    assert float(covariance(block).trace()) == pytest.approx(float(block.energy.sum()), rel=1e-3)


def test_numbers_of_heads_cover_a_block(every):
    block = every.groups[0]
    parts = [numbers_of(block, layer, keys).flatten() for layer in range(2) for keys in (True, False)]
    assert torch.equal(torch.cat(parts), torch.arange(128))


def test_runs_of_heads_are_those_that_calibration_would_find(every):
    """The energies of heads that are cut from joint axes are those of a calibration of these heads."""
    cut, made = by_heads(every, 2), calibrate(tiny.model("llama"), layers=2, block=64, keep_axes=1.0, bits=16)
    for some, other in zip(cut.groups, made.groups, strict=True):
        assert (some.layers, some.shapes, some.heads) == (other.layers, other.shapes, other.heads)
        torch.testing.assert_close(some.energy, other.energy, rtol=0.02, atol=1e-3 * float(other.energy[0]))
        torch.testing.assert_close(some.mean, other.mean)
        torch.testing.assert_close(covariance(some), covariance(other), rtol=0, atol=0.01 * float(other.energy[0]))
    assert by_heads(cut, 2) is cut
    assert by_heads(every, 1) is every


def test_as_many_axes_are_kept():
    half = calibrate(tiny.model("llama"), layers=2)
    cut = by_heads(half, 2)
    assert sum(len(block.axes) for block in cut.groups) == sum(len(block.axes) for block in half.groups)
    assert {len(block.axes.fine) for block in cut.groups} == {2}, "one in 32 of the 64 axes that each can have"


def test_heads_that_do_not_divide(every):
    with pytest.raises(CalibrationError, match=r"have \[2, 2\] kv heads, which 3 do not divide"):
        by_heads(every, 3)
    with pytest.raises(CalibrationError, match=r"have \[1, 1\] kv heads, which 2 do not divide"):
        by_heads(by_heads(every, 2), 4)
    with pytest.raises(CalibrationError, match=r"kv heads in 2 runs, and 3 or a multiple are needed"):
        by_heads(by_heads(every, 2), 3)


@settings(max_examples=20, deadline=None)
@given(
    heads=st.lists(st.sampled_from([4, 8, 16]), min_size=1, max_size=3), width=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_cutting_twice_is_cutting_once(heads, width, seed):
    """In two runs, and these in two: the heads, means and covariances of four runs."""
    axes = any_calibration(heads, width, seed)
    twice, once = by_heads(by_heads(axes, 2), 4), by_heads(axes, 4)
    assert by_heads(once, 2) is once
    for some, other in zip(twice.groups, once.groups, strict=True):
        assert (some.shapes, some.heads) == (other.shapes, other.heads)
        assert torch.equal(some.mean, other.mean)
        torch.testing.assert_close(covariance(some), covariance(other), rtol=0, atol=0.01)


def any_calibration(heads, width, seed):
    """One group of layers with these kv heads, all axes kept."""
    shapes, n = tuple((h, width, width) for h in heads), 2 * width * sum(heads)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    weight = torch.rand(n, generator=generator) + 0.5
    axes = Axes.of(vectors, weight.rsqrt(), widths(shapes), n)
    energy = torch.rand(n, generator=generator).sort(descending=True).values
    mean = torch.randn(n, generator=generator)
    return Calibration((GroupAxes(tuple(range(len(heads))), shapes, mean, weight, axes, energy),), {})


# ---- what one of several processes holds


@pytest.fixture(scope="module")
def apart():
    """Keys and values apart, all axes."""
    return calibrate(tiny.model("llama"), layers=2, metric="variance", keep_axes=1.0, bits=16)


@pytest.mark.parametrize("kind", ["every", "apart", "in runs already"])
def test_processes_hold_every_block_once(request, kind):
    axes = by_heads(request.getfixturevalue("every"), 2) if kind == "in runs already" else request.getfixturevalue(kind)
    groups = [[0, 1], [2, 3]]
    held = [held_by(axes, Heads(rank, 2), groups) for rank in range(2)]
    whole = by_heads(axes, 2)
    for layers in groups:
        assert [len(one.of(layers)) for one in held] == [len(whole.of(layers)) // 2] * 2
        for rank, one in enumerate(held):
            assert {block.heads for block in one.of(layers)} == {((rank, rank + 1),) * 2}
            kinds = [[keys > 0 for _, keys, _ in block.shapes] for block in one.of(layers)]
            assert kinds == ([[True] * 2, [False] * 2] if kind == "apart" else [[True] * 2])
            for mine, other in zip(one.everywhere(layers), whole.of(layers), strict=True):
                assert (mine.heads, mine.shapes, len(mine.axes)) == (other.heads, other.shapes, len(other.axes))
                assert torch.equal(mine.energy, other.energy)
    assert len({one.fingerprint for one in held} | {axes.fingerprint}) == 3
    assert held_by(axes, Heads(1, 2), groups) is held[1], "it is cut once"
    assert len(held[0].tensors([0, 1])) >= 2 * len(held[0].of([0, 1])) * len(whole.of([0, 1])[0].tensors)


@pytest.mark.parametrize(("runs", "size"), [(4, 2), (2, 4), (8, 2), (1, 8)])
def test_runs_and_processes_that_divide(runs, size):
    """More runs than processes stay as they are; fewer are cut further."""
    axes = by_heads(any_calibration([8, 16], 2, 0), runs)
    held = [held_by(axes, Heads(rank, size), [[0, 1]]) for rank in range(size)]
    for slot, heads in enumerate((8, 16)):
        for rank, one in enumerate(held):
            spans = [block.heads[slot] for block in one.groups]
            assert len(spans) == max(runs, size) // size
            mine = range(heads // size * rank, heads // size * (rank + 1))
            assert [i for span in spans for i in range(*span)] == list(mine)
    assert (held[0].everywhere([0, 1]) == axes.of([0, 1])) == (runs >= size)


def test_layers_of_which_all_heads_are_here_stay_joint(every):
    groups = [[0, 1], [2, 3]]
    assert held_by(every, ALONE, groups) is every
    assert held_by(every, Heads(1, 2, frozenset(range(4))), groups) is every
    held = held_by(every, Heads(1, 2, frozenset({0, 1})), groups)
    assert held.of([0, 1]) == every.of([0, 1])
    assert [block.heads for block in held.of([2, 3])] == [((1, 2), (1, 2))]
    assert [len(held.everywhere(layers)) for layers in groups] == [1, 2]


def test_layers_that_differ_are_not_stored_together(every):
    with pytest.raises(BindError, match=r"layers \[0, 1\] would be stored together, .* layers \[0\] .* Use layers=1"):
        held_by(every, Heads(0, 2, frozenset({0})), [[0, 1], [2, 3]])


def test_runs_of_unequal_length_are_refused(every):
    cut = by_heads(every, 2)
    odd = replace(cut, groups=(cut.groups[1], cut.groups[0], *cut.groups[2:]))
    with pytest.raises(CalibrationError, match="does not hold the 2 kv heads of layer 0 in runs of equal length"):
        odd.check(tiny.model("llama"), "fisher")


# ---- stacks with several latents for a group


def filled(stack, model, tokens=120):
    with torch.no_grad():
        model(tiny.tokens(2, tokens), past_key_values=stack)
    return stack


@pytest.mark.parametrize("unmerged", [0.0, 0.25])
def test_all_axes_of_all_runs_lose_nothing(every, unmerged):
    model = tiny.model("llama")
    stage = CommonKV(1.0, calibration=by_heads(every, 2), unmerged=unmerged, exact=None)
    stack = KVStack([stage], model=model, window=8)
    with torch.no_grad():
        filled(stack, model, 600)
        found = model(tiny.tokens(2, 1), past_key_values=stack).logits
        exact = model(torch.cat([tiny.tokens(2, 600), tiny.tokens(2, 1)], 1)).logits[:, -1:]
    assert stack.batch.cohorts[0].stores[0].sealed_tokens >= 256
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("encode", [[], [Quant(2)], [Quant(4)]])
def test_a_run_of_heads_knows_only_its_own(every, encode):
    """One latent for each run, and one budget over both: as many numbers as with one latent."""
    model = tiny.model("llama")
    stacks = [
        filled(KVStack([CommonKV(0.5, calibration=axes), *encode], model=model, window=8), model)
        for axes in (every, by_heads(every, 2))
    ]
    joint, runs = (stack.batch.cohorts[0].stores for stack in stacks)
    for one, two in zip(joint, runs, strict=True):
        assert sorted(one.sealed[0].packed) == ["latent"]
        assert sorted(two.sealed[0].packed) == ["latent 0", "latent 1"]
    assert stacks[0].nbytes == pytest.approx(stacks[1].nbytes, rel=0.1)


@pytest.mark.parametrize("encode", [[], [Quant(2)]])
def test_reading_runs_of_heads_is_reading_rebuilt_keys(every, encode):
    """Rough scores of each run, and exact ones of all: what a single query reads is what inverse gives."""
    model = tiny.model("llama")
    logits = []
    for exact in (None, 10_000):
        stage = CommonKV(0.5, calibration=by_heads(every, 2), exact=exact)
        stack = filled(KVStack([stage, *encode], model=model, window=8), model, 300)
        with torch.no_grad():
            logits.append(model(tiny.tokens(2, 1), past_key_values=stack).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


def test_runs_of_heads_are_saved_and_loaded(every, tmp_path):
    model, axes = tiny.model("llama"), by_heads(every, 2)
    axes.save(tmp_path / "axes")
    stages = [CommonKV(0.5, calibration=str(tmp_path / "axes")), Quant(2)]
    stack = filled(KVStack(stages, model=model, window=8), model)
    stack.save(tmp_path / "cache")
    back = KVStack.load(tmp_path / "cache", model=model)
    with torch.no_grad():
        found = [model(tiny.tokens(2, 1), past_key_values=each).logits for each in (stack, back)]
    assert torch.equal(*found)


# ---- keys and values apart


def kvtc(axes, ratio=8, **settings):
    return pytest.importorskip("kvstack_kvtc").KVTC(ratio, layers=2, calibration=axes, **settings)


def test_runs_of_keys_and_of_values_lose_nothing(apart):
    """At two bytes a number all channels are there."""
    codec = kvtc(by_heads(apart, 2), 1.99).bind(tiny.model("llama")).for_group([0, 1])
    generator = torch.Generator().manual_seed(0)
    group = [KV(*(torch.randn(2, 2, 16, 16, generator=generator) for _ in range(2))) for _ in range(2)]
    latents = {name: latent.data for name, latent in codec.forward(group).items()}
    assert list(latents) == ["keys 0", "keys 1", "values 0", "values 1"]
    for layer, kv in enumerate(group):
        found = codec.inverse(latents, layer)
        # float32, through axes twice: 1.15e-4 on some processors
        torch.testing.assert_close(found.keys, kv.keys, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found.values, kv.values, atol=2e-4, rtol=1e-4)


def test_runs_of_keys_and_of_values_are_read_as_they_are_rebuilt(apart):
    model, logits = tiny.model("llama"), []
    for exact in (None, 10_000):
        stack = filled(KVStack([kvtc(by_heads(apart, 2), exact=exact)], model=model, window=8), model, 300)
        with torch.no_grad():
            logits.append(model(tiny.tokens(2, 1), past_key_values=stack).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


def test_runs_of_keys_and_of_values_are_saved(apart, tmp_path):
    axes = by_heads(apart, 2)
    axes.save(tmp_path / "axes")
    again = Calibration.load(tmp_path / "axes")
    again.check(tiny.model("llama"), "variance")
    assert (again.runs, again.parts, again.fingerprint) == (2, 4, axes.fingerprint)
    assert [again.name_of(block) for block in again.of([0, 1])] == [
        f"layers 0 to 1, {kind}, heads {run} to {run}" for kind in ("keys", "values") for run in range(2)
    ]
