"""SnapKV: what the newest tokens look at is what the next ones will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..stage import Score, check
from ..types import KV, Context
from .attention import attention_received

__all__ = ["SnapKV"]


@dataclass(frozen=True, repr=False)
class SnapKV(Score):
    """Attention from an observation window of newest queries, smoothed along the text.

    Args:
        window: newest queries that are asked (default 32).
        kernel: tokens the scores are smoothed over, odd (default 15).
        pool: `max` (default) or `mean` smoothing.
        over: `max` (default) or `mean` over the window's queries and the query heads of a kv head.

    The paper's own settings are `SnapKV(window=32, kernel=7, over="mean")` with `Evict(..., layers=1)`.

    Source: Li et al. 2024, arXiv 2404.14469. Differs from the paper: one choice per kv head, not per query head
    (the paper's code repeats the cache for each). By default it is one choice for all heads of five layers, from
    maxima over queries, smoothed widely: a small model looks up only the beginning of an answer from the question,
    with few heads, and needs the words that follow it (measured in docs/stages/evict.md). Eviction goes on while
    decoding, by the last few queries.
    """

    window: int = 32
    kernel: int = 15
    pool: Literal["mean", "max"] = "max"
    over: Literal["mean", "max"] = "max"

    name = "snapkv"
    source = "arXiv 2404.14469"
    needs_rope = False
    layers = 5

    def __post_init__(self) -> None:
        check(isinstance(self.window, int) and self.window >= 1, self, "window counts queries.", "Use 1 or more.")
        odd = isinstance(self.kernel, int) and self.kernel >= 1 and self.kernel % 2 == 1
        check(odd, self, "kernel must be an odd number of tokens.", "Use 5, or 1 for no smoothing.")
        for value in (self.pool, self.over):
            check(value in ("mean", "max"), self, f"{value!r} is not a way to reduce.", 'Use "mean" or "max".')
        object.__setattr__(self, "queries", self.window)

    def score(self, kv: KV, context: Context) -> Tensor:
        assert context.queries is not None
        received = attention_received(context.queries, kv.keys, context.scaling, self.over)
        scores = received.mean(2) if self.over == "mean" else received.amax(2)  # (B, H, T)
        return smooth(scores, self.kernel, self.pool)


def smooth(scores: Tensor, kernel: int, pool: str) -> Tensor:
    """Pool (B, H, T) along the tokens; the length stays."""
    if kernel == 1:
        return scores
    if pool == "max":
        return torch.nn.functional.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return torch.nn.functional.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
