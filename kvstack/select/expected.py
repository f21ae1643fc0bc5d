"""Expected attention: how much attention a key will receive from queries that do not exist yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import Score, check
from ..types import KV, Context

__all__ = ["ExpectedAttention"]


@dataclass(frozen=True, repr=False)
class ExpectedAttention(Score):
    """Queries are taken as Gaussian; their mean and covariance, rotated to the positions to come, give the expected
    weight of each key in closed form, which is multiplied by the norm of its value.

    Args:
        window: newest queries the Gaussian is fitted to (default 512).
        future: positions ahead that the rotation is averaged over (default 512).
        covariance: True if the spread of the queries counts too (default True).

    Source: Devoto et al. 2025, arXiv 2510.00636, section 3. Differs from the paper: the norm of the value stands for
    the norm of its output projection, and while decoding the Gaussian is fitted to the last few queries.
    """

    window: int = 512
    future: int = 512
    covariance: bool = True

    name = "expected"
    source = "arXiv 2510.00636"
    needs_rope = True

    def __post_init__(self) -> None:
        for value in (self.window, self.future):
            check(isinstance(value, int) and value >= 1, self, "window and future count tokens.", "Use 1 or more.")
        object.__setattr__(self, "queries", self.window)

    def score(self, kv: KV, context: Context) -> Tensor:
        assert context.queries is not None
        b, h, t, d = kv.keys.shape
        queries = context.queries.float()
        q = queries.shape[2]
        rope = context.rope
        if rope is not None:
            places = torch.arange(context.seen - q, context.seen, device=queries.device)[None, None]
            queries = rope.unrotate(queries, places)
        queries = queries.reshape(b, h, -1, q, d)  # (B, H, G, Q, D)
        mean = queries.mean(3)  # (B, H, G, D)
        centred = queries - mean.unsqueeze(3)
        spread = centred.transpose(-1, -2) @ centred / q  # (B, H, G, D, D)
        if rope is not None:
            ahead = torch.arange(context.seen, context.seen + self.future, device=queries.device)[None, None]
            basis = torch.eye(d, device=queries.device)[None, :, None].expand(1, d, self.future, d)
            # (B or 1, 1, D, D): row i is the average rotation of axis i
            turn = rope.rotate(basis, ahead).mean(2).unsqueeze(1)
            mean = mean @ turn
            spread = turn.mT.unsqueeze(2) @ spread @ turn.unsqueeze(2)
        keys = kv.keys.float()
        logits = torch.einsum("bhgd,bhtd->bhgt", mean, keys) * context.scaling
        if self.covariance:
            # E[exp(q.k)] of a Gaussian q has half the variance of q.k in its exponent
            variance = torch.einsum("bhtd,bhgde,bhte->bhgt", keys, spread, keys)
            logits = logits + variance * (context.scaling**2 / 2)
        weights = logits.softmax(-1).mean(2)
        scores: Tensor = weights * kv.values.float().norm(dim=-1) * math.sqrt(t)
        return scores
