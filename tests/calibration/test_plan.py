"""What a calibration will do, told before it does it."""

import pytest
import torch

from kvstack import CalibrationError, calibrate, calibration_plan
from tests import tiny


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": 2},
        {"layers": 2, "block": 64},
        {"metric": "variance"},
        {"keep_axes": 1.0, "bits": 16},
        {"layers": 1, "memory": 1e-5},
    ],
)
def test_what_was_planned_is_done(settings):
    """Blocks, heads and bytes of a plan are those of the calibration."""
    model, steps = tiny.model("llama"), []
    plan = calibration_plan(model, 400, **settings)
    found = calibrate(model, tokens=400, progress=lambda *at: steps.append(at), **settings)
    assert [(block.layers, block.shapes, block.heads) for block in plan.blocks] == [
        (group.layers, group.shapes, group.heads) for group in found.groups
    ]
    assert found.layers == plan.groups.size
    assert found.nbytes == pytest.approx(plan.nbytes, rel=0.02)
    assert max(len(group.energy) for group in found.groups) == plan.widest
    assert (steps[-1][1] - len(plan.blocks)) % len(plan.passes) == 0


def test_a_plan_needs_no_weights():
    with torch.device("meta"):
        model = type(tiny.model("llama"))(tiny.model("llama").config)
    assert calibration_plan(model).nbytes == calibration_plan(tiny.model("llama")).nbytes


def test_sums_of_a_pass_fit_into_memory():
    model = tiny.model("llama")
    plan = calibration_plan(model, layers=1, memory=2 * 4 * 64**2 / 2**30)
    assert [list(some) for some in plan.passes] == [[0, 1], [2, 3]]
    one = calibration_plan(model, layers=1, memory=1e-9)
    assert [list(some) for some in one.passes] == [[0], [1], [2], [3]], "one block at least"
    assert one.peak_nbytes < plan.peak_nbytes < calibration_plan(model, layers=1).peak_nbytes


def test_a_large_model_reads_more():
    model = tiny.model("llama", head_dim=1024, num_key_value_heads=2)
    plan = calibration_plan(model, layers=1)
    assert plan.widest == 4096
    assert plan.tokens == 10_240
    wider = calibration_plan(tiny.model("llama", head_dim=2048, num_key_value_heads=2), layers=1)
    assert (wider.widest, wider.tokens) == (8192, 20_480)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(CalibrationError, match="predicts no tokens"):
        calibration_plan(tiny.model("llama").model)
    with pytest.raises(CalibrationError, match=r"Use layers= one of \[1\], or block=64"):
        calibration_plan(tiny.model("llama"), layers=2, block=48)
