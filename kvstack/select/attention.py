"""Attention weights of a few queries over many keys, reduced before they fill the memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..types import TokenRotation

__all__ = ["attention_received", "moved_behind"]

NUMBERS = 2**24
"""Weights computed at once: 64 MiB in float32."""


def moved_behind(queries: Tensor, tokens: Tensor, rope: TokenRotation | None, seen: int, ahead: int) -> Tensor:
    """Queries (B, H*G, n, D) of the tokens with indices `tokens` (n,), as if they stood evenly spaced among the `ahead`
    tokens behind the `seen` ones. Without `rope` attention does not depend on positions."""
    if rope is None:
        return queries
    places = seen + torch.linspace(0, ahead - 1, len(tokens)).long()
    before, behind = (x.to(queries.device)[None, None] for x in (tokens, places))
    return rope.rotate(rope.unrotate(queries.float(), before), behind)


def attention_received(queries: Tensor, keys: Tensor, scaling: float, over: Literal["mean", "max", "sum"]) -> Tensor:
    """Return the attention that every key receives from the newest queries, causally.

    queries (B, H*G, Q, D) belong to the newest Q of the T keys (B, H, T, D). Returns (B, H, G, T): the mean, sum or
    maximum over the queries of their softmax weights.
    """
    b, h, t, d = keys.shape
    q = queries.shape[2]
    grouped = queries.float().reshape(b, h, -1, q, d)  # (B, H, G, Q, D)
    g = grouped.shape[2]
    transposed = keys.float().unsqueeze(2).transpose(-1, -2)  # (B, H, 1, D, T)
    step = max(1, NUMBERS // (b * h * g * t))
    total: Tensor | None = None
    for start in range(0, q, step):
        part = grouped[:, :, :, start : start + step]
        logits = torch.matmul(part * scaling, transposed)
        place = torch.arange(t - q + start, t - q + start + part.shape[3], device=keys.device)
        later = torch.arange(t, device=keys.device)[None] > place[:, None]
        weights = logits.masked_fill_(later, float("-inf")).softmax(-1)
        if over == "max":
            reduced = weights.amax(3)
            total = reduced if total is None else torch.maximum(total, reduced)
        else:
            reduced = weights.sum(3)
            total = reduced if total is None else total + reduced
    assert total is not None
    return total / q if over == "mean" else total
