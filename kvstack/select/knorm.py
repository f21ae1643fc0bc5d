"""Key norm: keys of small norm draw much attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..stage import Score
from ..types import KV, Context

__all__ = ["KNorm"]


@dataclass(frozen=True, repr=False)
class KNorm(Score):
    """Minus the L2 norm of the key. Needs no queries and costs almost nothing.

    Source: Devoto et al. 2024, arXiv 2406.11430.
    """

    name = "knorm"
    source = "arXiv 2406.11430"
    needs_rope = False

    def score(self, kv: KV, context: Context) -> Tensor:
        return -kv.keys.float().norm(dim=-1)
