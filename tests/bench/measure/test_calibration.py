"""What calibrating a model takes."""

from __future__ import annotations

import pytest


def test_shapes_are_planned_without_weights(bench):
    rows = {row["variant"]: row for row in bench("calibration", "--shape", "8b", "--shape", "7b")}
    assert rows["8b"]["layers"] == 4
    assert (rows["8b"]["blocks"], rows["8b"]["block"]) == (8, 8192)
    assert rows["8b"]["nbytes"] <= 300e6
    assert rows["7b"]["layers"] == 1
    assert rows["7b"]["nbytes"] <= 1.5e9
    assert all(row["tokens"] >= 2.5 * row["block"] for row in rows.values())


def test_a_small_shape_is_really_calibrated(bench, monkeypatch):
    """The file has the bytes that were planned."""
    monkeypatch.setattr("kvstack.calibration.plan.TOKENS", 300)
    from kvstack.bench.measure import calibration
    from kvstack.bench.measure.run import Run

    monkeypatch.setitem(
        calibration.shaped.__globals__["SHAPES"],
        "small",
        ("llama", {
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 128,
        }),
    )  # fmt: skip
    told = Run((), (), None, "float32", 1, 0, False, None, "cpu", None)
    planned, done = calibration.plan(told, "small"), calibration.measure(told, "small")
    assert done["nbytes"] == pytest.approx(planned["nbytes"], rel=0.01)
    assert {"reading", "axes", "grown_nbytes"} <= done.keys()
