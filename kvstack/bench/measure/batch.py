"""Decoding several texts at once: texts of one length, and ragged ones, padded on the left.

Each batch takes turns with a dense cache of the same rows, and with the same rows alone, one after the other: `speed`
is the dense time over the own, and `of_alone` the own time over that of all rows alone. Rows of different lengths are
kept apart in a stack, so a ragged batch shares its products with weights, and reads one row after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from .. import terminal
from ..results import Figures, Results
from . import sizes, subject, variants
from .run import Run, environment
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "KINDS", "STACKS", "lengths", "measure", "run"]

CONTEXTS = (1024,)
KINDS = ("equal", "ragged")
STACKS = ("empty", "quant:4", "evict:0.2", "quant:2+evict:0.2")
SHORTEST = 4
"""The shortest text of a ragged batch has a quarter of the longest one's tokens."""


def run(run: Run, shape: str | None, rows: Sequence[int], steps: int, burst: int) -> Iterator[Figures]:
    """Figures of all caches for each number of `rows`, of texts of the longest context."""
    context = max(run.contexts)
    with subject.opened(run, shape) as opened:
        opened.check(context + steps + 2 * burst)
        caches = variants.available(variants.parse(run.stacks), opened.model, caches_only=True)
        results = Results("batch", run.out, environment(run, opened.name, opened.identity))
        ids = opened.tokens(context)
        shapes = [(n, kind) for n in rows for kind in (KINDS if n > 1 else KINDS[:1])]
        for many, kind in shapes:
            settings = {"context": context, "rows": many, "texts": kind, "steps": steps, "burst": burst}
            keys, tokens = [{**settings, **cache.key} for cache in caches], lengths(kind, many, context)
            with terminal.steps(f"{many} rows, {kind}", len(caches)) as progress:
                for cache, key in zip(caches, keys, strict=True):
                    if results.get(**key) is None:
                        results.add(measure(opened.model, ids, tokens, caches[0], cache, steps, burst), **key)
                    progress.step(cache.label)
            yield results.figures(keys)


def lengths(kind: str, rows: int, longest: int) -> list[int]:
    """Tokens of each row."""
    if kind == "equal" or rows == 1:
        return [longest] * rows
    least = longest // SHORTEST
    return [longest - (longest - least) * i // (rows - 1) for i in range(rows)]


@dataclass
class Lane:
    """A batch while it is measured."""

    model: PreTrainedModel
    cache: Cache
    ids: Tensor
    mask: Tensor
    token: Tensor = field(init=False)
    bursts: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel, cache: Cache, ids: Tensor, lengths: Sequence[int]) -> Lane:
        """Rows that are the last tokens of `ids` (1, T), padded on the left."""
        width = max(lengths)
        at = torch.arange(width - 1, -1, -1)
        mask = torch.stack([(at < length).long() for length in lengths])
        rows = ids[:, -width:].expand(len(lengths), -1) * mask
        return cls(model, cache, rows.to(model.device), mask.to(model.device))

    def prefill(self) -> None:
        self.token = self._next(self.ids, (self.mask.cumsum(1) - 1).clamp_min(0))

    def burst(self, steps: int) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.token = self._next(self.token, self.mask.sum(1, keepdim=True) - 1)
        subject.wait(self.model)
        return (time.perf_counter() - start) / steps

    def _next(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return torch.as_tensor(logits[:, -1:].argmax(-1))


def measure(
    model: PreTrainedModel, ids: Tensor, lengths: Sequence[int], dense: Variant, cache: Variant, steps: int, burst: int
) -> dict[str, Any]:
    """Decode `steps` tokens, `burst` at a time, behind rows of these `lengths`: with the cache, with a dense one, and
    with the cache for every row alone."""
    own = Lane.of(model, cache.cache(model), ids, lengths)
    beside = Lane.of(model, dense.cache(model), ids, lengths)
    alone = [Lane.of(model, cache.cache(model), ids, [length]) for length in lengths]
    every = [own, beside, *alone]
    for lane in every:
        lane.prefill()
        lane.burst(burst)  # warms up
    for number in range(-(-steps // burst)):
        for lane in subject.rotated(every, number):
            lane.bursts.append(lane.burst(burst))
    apart = [sum(lane.bursts[i] for lane in alone) for i in range(len(own.bursts))]
    return {
        "kind": cache.kind,
        "ms": statistics.median(own.bursts) * 1e3,
        "tokens_s": len(lengths) / statistics.median(own.bursts),
        "speed": statistics.median(y / x for x, y in zip(own.bursts, beside.bursts, strict=True)),
        "of_alone": statistics.median(x / y for x, y in zip(own.bursts, apart, strict=True)),
        "nbytes": sizes.held_bytes(own.cache),
        "dense_nbytes": sizes.held_bytes(beside.cache),
        **sizes.fitted(own.cache),
    }
