"""Axes of smaller blocks, from those of a larger one."""

import pytest
import torch

from kvstack import CalibrationError, CommonKV, KVStack, Quant, calibrate
from kvstack.calibration.blocks import by_heads, covariance, numbers_of
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
    with pytest.raises(CalibrationError, match=r"kv heads in 2 blocks, and 4 are needed"):
        by_heads(by_heads(every, 2), 4)


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
