"""The leading right singular vectors of tall or wide matrices: exactly, or by a randomized range finder.

Only these are needed: what belongs to a token is the product of its row with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading"]

OVERSAMPLE, ROUNDS = 8, 2
"""Vectors that the range finder carries beyond those asked for, and how often it goes there and back again. With these,
matrices whose singular values hardly fall lose within 1 % of what the exact decomposition loses."""


def leading(x: Tensor, rank: int, exact: bool = False) -> Tensor:
    """The `rank` leading right singular vectors of `x` (B, T, N), as orthonormal rows (B, rank, N); `rank` is T or N at
    most. The range finder is used where it pays: for less than half of all vectors."""
    small = rank + OVERSAMPLE
    return _exact(x, rank) if exact or 2 * small > min(x.shape[1:]) else _sketched(x, rank, small)


def _exact(x: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the smaller Gram matrix. It squares the singular values, so it is in float64: what gets lost is
    below the rounding of float32."""
    x64 = x.double()
    if x.shape[1] >= x.shape[2]:
        return _top(x64.mT @ x64, rank).mT.to(x.dtype)
    # each column is a right vector times its singular value; QR makes them as orthogonal as those of no length need
    return torch.linalg.qr(x64.mT @ _top(x64 @ x64.mT, rank)).Q.mT.to(x.dtype)


def _sketched(x: Tensor, rank: int, small: int) -> Tensor:
    """Power iterations on a random start (Halko et al., arXiv 0909.4061, algorithm 4.4), then the best directions of
    what they span. The start is always the same, so equal texts give equal bases."""
    start = torch.randn(x.shape[2], small, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    span = start.to(x).expand(x.shape[0], -1, -1)
    for _ in range(1 + ROUNDS):
        span = torch.linalg.qr(x.mT @ (x @ span)).Q  # (B, N, small)
    y = (x @ span).double()
    return (span @ _top(y.mT @ y, rank).to(x.dtype)).mT


def _top(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors (B, n, rank) of the largest eigenvalues, largest first."""
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
