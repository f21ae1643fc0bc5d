"""Every combination of a transform, an encoder and a selector: bytes, quality and speed, the Pareto front marked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import KVStackError
from ..show import front
from ..show import tables as show
from . import decode, quality, subject, summary, variants
from .results import Results
from .run import Run, environment

__all__ = ["CONTEXTS", "ENCODES", "EVICTS", "TRANSFORMS", "combinations", "run"]

CONTEXTS = (1024,)
NONE = "none"
TRANSFORMS = (NONE, "commonkv")
ENCODES = (NONE, "quant:4", "quant:2")
EVICTS = (NONE, "evict:0.5", "evict:0.2")


def combinations(transforms: Sequence[str], encodes: Sequence[str], evicts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Spec of each combination -> its stage of each kind. Those that cannot be built are left out, and said."""
    found = {}
    for transform, encode, evict in itertools.product(transforms, encodes, evicts):
        stages = [stage for stage in (transform, encode, evict) if stage != NONE]
        spec = "+".join(stages) or variants.EMPTY
        try:
            variants.parse([spec])
        except KVStackError as error:
            show.console().print(f"{spec}: left out. {error}", highlight=False)
        else:
            found[spec] = {"transform": transform, "encode": encode, "evict": evict}
    return found


def run(
    run: Run,
    grid: Mapping[str, Mapping[str, str]],
    windows: int,
    score: int,
    steps: int,
    burst: int,
) -> list[dict[str, Any]]:
    """Measure, print a table for each context, and give its rows. `grid` as `combinations` makes it."""
    rows = []
    with subject.opened(run) as opened:
        opened.check(max(run.contexts) + max(score, steps + burst))
        caches = variants.available(variants.parse(list(grid)), opened.model)
        where = environment(run, opened.name, opened.identity)
        results = Results("quality", run.out, where)
        speeds = Results("matrix", run.out, where)
        for context in run.contexts:
            found = summary.quality(quality.measure(opened, results, run, context, caches, windows, score), run.seed)
            settings = {"context": context, "steps": steps, "burst": burst, "beside": [c.label for c in caches]}
            keys = [{**settings, "cache": cache.label} for cache in caches]
            if any(speeds.get(**key) is None for key in keys):
                timed: list[dict[str, Any]] = [{"speed_typical": None}] * len(keys)
                if steps:
                    timed = decode.measure(opened.model, opened.tokens(context), caches, 1, steps, burst)
                for key, figures in zip(keys, timed, strict=True):
                    speeds.add({"stages": grid.get(str(key["cache"]), {}), **figures}, **key)
            mine = [
                {**grid[row["cache"]], **row, "speed": speeds.rows([key])[0]["speed_typical"]}
                for row, key in zip(found, keys, strict=True)
                if row["cache"] in grid
            ]
            on_front = front.pareto([(row["share"], row["kl"]) for row in mine])
            mine = [{**row, "pareto": best} for row, best in zip(mine, on_front, strict=True)]
            show_table(f"{context:,} tokens: {opened.name}, {run.dtype}", mine)
            rows += mine
    return rows


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [
        [
            row["transform"],
            row["encode"],
            row["evict"],
            show.share(row["share"]),
            show.short(row["kl"]),
            f"{show.short(row['kl_low'])} - {show.short(row['kl_high'])}",
            f"{row['top1']:.1%}",
            "" if row["speed"] is None else f"{row['speed']:.2f}x",
            "yes" if row["pareto"] else "",
        ]
        for row in sorted(rows, key=lambda row: -row["share"])
    ]
    columns = ("transform", "encode", "evict", "bytes", "KL", "95 %", "top-1", "speed", "front")
    show.table(title, columns, lines, "front: no other combination holds fewer bytes and drifts less")
