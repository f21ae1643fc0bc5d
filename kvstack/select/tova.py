"""TOVA: the cache as a multi-state RNN, keeping what the newest token looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..stage import Score
from ..types import KV, Context
from .attention import attention_received

__all__ = ["TOVA"]


@dataclass(frozen=True, repr=False)
class TOVA(Score):
    """Attention weights of the newest query, averaged over all heads of the layer.

    Source: Oren et al. 2024, arXiv 2401.06104. Differs from the paper: tokens go a block at a time, and the stack's
    sinks and window stay.
    """

    name = "tova"
    source = "arXiv 2401.06104"
    needs_rope = False
    queries = 1

    def score(self, kv: KV, context: Context) -> Tensor:
        assert context.queries is not None
        received = attention_received(context.queries[:, :, -1:], kv.keys, context.scaling, "mean")
        return context.heads.mean(received.flatten(1, 2)).expand(kv.keys.shape[:3])
