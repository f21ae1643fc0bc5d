"""Candidates for a budget, measured on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstack.bench.measure import choose, quality
from kvstack.bench.measure.run import Run
from kvstack.bench.results import Figures
from kvstack.errors import KVStackError

RUN = Run((400,), (), tiny=True, threads=1)


@pytest.fixture(scope="module")
def measured():
    with torch.no_grad():
        return choose.run(RUN, 0.2, windows=1, score=31, steps=2, burst=1)


def test_every_candidate_has_drift_bytes_and_speed(measured):
    drifts, speeds = measured
    caches = [row["cache"] for row in speeds.rows]
    assert caches[0] == "dense"
    assert len(caches) == len(set(caches)) >= 4
    assert {row["cache"] for row in drifts.rows} == set(caches)
    assert {row["domain"] for row in drifts.rows} == {"documentation", "code", "docstrings"}
    for row in drifts.rows:
        assert (row["context"], len(row["kl"])) == (368, 31)
        assert row["share"] == 1 if row["cache"] == "dense" else 0.1 < row["share"] <= 0.2
    assert all(row["speed_typical"] > 0 for row in speeds.rows)


def test_the_best_drifts_least(measured):
    drifts, speeds = measured
    kl = {}
    for row in drifts.rows:
        kl.setdefault(row["cache"], []).extend(row["kl"])
    del kl["dense"]
    assert choose.best(drifts, speeds, 0.2) == min(kl, key=lambda cache: sum(kl[cache]))


def made_up(**caches: tuple[float, float, float]) -> tuple[Figures, Figures]:
    """Share, KL and speed of stacks."""
    rows = [{"cache": name, "kind": "kvstack", "share": share, "kl": [kl]} for name, (share, kl, _) in caches.items()]
    rows.append({"cache": "dense", "kind": "dense", "share": 1.0, "kl": [0.0]})
    speeds = [{"cache": name, "speed_typical": speed} for name, (*_, speed) in caches.items()]
    return Figures(rows, {}), Figures([*speeds, {"cache": "dense", "speed_typical": 9.0}], {})


def test_the_best_of_a_budget_and_of_a_drift():
    figures = made_up(near=(0.1, 0.01, 0.2), fast=(0.09, 0.05, 0.9), far=(0.1, 0.5, 2.0), large=(0.2, 0.001, 1.0))
    assert choose.best(*figures, 0.1) == "near"
    assert choose.best(*figures, 0.1, most=0.05) == "fast"
    assert choose.best(*figures, 0.1, most=1.0) == "far"
    assert choose.best(*figures, 0.3) == "large"
    assert choose.best(*figures, 0.1, most=0.001) is None
    assert choose.best(*figures, 0.05) is None


def test_texts_of_a_folder_are_the_only_ones(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"The {i}th line of a text of mine.\n" for i in range(400)))
    with choose.opened(RUN) as subject:
        told = Run((400,), (), tiny=True, threads=1, texts=tmp_path)
        data = choose._windows(subject, told, 400, 1)
        assert [domain for domain, _ in data] == ["texts"] * 3
        for ids in data.values():
            assert ids.shape == (1, 400)
            assert subject.tokenizer.decode(ids[0]) in (tmp_path / "a.txt").read_text()
        (tmp_path / "a.txt").write_text((tmp_path / "a.txt").read_text()[:5000])
        assert len(choose._windows(subject, told, 400, 1)) == 1


def test_a_candidate_that_fails_ends_no_run(monkeypatch, capsys):
    read = quality.read

    def failing(subject, cache, *rest):
        if cache.label.startswith("quant") and "evict" in cache.label:
            raise KVStackError("out of tricks.")
        return read(subject, cache, *rest)

    monkeypatch.setattr(quality, "read", failing)
    drifts, speeds = choose.run(RUN, 0.2, windows=1, score=31, steps=1, burst=1)
    assert "skipped, out of tricks." in capsys.readouterr().out
    assert not any("evict" in row["cache"] for row in [*drifts.rows, *speeds.rows])


@pytest.mark.parametrize(
    ("contexts", "share", "message"),
    [
        ((30,), 0.2, "31 of 30 tokens are scored, and none is left. Use a longer --context."),
        ((400,), 0.01, r"no stack holds 0.01 of a dense cache's bytes after 368 tokens. Use --bytes 0.0\d+ or more"),
        ((9000,), 0.2, "reads 8,192 tokens, and 9,000 are needed."),
    ],
)
def test_refused(contexts, share, message):
    with pytest.raises(KVStackError, match=message):
        choose.run(Run(contexts, (), tiny=True, threads=1), share, windows=1, score=31, steps=1, burst=1)
