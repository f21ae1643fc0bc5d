"""Milliseconds per decoded token.

All caches are filled first; then they take turns, a few tokens each, so that whatever else the machine does hits
them alike. A cache does some of its work only now and then (a stack seals a block of tokens, a QuantizedCache
quantizes its residual anew), so two figures are given: the typical burst, and the mean of all steps, with that
work in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import Cache

from . import common
from .common import DENSE, Run, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "measure", "run"]

CONTEXTS = (2048, 4096, 7936)  # the steps after the last one still fit into a window of 8,192
STACKS = ("empty", "evict:0.2", "quant:4", "quant:2", "quant:2+evict:0.2", "hqq:4", "hqq:2")


@dataclass
class Lane:
    """One cache while it is measured."""

    variant: Variant
    cache: Cache
    token: Tensor
    bursts: list[float] = field(default_factory=list)
    """Seconds per token of each burst."""

    def burst(self, model: PreTrainedModel, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.token = common.step(model, self.token, self.cache)
        return (time.perf_counter() - start) / steps


@dataclass(frozen=True)
class Speed:
    """What one cache cost at one context. A speed is dense time / own time: above 1 is faster than dense."""

    context: int
    variant: str
    steps: int
    ms_typical: float
    """Median of the bursts."""
    ms_mean: float
    """Mean of all steps."""
    speed_typical: float
    """Median of the bursts, each against the dense burst of its round."""
    speed_quartiles: tuple[float, float]
    speed_mean: float
    """Of the means."""
    nbytes: int
    """Held after the last step."""
    bursts_ms: list[float]


def run(run: Run, steps: int, burst: int) -> None:
    variants = common.chosen(run)
    with common.opened(run) as subject:
        for context in run.contexts:
            ids = subject.tokens(context, run.seed)
            found = measure(subject.model, ids, variants, steps, burst)
            _show(f"decoding after {context:,} tokens: {subject.name}, {run.dtype}, {run.threads} threads", found)
            common.write("decode", run, subject.name, [asdict(speed) for speed in found])


def measure(model: PreTrainedModel, ids: Tensor, variants: Sequence[Variant], steps: int, burst: int) -> list[Speed]:
    """Decode `steps` tokens after `ids` (1, T) with each variant, `burst` at a time; the first must be dense."""
    lanes = []
    for variant in variants:
        with common.progress(f"prefilling {ids.shape[1]:,} tokens: {variant.label}"):
            cache = variant.make(model)
            lanes.append(Lane(variant, cache, common.prefill(model, ids, cache)))
    with common.progress("decoding"):
        for lane in lanes:
            lane.burst(model, burst)  # the first one warms up and is not counted
        for number in range(-(-steps // burst)):
            for lane in common.rotated(lanes, number):
                lane.bursts.append(lane.burst(model, burst))
    return [_speed(ids.shape[1], lane, lanes[0], burst) for lane in lanes]


def _speed(context: int, lane: Lane, dense: Lane, burst: int) -> Speed:
    assert dense.variant.label == DENSE
    paired = [theirs / own for theirs, own in zip(dense.bursts, lane.bursts, strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else paired * 3
    return Speed(
        context=context,
        variant=lane.variant.label,
        steps=burst * len(lane.bursts),
        ms_typical=statistics.median(lane.bursts) * 1e3,
        ms_mean=statistics.mean(lane.bursts) * 1e3,
        speed_typical=middle,
        speed_quartiles=(low, high),
        speed_mean=statistics.mean(dense.bursts) / statistics.mean(lane.bursts),
        nbytes=common.held_bytes(lane.cache),
        bursts_ms=[seconds * 1e3 for seconds in lane.bursts],
    )


def _show(title: str, found: Sequence[Speed]) -> None:
    dense = found[0].nbytes
    rows = [
        [
            speed.variant,
            f"{speed.ms_typical:.1f}",
            f"{speed.ms_mean:.1f}",
            f"{speed.speed_typical:.2f}x",
            "{:.2f} - {:.2f}".format(*speed.speed_quartiles),
            f"{speed.speed_mean:.2f}x",
            common.mib(speed.nbytes),
            f"{speed.nbytes / dense:.1%}",
        ]
        for speed in found
    ]
    columns = ("cache", "ms, typical", "ms, mean", "speed, typical", "quartiles", "speed, mean", "MiB", "of dense")
    caption = f"{found[0].steps} tokens each; the mean has the steps in it that seal or quantize anew"
    common.table(title, columns, rows, caption)
