"""Numbers that kernels and those who call them agree on."""

from __future__ import annotations

import torch

__all__ = ["STEP", "TILE", "parts"]

TILE = 64
"""Channels that are worked on at once: they stay in the nearest cache, and a loop of known length leaves no rest."""
STEP = 32
"""Codes that a loop of any length takes at once; it may write as many behind a row."""


def parts(heads: int, units: int) -> int:
    """Into how many parts the units of each head are cut, so that all threads have something to do."""
    return max(1, min(units, -(-2 * torch.get_num_threads() // heads)))
