"""How far the next tokens drift, on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kvstack.bench import results
from kvstack.bench.measure import quality, variants
from kvstack.bench.measure.quality import Reading, compare
from kvstack.bench.measure.run import Run
from kvstack.bench.measure.subject import opened
from kvstack.bench.show import summary
from kvstack.cli.bench import bench_app
from kvstack.errors import KVStackError
from tests.bench.commands import by_cache, invoke


def test_quality_of_exact_caches_is_exact(bench):
    rows = by_cache(summary.quality(bench("quality", "--score", "16", stacks=("empty",))))
    for label in ("dense", "empty"):
        assert rows[label]["kl"] == rows[label]["kl_q99"] == 0
        assert rows[label]["top1"] == 1
    assert rows["empty"]["nll"] == rows["dense"]["nll"]


def test_quality_falls_with_the_bits_and_with_the_tokens(bench):
    stacks = ("quant:8", "quant:4", "quant:2", "evict:0.2")
    rows = by_cache(summary.quality(bench("quality", "--windows", "2", "--score", "32", stacks=stacks)))
    assert 0 < rows["quant:8"]["kl"] < rows["quant:4"]["kl"] < rows["quant:2"]["kl"]
    assert rows["evict:0.2"]["kl"] > rows["quant:8"]["kl"]
    assert 1 > rows["quant:8"]["share"] > rows["quant:4"]["share"] > rows["quant:2"]["share"]
    assert all(row["scored"] == 3 * 2 * 32 for row in rows.values())


def test_chance_and_no_context_are_the_worst(bench):
    stacks = ("evict:0.2", "evict:0.2,score=random", "evict:0.2,score=knorm", "nothing")
    rows = by_cache(summary.quality(bench("quality", "--windows", "4", stacks=stacks)))
    assert rows["nothing"]["share"] == 0
    assert rows["nothing"]["kind"] == rows["evict:0.2,score=random"]["kind"] == "control"
    assert rows["evict:0.2"]["kl"] < rows["evict:0.2,score=random"]["kl"] < rows["nothing"]["kl"]


def test_figures_of_a_reading_by_plain_loops():
    draw = torch.Generator().manual_seed(0)
    dense, own = (torch.randn(5, 7, generator=draw).log_softmax(-1) for _ in range(2))
    targets = torch.tensor([0, 6, 3, 3, 1])
    figures = compare(Reading(own, 0.25), dense, targets)
    for i in range(5):
        p, q = dense[i].exp().tolist(), own[i].exp().tolist()
        assert figures["kl"][i] == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-3)
        assert figures["same"][i] == (p.index(max(p)) == q.index(max(q)))
        assert figures["nll"][i] == pytest.approx(-np.log(q[targets[i]]), rel=1e-3)
    assert figures["share"] == 0.25
    assert figures["simulated"] is False


def test_a_context_that_is_compressed_is_not_the_one_that_is_scored():
    """The logits are those of the whole text read at once, where the cache is exact."""
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        ids = tiny.tokens(80)
        reading = quality.read(tiny, variants.parse([])[0], ids, 48)
        plain = tiny.model(ids).logits[0, 48:-1].log_softmax(-1)
    torch.testing.assert_close(reading.log_probs, plain, atol=1e-4, rtol=1e-4)


def test_tokens_can_be_fed_as_in_decoding():
    """One by one they give what they give at once; a stack compresses them when they leave its window, which shows."""
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        ids = tiny.tokens(128)
        for spec, far in (("dense", False), ("quant:2@window=16", True)):
            cache = variants.parse([spec])[-1]
            once, *apart = (quality.read(tiny, cache, ids, 64, feed).log_probs for feed in (None, 1, 7))
            assert [bool((x - once).abs().max() > 1e-3) for x in apart] == [far, far]


def test_a_cache_that_fails_ends_no_run(tmp_path, monkeypatch):
    read = quality.read

    def failing(tiny, cache, *rest):
        if cache.label == "quant:4":
            raise KVStackError("out of tricks.")
        return read(tiny, cache, *rest)

    monkeypatch.setattr(quality, "read", failing)
    out = invoke("quality", "--out", tmp_path, "--score", "16", "--stack", "quant:4", "--stack", "quant:2")
    assert out.count("quant:4: skipped, out of tricks.") == 1
    rows, _ = results.load(tmp_path, "quality")
    assert set(by_cache(rows)) == {"dense", "quant:2"}


def test_a_context_longer_than_the_model_is_refused():
    done = CliRunner().invoke(bench_app, ["quality", "--tiny", "--contexts", "9000", "--stack", "empty"])
    assert done.exit_code == 2
    assert "reads 8,192 tokens, and 9,256 are needed" in " ".join(done.output.replace("│", " ").split())
