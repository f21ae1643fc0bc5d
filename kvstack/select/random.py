"""Random: the control that any score must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import Score
from ..types import KV, Context

__all__ = ["Random"]

PRIME = 2_147_483_647


@dataclass(frozen=True, repr=False)
class Random(Score):
    """A number drawn from seed, layer, head and position, so that a token keeps its luck as the text grows.

    Args:
        seed: another seed, another draw (default 0).
    """

    seed: int = 0

    name = "random"
    source = "control"
    needs_rope = False

    def score(self, kv: KV, context: Context) -> Tensor:
        places = context.heads.places(context.layer, kv.keys.shape[1])
        heads = torch.tensor(places, device=kv.keys.device)[None, :, None]
        x = context.positions.long() * 40_503 + heads * 9_973 + context.layer * 7_919 + self.seed * 104_729 + 1
        for _ in range(3):  # a few rounds of multiply and fold are random enough for a control
            x = (x * 48_271) % PRIME
            x = x ^ (x >> 15)
        return ((x % PRIME).float() / PRIME).expand(kv.keys.shape[:3])
