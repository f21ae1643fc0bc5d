"""Every combination of a transform, an encoder and a selector: bytes, quality and speed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import KVStackError
from ..results import Figures, Results
from ..terminal import say
from . import decode, quality, subject, variants
from .run import Run, environment

__all__ = ["CONTEXTS", "ENCODES", "EVICTS", "TRANSFORMS", "combinations", "run"]

CONTEXTS = (1024,)
NONE = "none"
TRANSFORMS = (NONE, "commonkv")
ENCODES = (NONE, "quant:4", "quant:2")
EVICTS = (NONE, "evict:0.5", "evict:0.2")


def combinations(transforms: Sequence[str], encodes: Sequence[str], evicts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Spec of each combination -> its stage of each kind. Those that cannot be built are left out, and said."""
    grid = {}
    for transform, encode, evict in itertools.product(transforms, encodes, evicts):
        stages = [stage for stage in (transform, encode, evict) if stage != NONE]
        spec = "+".join(stages) or variants.EMPTY
        try:
            variants.parse([spec])
        except KVStackError as error:
            say(f"{spec}: left out. {error}")
        else:
            grid[spec] = {"transform": transform, "encode": encode, "evict": evict}
    return grid


def run(
    run: Run,
    grid: Mapping[str, Mapping[str, str]],
    windows: int,
    score: int,
    steps: int,
    burst: int,
) -> Iterator[tuple[Figures, Figures]]:
    """The figures of quality and the speeds of each context; a speed's `stages` are those of its combination.

    `grid` as `combinations` makes it; the other settings are those of `quality.run` and `decode.run`, with one prefill.
    """
    with subject.opened(run) as opened:
        opened.check(max(run.contexts) + max(score, steps + burst))
        caches = variants.available(variants.parse(list(grid)), opened.model)
        where = environment(run, opened.name, opened.identity)
        results = Results("quality", run.out, where)
        speeds = Results("matrix", run.out, where)
        for context in run.contexts:
            qualities = quality.measure(opened, results, run, context, caches, windows, score)
            settings = {"context": context, "steps": steps, "burst": burst, "in_turns": [c.label for c in caches]}
            keys = [{**settings, **cache.key} for cache in caches]
            if any(speeds.get(**key) is None for key in keys):
                timed: list[dict[str, Any]] = [{"speed_typical": None}] * len(keys)
                if steps:
                    timed = decode.measure(opened.model, opened.tokens(context), caches, 1, steps, burst)
                for cache, key, figures in zip(caches, keys, timed, strict=True):
                    speeds.add({"stages": grid.get(cache.label, {}), **figures}, **key)
            yield qualities, speeds.figures(keys)
