"""At equal bytes: the best stack and the best peer of every budget, from one set of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..show import tables as show
from . import quality, summary, variants
from .results import Results
from .run import Run, environment
from .subject import opened

__all__ = ["CONTEXTS", "STACKS", "run", "show_table"]

CONTEXTS = (4096,)
STACKS = (
    "nothing",
    "evict:0.2,score=random",
    # a half
    "commonkv:0.9+quant:8",
    # a quarter
    "commonkv:0.9+quant:4",
    # a tenth and less
    "quant:2+evict:0.5",
    "commonkv:0.65+quant:2",
    "commonkv:0.35+quant:2@window=16",
    "commonkv:0.35,layers=10+quant:2@window=16",
    "commonkv+quant:2+evict:0.5",
    "commonkv:0.12+quant:2@window=16",
    "commonkv:0.12,layers=10+quant:2@window=16",
    "commonkv+quant:2+evict:0.2@window=16",
    # peers, from a half down
    "hqq:4,group=16",
    "hqq:4",
    "hqq:2,group=16",
    "hqq:2",
    "quanto:4",
    "quanto:2",
    "turboquant:4",
    "turboquant:2",
    *(f"kvpress:{press},keep={keep}" for keep in (0.5, 0.25, 0.1, 0.05, 0.02) for press in ("snapkv", "expected")),
    "kvpress:kvzip,keep=0.5",
    "kvpress:kvzip,keep=0.25",
    "kvpress:kvzip,keep=0.1",
    "kvpress:keydiff,keep=0.25",
    "kvpress:tova,keep=0.25",
    "kvpress:streaming,keep=0.25",
)


def run(run: Run, windows: int, score: int) -> list[dict[str, Any]]:
    """Measure, print the tables, and give the rows of `summary.budgets`."""
    rows: list[dict[str, Any]] = []
    with opened(run) as subject:
        subject.check(max(run.contexts) + score)
        caches = variants.available(variants.parse(run.stacks), subject.model)
        results = Results("quality", run.out, environment(run, subject.name, subject.identity))
        for context in run.contexts:
            found = quality.measure(subject, results, run, context, caches, windows, score)
            title = f"{context:,} tokens compressed, the next {score} scored: {subject.name}, {run.dtype}"
            quality.show_table(title, summary.quality(found, run.seed))
            rows += summary.budgets(found, seed=run.seed)
        show_table(rows)
    return rows


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """`summary.budgets` as a table."""
    lines = [
        [
            f"{row['context']:,}",
            f"{row['budget']:.4g}",
            *_cells(row["stack"]),
            *_cells(row["peer"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2g} ({row['ratio_low']:.2g} - {row['ratio_high']:.2g})",
        ]
        for row in rows
    ]
    columns = ("context", "budget", "best stack", "bytes", "KL", "best peer", "bytes", "KL", "KL stack / peer")
    show.table("at equal bytes", columns, lines, "no cache of a row holds more than the budget, a share of dense bytes")


def _cells(row: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "-", "", ""
    return row["cache"] + (" *" if row["simulated"] else ""), show.share(row["share"]), show.short(row["kl"])
