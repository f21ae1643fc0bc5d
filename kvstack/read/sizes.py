"""Numbers that kernels and those who call them agree on."""

from __future__ import annotations

import torch

__all__ = ["CHUNK", "NUMBERS", "ONE", "PAIR", "SLACK", "TILE", "padded", "parts"]

TILE = 64
"""Channels that are worked on at once: they stay in the nearest cache."""
PAIR = 16
"""Tokens, or channels, that a product of kernels works on."""
CHUNK = 8
"""Units of tokens whose weights are summed before the sums go to memory."""
ONE = 1 << 40
"""The number that means 1 if kernels, which are given whole numbers, need a share."""
NUMBERS = 32
"""Bits of a channel that is no code but a number, the channels of a token side by side."""
SLACK = 32
"""Bytes, and numbers, that may be read or written behind the last one."""


def padded(size: int, step: int = PAIR) -> int:
    """`size`, in whole steps."""
    return -(-size // step) * step


def parts(heads: int, units: int) -> int:
    """Into how many parts the units of each head are cut, so that all threads have something to do."""
    return max(1, min(units, -(-2 * torch.get_num_threads() // heads)))
