"""Looking ahead: what the text has asked so far, asked again from behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..stage import Score, check
from ..types import KV, Context
from .attention import NUMBERS, moved_behind

__all__ = ["LookAhead"]


@dataclass(frozen=True, repr=False)
class LookAhead(Score):
    """Attention from queries of the whole text, evenly spaced, as if tokens that come next had asked them.

    Args:
        ahead: positions behind the text that the queries are spread over (default 256).
        over: `mean` (default) or `max` over the queries and the query heads of a kv head.

    Up to 384 queries of the newest forward of several tokens; while decoding, the last few.

    Source: the reference queries of Attention Matching, arXiv 2602.16284, section 3, taken as a score. Differs from the
    paper: queries are moved behind the text.
    """

    ahead: int = 256
    over: Literal["mean", "max"] = "mean"

    name = "lookahead"
    source = "arXiv 2602.16284"
    needs_rope = True
    references = True
    layers = 5

    def __post_init__(self) -> None:
        check(isinstance(self.ahead, int) and self.ahead >= 1, self, "ahead counts positions.", "Use 1 or more.")
        check(self.over in ("mean", "max"), self, f"{self.over!r} is not a way to reduce.", 'Use "mean" or "max".')

    def score(self, kv: KV, context: Context) -> Tensor:
        assert context.references is not None
        queries = moved_behind(*context.references, context.rope, context.seen, self.ahead).to(kv.keys.device)
        b, h, t, d = kv.keys.shape
        asked = queries.float().reshape(b, h, -1, d) * context.scaling  # (B, H, G*n, D)
        keys = kv.keys.float().mT
        parts = []
        for part in asked.split(max(1, NUMBERS // (b * h * t)), dim=2):
            weights = torch.matmul(part, keys).softmax(-1)
            parts.append(weights.amax(2) if self.over == "max" else weights.sum(2))
        found = torch.stack(parts)
        return found.amax(0) if self.over == "max" else found.sum(0) / asked.shape[2]
