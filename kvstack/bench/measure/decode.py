"""Time to the first token, and milliseconds per decoded token.

The caches take turns, prefill by prefill and then a few tokens each, so that whatever else the machine does hits them
alike; each is compared with the dense one of its round. A cache does some of its work only now and then (a stack seals
a block of tokens, a QuantizedCache quantizes its residual again), so two figures are given for decoding: the typical
burst, and the mean of all steps, with that work in it.

One figure is measured, the ratio to the dense cache of the same round, and its median is the speed. Milliseconds follow
from it: the dense cache's median, divided by the speed. Peaks are those of memory.py: on a processor a process for
each cache, on a GPU what it allocates meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache

from ... import KVStack
from .. import terminal
from ..results import Figures, Results
from . import memory, sizes, subject, variants
from .run import Run, environment
from .variants import DENSE, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "measure", "run"]

CONTEXTS = (1024, 4096, 7936)  # the steps after the last one still fit into a window of 8,192
STACKS = (
    "empty",
    "evict:0.2",
    "quant:8",
    "quant:4",
    "quant:2",
    "quant:2+evict:0.2",
    "commonkv:0.65+quant:2",
    "commonkv+quant:2+evict:0.2",
    "hqq:4",
    "hqq:2",
)
WARM_UP = 256


@dataclass
class Lane:
    """One cache while it is measured."""

    variant: Variant
    first: list[float] = field(default_factory=list)
    """Seconds of each prefill, the compressing included."""
    bursts: list[float] = field(default_factory=list)
    """Seconds per token of each burst."""
    cache: Cache | None = None
    token: Tensor | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    """Peak bytes that a GPU allocated, for each step of the work: the cache, and all that was needed next to it."""

    def prefill(self, model: PreTrainedModel, ids: Tensor) -> float:
        self.cache = None  # never two at once
        with memory.growth(model.device) as growth:
            start = time.perf_counter()
            self.cache = self.variant.cache(model)
            self.token = subject.prefill(model, ids, self.cache)
            subject.wait(model)
            passed = time.perf_counter() - start
        self._note("peak_prefill", growth, 0)
        return passed

    def burst(self, model: PreTrainedModel, steps: int) -> float:
        assert self.cache is not None and self.token is not None  # noqa: PT018
        held = sizes.held_bytes(self.cache)
        with memory.growth(model.device) as growth:
            start = time.perf_counter()
            for _ in range(steps):
                self.token = subject.step(model, self.token, self.cache)
            subject.wait(model)
            passed = time.perf_counter() - start
        self._note("peak_decode", growth, held)
        return passed / steps

    def _note(self, name: str, growth: memory.Growth, held: int) -> None:
        if growth.nbytes is not None:
            self.peaks[name] = max(self.peaks.get(name, 0), held + growth.nbytes)


def run(run: Run, rounds: int, steps: int, burst: int, peak: bool = False) -> Iterator[Figures]:
    """Speeds at each context, of all caches. `rounds` prefills with each, then `steps` tokens, `burst` at a time. With
    `peak`, each cache decodes once more in a process of its own, which is asked how much memory that took."""
    with subject.opened(run) as opened:
        opened.check(max(run.contexts) + steps + burst)
        caches = variants.available(variants.parse(run.stacks), opened.model, caches_only=True)
        # caches are measured in turns, so they count for a later run only together
        settings = {"rounds": rounds, "steps": steps, "burst": burst, "in_turns": [cache.label for cache in caches]}
        settings |= {"peak": True} if peak else {}
        results = Results("decode", run.out, environment(run, opened.name, opened.identity))
        for context in run.contexts:
            keys = [{"context": context, **cache.key, **settings} for cache in caches]
            if any(results.get(**key) is None for key in keys):
                timed = measure(opened.model, opened.tokens(context), caches, rounds, steps, burst)
                for key, cache, figures in zip(keys, caches, timed, strict=True):
                    if peak and "peak_decode" not in figures:
                        taken = memory.in_own_process(run, cache.label, context, burst, peak=True)
                        figures["peak_decode"] = taken["peak_decode"]
                    results.add(figures, **key)
            yield results.figures(keys)


def measure(
    model: PreTrainedModel, ids: Tensor, caches: Sequence[Variant], rounds: int, steps: int, burst: int
) -> list[dict[str, Any]]:
    """Prefill `ids` (1, T) `rounds` times and decode `steps` tokens after it, `burst` at a time, with each cache; the
    first must be dense."""
    assert caches[0].label == DENSE
    ids = ids.to(model.device)
    lanes = [Lane(cache) for cache in caches]
    turns = -(-steps // burst)
    with terminal.steps(f"decode at {ids.shape[1]:,}", (rounds + 1) * len(lanes) + turns) as progress:
        for lane in lanes:  # what a stage or a library makes once is not counted, nor is the allocator's growth
            lane.prefill(model, ids[:, :WARM_UP] if lane is not lanes[0] else ids)
            progress.step(f"warming up {lane.variant.label}")
        for number in range(rounds):
            for lane in subject.rotated(lanes, number):
                lane.first.append(lane.prefill(model, ids))
                progress.step(f"prefill, {lane.variant.label}")
        for lane in lanes:
            lane.burst(model, burst)  # the first one warms up and is not counted
        for number in range(turns):
            for lane in subject.rotated(lanes, number):
                lane.bursts.append(lane.burst(model, burst))
            progress.step("decoding")
    return [_figures(model, lane, lanes[0], burst) for lane in lanes]


def _figures(model: PreTrainedModel, lane: Lane, dense: Lane, burst: int) -> dict[str, Any]:
    """Speeds are dense time / own time (above 1 is faster than dense), costs own time / dense time - 1."""
    assert lane.cache is not None
    speeds = [theirs / own for theirs, own in zip(dense.bursts, lane.bursts, strict=True)]
    costs = [own / theirs - 1 for theirs, own in zip(dense.first, lane.first, strict=True)]
    low, middle, high = statistics.quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    return {
        "kind": lane.variant.kind,
        "family": lane.variant.family,
        "tokens": burst * len(lane.bursts),
        "ttft_ms": statistics.median(lane.first) * 1e3,
        "ttft_cost": statistics.median(costs),
        "ttft_cost_low": min(costs),
        "ttft_cost_high": max(costs),
        "ms_typical": statistics.median(dense.bursts) / middle * 1e3,
        "ms_mean": statistics.mean(lane.bursts) * 1e3,
        "speed_typical": middle,
        "speed_low": low,
        "speed_high": high,
        "speed_mean": statistics.mean(dense.bursts) / statistics.mean(lane.bursts),
        "nbytes": sizes.held_bytes(lane.cache),
        "share": sizes.share_of_bfloat16(lane.cache, model),
        **sizes.fitted(lane.cache),
        "reader": _reader(lane.cache),
        **lane.peaks,
        "prefills_ms": [seconds * 1e3 for seconds in lane.first],
        "bursts_ms": [seconds * 1e3 for seconds in lane.bursts],
    }


def _reader(cache: Cache) -> str:
    """Return the readers that answered from sealed tokens; empty for caches that have none."""
    return " and ".join(cache.report().reads_with) if isinstance(cache, KVStack) else ""
