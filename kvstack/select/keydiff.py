"""KeyDiff: keep the keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import Score
from ..types import KV, Context

__all__ = ["KeyDiff"]


@dataclass(frozen=True, repr=False)
class KeyDiff(Score):
    """Minus the cosine between a key and the mean direction of all keys. Needs no queries.

    Source: Park et al. 2025, arXiv 2504.15364.
    """

    name = "keydiff"
    source = "arXiv 2504.15364"
    needs_rope = False

    def score(self, kv: KV, context: Context) -> Tensor:
        directions = torch.nn.functional.normalize(kv.keys.float(), dim=-1)
        return -torch.nn.functional.cosine_similarity(kv.keys.float(), directions.mean(2, keepdim=True), dim=-1)
