"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..stage import Score
from ..types import KV, Context

__all__ = ["Streaming"]


@dataclass(frozen=True, repr=False)
class Streaming(Score):
    """The position: the budget goes to the newest tokens, in addition to the stack's sinks.

    Source: Xiao et al. 2024, arXiv 2309.17453. Differs from the paper: kept tokens keep their positions in the text.
    With `Evict(..., positions="cache")` they are numbered inside the cache, as in the paper.
    """

    name = "streaming"
    source = "arXiv 2309.17453"
    needs_rope = False

    def score(self, kv: KV, context: Context) -> Tensor:
        return context.positions.float().expand(kv.keys.shape[:3])
