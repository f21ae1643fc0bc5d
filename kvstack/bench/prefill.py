"""What compressing adds to the prefill. The caches take turns, and each is compared with the dense one of its round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from . import common
from .common import DENSE, Run, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "measure", "run"]

CONTEXTS = (4096,)
STACKS = ("empty", "evict:0.2", "quant:4", "quant:2", "quant:2+evict:0.2", "hqq:4")
WARM_UP = 256


@dataclass(frozen=True)
class Cost:
    """Time of one cache's prefill; costs are own time / dense time - 1."""

    context: int
    variant: str
    seconds: float
    """Median of the rounds."""
    cost: float
    """Median of the rounds."""
    cost_range: tuple[float, float]
    rounds_s: list[float]


def run(run: Run, rounds: int) -> None:
    variants = common.chosen(run)
    with common.opened(run) as subject:
        for context in run.contexts:
            ids = subject.tokens(context, run.seed)
            found = measure(subject.model, ids, variants, rounds)
            _show(f"prefill of {context:,} tokens: {subject.name}, {run.dtype}, {run.threads} threads", found)
            common.write("prefill", run, subject.name, [asdict(cost) for cost in found])


def measure(model: PreTrainedModel, ids: Tensor, variants: Sequence[Variant], rounds: int) -> list[Cost]:
    """Prefill `ids` (1, T) with a new cache of each variant, `rounds` times; the first variant must be dense."""
    assert variants[0].label == DENSE
    times: dict[str, list[float]] = {variant.label: [] for variant in variants}
    _timed(model, ids, variants[0])  # the first long text makes the allocator grow
    for variant in variants:
        _timed(model, ids[:, :WARM_UP], variant)
    for number in range(rounds):
        with common.progress(f"prefilling {ids.shape[1]:,} tokens, round {number + 1} of {rounds}"):
            for variant in common.rotated(variants, number):
                times[variant.label].append(_timed(model, ids, variant))
    return [_cost(ids.shape[1], label, own, times[DENSE]) for label, own in times.items()]


def _timed(model: PreTrainedModel, ids: Tensor, variant: Variant) -> float:
    start = time.perf_counter()
    common.prefill(model, ids, variant.make(model))
    return time.perf_counter() - start


def _cost(context: int, label: str, own: list[float], dense: list[float]) -> Cost:
    costs = [mine / theirs - 1 for mine, theirs in zip(own, dense, strict=True)]
    return Cost(
        context=context,
        variant=label,
        seconds=statistics.median(own),
        cost=statistics.median(costs),
        cost_range=(min(costs), max(costs)),
        rounds_s=own,
    )


def _show(title: str, found: Sequence[Cost]) -> None:
    rows = [
        [cost.variant, f"{cost.seconds:.2f}", f"{cost.cost:+.1%}", "{:+.1%} .. {:+.1%}".format(*cost.cost_range)]
        for cost in found
    ]
    caption = f"median of {len(found[0].rounds_s)} rounds, each against the dense prefill of its round"
    common.table(title, ("cache", "seconds", "cost", "range"), rows, caption)
