"""Attention masks: what they say about padding, and those that a row without padding needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UseError

__all__ = ["causal_mask", "new_tokens"]


def new_tokens(mask: Any, length: int) -> Tensor | None:
    """Which of the `length` new tokens are real, (B, length) bool, read from the mask that attention was given;
    None where all are, or where the mask cannot tell."""
    if not isinstance(mask, Tensor):
        if mask is None:
            return None
        raise UseError(
            f"the attention mask is a {type(mask).__name__}, which does not tell padding. "
            "Use attn_implementation='sdpa', 'eager' or a flash attention with a KVStack."
        )
    if mask.dim() == 2:  # flash attention: (B, all tokens)
        real = mask[:, -length:].bool()
    else:  # (B, 1, queries, tokens): the newest query sees all real tokens
        row = mask[:, 0, -1, -length:]
        real = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
        if not bool(real[:, -1].any()):  # it sees itself: here True means hidden (MPT)
            real = ~real
    return None if bool(real.all()) else real


def causal_mask(name: str, new: int, held: int, like: Tensor) -> Tensor | None:
    """The mask `name` needs for the newest `new` of `held` unpadded tokens, (1, 1, new, held) or None."""
    if new == 1 or "flash" in name or (name == "sdpa" and new == held):
        return None
    queries = torch.arange(held - new, held, device=like.device)
    visible = torch.arange(held, device=like.device)[None] <= queries[:, None]
    if name == "sdpa":
        return visible[None, None]
    if name == "eager":
        hidden = torch.finfo(like.dtype).min
        return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill(~visible, hidden)[
            None, None
        ]
    raise UseError(
        f"padded batches need a mask of a form kvstack can make, and attn_implementation={name!r} has another. "
        "Use 'sdpa' or 'eager'."
    )
