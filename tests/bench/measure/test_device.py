"""What stacks cost on a device, here the processor."""

import pytest
import torch

from kvstack.bench.measure import device, memory, subject
from kvstack.bench.measure.run import Run
from kvstack.bench.measure.variants import parse
from kvstack.read import codes
from tests.bench.commands import by_cache

STACKS = ("empty", "evict:0.2", "quant:4", "commonkv:0.5,layers=2+quant:4")


def test_one_row_for_each_cache(bench):
    rows = by_cache(bench("device", "--steps", "4", "--rounds", "1", stacks=STACKS))
    assert list(rows) == ["dense", *STACKS]
    assert [row["differs"] is None for row in rows.values()] == [True, True, True, False, False]
    assert rows["quant:4"]["differs"] < 1e-4, "readers differ by rounding"
    assert rows["quant:4"]["reader"] == "numba"
    assert rows["quant:4"]["nbytes"] < rows["dense"]["nbytes"]
    assert "peak_decode" not in rows["dense"], "a processor's memory is not counted by torch"


def test_a_reader_that_is_wrong_is_seen(monkeypatch):
    """Not by what it says of itself."""
    mix = codes.CompiledCodes._mix
    monkeypatch.setattr(codes.CompiledCodes, "_mix", lambda self, *given: mix(self, *given) * 1.1)
    with subject.opened(Run((512,), (), tiny=True, threads=1)) as opened:
        assert device.differs(opened.model, opened.tokens(512), parse(["quant:4"])[1]) > 1e-3


@pytest.mark.parametrize(("shape", "known"), [("135m", 134.5e6), ("1b", 1235.8e6), ("8b", 8030.3e6)])
def test_shapes_are_those_of_the_models(shape, known):
    """Counted, not held."""
    with subject.opened(Run((512,), (), device="meta", threads=1), shape) as opened:
        numbers = sum(x.numel() for x in opened.model.parameters())
        head = opened.model.lm_head.weight.numel()
    # the two smaller models tie their embeddings
    assert numbers - (0 if shape == "8b" else head) == pytest.approx(known, rel=1e-3)


def test_only_a_gpu_tells_what_it_allocated():
    with memory.growth(torch.device("cpu")) as growth:
        torch.ones(1000)
    assert growth.nbytes is None
