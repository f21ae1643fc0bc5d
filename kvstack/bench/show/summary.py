"""From recorded figures to the rows of tables and pictures. All statistics of the benchmarks are here.

Tokens that follow each other are not independent of each other, so what is resampled are blocks of 32 tokens, the same
blocks for all caches: intervals are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import KVStackError
from .front import pareto

__all__ = ["BLOCK", "budgets", "heat", "interval", "matrix", "needles", "quality", "ratio"]

Row = dict[str, Any]
R = TypeVar("R", bound=Mapping[str, Any])
Array = NDArray[np.float64]
BLOCK = 32
RESAMPLES = 2000
BUDGETS = (0.5, 0.25, 0.1, 0.05, 0.02)
"""Shares of the dense bytes at which the best caches are compared."""


def quality(records: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """One row for each context and cache, in the order of their first records."""
    return [_quality(context, cache, mine, seed) for (context, cache), mine in _by(records, "context", "cache").items()]


def _quality(context: int, cache: str, mine: Sequence[Mapping[str, Any]], seed: int) -> Row:
    kl = np.concatenate([record["kl"] for record in mine])
    low, high = interval(_blocks(mine), seed)
    return {
        "context": context,
        "cache": cache,
        "kind": mine[0]["kind"],
        "family": mine[0]["family"],
        "share": float(np.mean([record["share"] for record in mine])),
        "simulated": any(record["simulated"] for record in mine),
        **_fitted(mine),
        "kl": float(kl.mean()),
        "kl_low": low,
        "kl_high": high,
        "kl_q99": float(np.quantile(kl, 0.99)),
        "top1": float(np.concatenate([record["same"] for record in mine]).mean()),
        "nll": float(np.concatenate([record["nll"] for record in mine]).mean()),
        "scored": len(kl),
        "domains": {
            domain: float(np.concatenate([r["kl"] for r in those]).mean())
            for (domain,), those in _by(mine, "domain").items()
        },
    }


def budgets(records: Sequence[Mapping[str, Any]], shares: Sequence[float] = BUDGETS, seed: int = 0) -> list[Row]:
    """The best stack and the best peer that hold no more than each share of the dense bytes (and a hundredth of it,
    since tokens and blocks are whole), for each context.

    `ratio` is the stack's KL over the peer's, with its paired interval; None if no peer is so small.
    Peers whose bytes are only claimed compete too: that is to their advantage.
    """
    rows = []
    for (context,), mine in _by(records, "context").items():
        records_of = {cache: those for (cache,), those in _by(mine, "cache").items()}
        measured = [row for those in records_of.values() for row in quality(those)]
        for share in shares:
            stack, peer = _best(measured, "kvstack", share), _best(measured, "peer", share)
            row: Row = {"context": context, "budget": share, "stack": stack, "peer": peer}
            row |= {"ratio": None, "ratio_low": None, "ratio_high": None}
            if stack and peer:
                ours, theirs = _paired(records_of[stack["cache"]], records_of[peer["cache"]])
                low, high = ratio(_blocks(ours), _blocks(theirs), seed)
                row |= {"ratio": stack["kl"] / peer["kl"], "ratio_low": low, "ratio_high": high}
            rows.append(row)
    return rows


def _best(rows: Sequence[Row], kind: str, share: float) -> Row | None:
    fit = [row for row in rows if row["kind"] == kind and row["share"] <= share * 1.01]
    return min(fit, key=lambda row: row["kl"], default=None)


def _paired(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """The records of two caches that read the same windows, in one order."""
    place = {(record["domain"], record["text"]): record for record in b}
    both = [(record, place[key]) for record in a if (key := (record["domain"], record["text"])) in place]
    return [mine for mine, _ in both], [theirs for _, theirs in both]


def _blocks(records: Iterable[Mapping[str, Any]]) -> Array:
    """Mean KL of every block of tokens."""
    parts = []
    for record in records:
        kl = np.asarray(record["kl"], dtype=np.float64)
        parts += [part.mean() for part in np.array_split(kl, max(1, len(kl) // BLOCK))]
    return np.array(parts)


def needles(records: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """One row for each context, task, mode and cache."""
    rows = []
    for (context, task, mode, cache), mine in _by(records, "context", "task", "mode", "cache").items():
        scores = np.array([record["score"] for record in mine], dtype=np.float64)
        low, high = interval(scores, seed)
        rows.append(
            {
                "context": context,
                "task": task,
                "mode": mode,
                "cache": cache,
                "kind": mine[0]["kind"],
                "score": float(scores.mean()),
                "low": low,
                "high": high,
                "samples": len(mine),
                "share": float(np.mean([record["share"] for record in mine])),
                **_fitted(mine),
            }
        )
    return rows


def heat(records: Sequence[Mapping[str, Any]], cells: int = 5) -> list[Row]:
    """Scores by depth of the needle, for the tasks that have one: `cells` equal parts of the text."""
    placed = [
        dict(record, depth=(min(int(record["depth"] * cells), cells - 1) + 0.5) / cells)
        for record in records
        if record["depth"] is not None
    ]
    return [
        {
            "context": context,
            "task": task,
            "mode": mode,
            "cache": cache,
            "depth": depth,
            "score": float(np.mean([record["score"] for record in mine])),
            "samples": len(mine),
        }
        for (context, task, mode, cache, depth), mine in _by(
            placed, "context", "task", "mode", "cache", "depth"
        ).items()
    ]


def matrix(records: Sequence[Mapping[str, Any]], speeds: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """One row for each context and combination of stages, with those that nothing beats in bytes and KL marked.

    `records` are figures of quality. `speeds`, those of the matrix, say which caches are combinations, and of which
    stages; a combination without a speed was not timed.
    """
    timed = {(speed["context"], speed["cache"]): speed for speed in speeds if speed["stages"]}
    rows = [
        {**speed["stages"], **row, "speed": speed["speed_typical"]}
        for row in quality(records, seed)
        if (speed := timed.get((row["context"], row["cache"]))) is not None
    ]
    for (_,), here in _by(rows, "context").items():
        for row, best in zip(here, pareto([(row["share"], row["kl"]) for row in here]), strict=True):
            row["pareto"] = best
    return rows


def _fitted(records: Sequence[Mapping[str, Any]]) -> Row:
    """Return the bytes that were fitted to the model, which are the same in all records, and the latest of the tokens
    from which on a stack holds less with them; nothing if the figures are too old to have them."""
    if any("model_nbytes" not in record for record in records):
        return {}
    tokens = [record["break_even"] for record in records]
    latest = None if None in tokens else max(tokens)
    return {"model_nbytes": max(record["model_nbytes"] for record in records), "break_even": latest}


# ---- statistics


def interval(x: Array, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; the mean twice where there is nothing to resample."""
    return _bootstrap((x,), lambda a, axis: a.mean(axis=axis), float(x.mean()), seed)


def ratio(a: Array, b: Array, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of mean(a) / mean(b), a and b resampled together."""
    return _bootstrap(
        (a, b), lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis), float(a.mean() / b.mean()), seed
    )


def _bootstrap(
    samples: tuple[Array, ...], statistic: Callable[..., Any], value: float, seed: int
) -> tuple[float, float]:
    try:
        from scipy.stats import bootstrap
    except ImportError:
        raise KVStackError(
            "intervals need scipy, which is not installed. Install it with: pip install 'kvstack[bench]'"
        ) from None

    if len(samples[0]) < 2 or all(np.ptp(x) == 0 for x in samples):
        return value, value
    bounds = bootstrap(
        samples, statistic, paired=True, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def _by(records: Iterable[R], *names: str) -> dict[tuple[Any, ...], list[R]]:
    """Records by the values of some of their fields, in the order of their first ones."""
    parted: dict[tuple[Any, ...], list[R]] = {}
    for record in records:
        parted.setdefault(tuple(record[name] for name in names), []).append(record)
    return parted
