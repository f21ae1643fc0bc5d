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


@pytest.mark.parametrize(
    ("shape", "known"), [("135m", 134.5e6), ("1b", 1235.8e6), ("8b", 8030.3e6), ("qwen3-1.7b", 1720.6e6)]
)
def test_shapes_are_those_of_the_models(shape, known):
    """Counted, not held."""
    with subject.opened(Run((512,), (), device="meta", threads=1), shape) as opened:
        numbers = sum(x.numel() for x in opened.model.parameters())
        head = opened.model.lm_head.weight.numel()
    # the smaller models tie their embeddings
    assert numbers - (0 if shape == "8b" else head) == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize("shape", ["qwen3-1.7b", "deepseek-1b"])
def test_shapes_of_other_families_are_measured(shape, monkeypatch):
    """With fewer layers and words, and the heads that are cached."""
    family, sizes = subject.SHAPES[shape]
    fewer = {"num_hidden_layers": 2, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64}
    monkeypatch.setattr(subject, "SHAPES", {shape: (family, {**sizes, **fewer, "num_attention_heads": 8})})
    told = Run((128,), ("evict:0.2", "quant:4"), threads=1)
    (figures,) = device.run(told, shape, rounds=1, steps=1, burst=1)
    rows = by_cache(figures.rows)
    assert list(rows) == ["dense", "evict:0.2", "quant:4"]
    # a token's latent and rotated key, once for all heads; or keys and values of each
    numbers = 512 + 64 if family == "deepseek_v3" else 2 * 8 * 128
    assert rows["dense"]["nbytes"] == 2 * (128 + 2) * numbers * 4
    assert rows["quant:4"]["nbytes"] < rows["dense"]["nbytes"]
    assert figures.environment["model"] == f"random {family}, {shape}"


def test_only_a_gpu_tells_what_it_allocated():
    with memory.growth(torch.device("cpu")) as growth:
        torch.ones(1000)
    assert growth.nbytes is None
