"""The statistics, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvstack.bench.show import summary


def test_the_interval_of_a_mean_holds_it_and_narrows():
    draw = np.random.default_rng(0)
    few, many = draw.exponential(size=20), draw.exponential(size=2000)
    (a, b), (c, d) = summary.interval(few, 0), summary.interval(many, 0)
    assert a < few.mean() < b
    assert d - c < (b - a) / 5
    assert summary.interval(np.array([3.0]), 0) == (3, 3)


def test_the_interval_of_a_ratio_is_paired():
    """Two caches that drift on the same tokens: their ratio is far surer than either mean."""
    tokens = np.random.default_rng(0).exponential(size=50)
    assert summary.ratio(tokens * 0.5, tokens, 0) == pytest.approx((0.5, 0.5))


def test_the_best_of_each_budget_by_hand():
    def record(cache, kind, share, kl):
        figures = {"share": share, "kl": [kl] * 64, "same": [1] * 64, "nll": [0.0] * 64, "simulated": False}
        key = {"context": 100, "score": 64, "domain": "code", "window": 0, "text": "a", "cache": cache}
        return {**key, **figures, "kind": kind, "family": kind}

    records = [
        record("dense", "dense", 1.0, 0.0),
        record("a", "kvstack", 0.5, 0.01),
        record("b", "kvstack", 0.2, 0.04),
        record("c", "kvstack", 0.24, 0.08),  # larger and worse than b
        record("chance", "control", 0.1, 0.0001),
        record("p", "peer", 0.4, 0.02),
        record("q", "peer", 0.25, 0.4),
    ]
    half, quarter, eighth = summary.budgets(records, (0.5, 0.25, 0.125))
    assert (half["stack"]["cache"], half["peer"]["cache"], half["ratio"]) == ("a", "p", pytest.approx(0.5))
    assert (quarter["stack"]["cache"], quarter["peer"]["cache"], quarter["ratio"]) == ("b", "q", pytest.approx(0.1))
    assert (eighth["stack"], eighth["peer"], eighth["ratio"]) == (None, None, None)


def test_scores_are_drawn_by_depth():
    def record(depth, score):
        key = {"context": 100, "task": "niah", "mode": "aware", "cache": "dense"}
        return {**key, "depth": depth, "score": score, "kind": "dense", "share": 1.0}

    cells = summary.heat([record(0.0, 1.0), record(0.19, 0.0), record(1.0, 1.0), record(None, 0.0)], cells=5)
    assert [(cell["depth"], cell["score"], cell["samples"]) for cell in cells] == [(0.1, 0.5, 2), (0.9, 1.0, 1)]
