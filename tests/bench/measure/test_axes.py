"""What axes cost and give where fewer numbers share them."""

from __future__ import annotations

import pytest
import torch

from kvstack import calibrate
from kvstack.bench.measure.axes import _splits, measure
from tests import tiny


@pytest.fixture(scope="module")
def found():
    return calibrate(tiny.model("llama"), layers=2, keep_axes=1.0, bits=16)


def test_the_command(bench):
    rows = {row["variant"]: row for row in bench("axes", "--layers", "2", "--contexts", "64,100000")}
    assert rows["joint"]["axes_nbytes"] > rows["one layer"]["axes_nbytes"] > rows["one layer, apart"]["axes_nbytes"]
    assert rows["joint"]["error_at_64"] is None, "axes alone are more than a tenth of so short a text"
    assert 0 < rows["joint"]["error_at_100000"] < 1


def test_every_number_is_in_one_block(found):
    for parts in _splits(found.groups[0]).values():
        assert torch.equal(torch.cat(list(parts)).sort().values, torch.arange(128))


def test_joint_is_what_was_calibrated(found):
    """Energies of the whole block are its own, and no way to cut it leaves a smaller error."""
    figures = {name: measure(found, name, [10**9]) for name in _splits(found.groups[0])}
    for keep in ("0.65", "0.35", "0.136"):
        errors = {name: row[f"error_{keep}"] for name, row in figures.items()}
        assert min(errors, key=errors.get) == "joint"
        assert errors["one layer, apart"] >= errors["one layer"]
        assert errors["one layer, apart"] >= errors["keys and values apart"]
    assert figures["joint"]["axes_nbytes"] == 128 * 128
    # half of all axes of 128 numbers, or of 64 or fewer
    assert figures["one layer"]["axes_nbytes"] == 128 * 64
