"""H2O: heavy hitters, the tokens that have received most attention so far, together with the recent ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..stage import Score
from ..types import KV, Context
from .attention import attention_received

__all__ = ["H2O"]


@dataclass(frozen=True, repr=False)
class H2O(Score):
    """Attention accumulated over every query since the token appeared, while decoding too.

    The recent half of the paper's budget is the stack's window. Costs one more pass of attention weights per
    forward and four bytes per token and kv head.

    Source: Zhang et al. 2023, arXiv 2306.14048. Differs from the paper: sums are kept per kv head (mean of its query
    heads), for batches and grouped-query models, and tokens go a block at a time.
    """

    name = "h2o"
    source = "arXiv 2306.14048"
    needs_rope = False
    queries = -1
    tracks = True

    def track(self, kv: KV, context: Context) -> Mapping[str, Tensor]:
        assert context.queries is not None
        mass = attention_received(context.queries, kv.keys, context.scaling, "sum").mean(2)  # (B, H, T)
        before = context.memory.get("mass")
        return {"mass": mass if before is None else mass + before}

    def score(self, kv: KV, context: Context) -> Tensor:
        return context.memory["mass"]
