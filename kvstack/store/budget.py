"""The number of tokens that stay, and their choice: the part of eviction that no score should have to think about."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import ALONE, Heads

__all__ = ["GRID", "Choice", "Profile", "alike", "allowance", "choose", "how_many"]

GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Shares of all tokens that are kept, for which the share of each head was found."""
NEAR = 1.1
"""Heads of a layer whose shares differ by no more than this factor keep equally many tokens."""


@dataclass(frozen=True)
class Profile:
    """The share of its tokens that a head keeps where all heads together keep some share. The mean over all heads of
    what their profiles give is the share of all: between the points of `GRID` it is interpolated.

    Attributes:
        shares: one for each point of `GRID`, from 0 to 1, not falling.
    """

    shares: Sequence[float]

    def at(self, keep: float) -> float:
        """The share of this head where all heads keep `keep`, from 0 to 1."""
        x, y = (0.0, *GRID, 1.0), (0.0, *self.shares, 1.0)
        i = min(bisect.bisect_right(x, keep), len(x) - 1)
        return y[i - 1] + (y[i] - y[i - 1]) * (keep - x[i - 1]) / (x[i] - x[i - 1])


def alike(shares: Tensor, keep: float | int) -> list[tuple[tuple[int, ...], Profile]]:
    """Heads of a layer that keep equally many tokens, and the mean of their profiles. `shares` is (H, len(GRID))."""
    at = [Profile(own.tolist()).at(keep if isinstance(keep, float) else GRID[len(GRID) // 2]) for own in shares]
    runs: list[list[int]] = []
    for head in sorted(range(len(at)), key=lambda i: at[i]):
        near = runs and at[head] <= NEAR * at[runs[-1][0]]
        runs[-1].append(head) if near else runs.append([head])
    ordered = sorted(sorted(run) for run in runs)
    return [(tuple(run), Profile(shares[run].mean(0).tolist())) for run in ordered]


def allowance(keep: float | int, seen: int, sinks: int, window: int, profile: Profile | None = None) -> int:
    """Tokens that may stay in addition to sinks and window: a share of those between them, or a count; of a head with a
    `profile` its part of that."""
    between = max(0, seen - sinks - window)
    if profile is not None and between:
        share = profile.at(min(1.0, keep / between) if isinstance(keep, int) else keep)
        return int(share * between + 1e-4)  # profiles are in float32
    if isinstance(keep, int):
        return keep
    # the small number keeps 0.3 * 10 from becoming 2
    return int(keep * between + 1e-9)


def how_many(middle: int, raw: int, budget: int, granule: int, block: int) -> int:
    """Return the number of the `middle` tokens (those between sinks and window) that must go now.

    Never leaves more than the budget. Where tokens can go one by one it cuts a little deeper, so that the next
    cut is a block of tokens away: cutting at every token would copy the store at every token. Encoded tokens go
    by whole granules, so the number is one that any mix of granules and raw tokens can make up. It depends only
    on counts that are equal in all layers, because one attention mask serves them all.

    Args:
        raw: how many of them surely are raw, in every layer.
    """
    excess = middle - budget
    if excess <= 0:
        return 0
    if granule == 1:
        return min(middle, excess + min(block, budget // 8))
    whole = middle - (budget - budget % granule if budget >= granule else budget)
    if whole <= raw:
        return whole  # leaves whole granules, nothing raw
    return min(middle, -(-excess // granule) * granule)


@dataclass(frozen=True)
class Choice:
    """The tokens that stay, as ascending indices that broadcast over rows and heads.

    granules: (B, H or 1, n) of the encoded granules; raw: (B, H or 1, n) of the raw middle tokens.
    """

    granules: Tensor
    raw: Tensor


def choose(scores: Tensor, packed: int, granule: int, drop: int, heads: Heads = ALONE) -> Choice:
    """Return the tokens that stay when `drop` of them go.

    Args:
        scores: (B, H or 1, T) of the middle tokens: first `packed` encoded ones, then raw ones.
        packed: how many are encoded, a multiple of `granule`.
        granule: encoded tokens go in runs of this many; a run is worth the sum of its scores.
        drop: how many go. The mix of runs and single tokens is the one that loses the least score, the same
            for all rows and heads, since a tensor has one length.
        heads: those of other processes, which drop the same mix.

    Ties go to the newer token: `sort` is stable, so padding cannot change what stays.
    """
    runs = scores[..., :packed].unflatten(-1, (packed // granule, granule)).sum(-1)  # (B, H, packed/g)
    singles = scores[..., packed:]
    run_order = runs.sort(dim=-1, stable=True)
    single_order = singles.sort(dim=-1, stable=True)
    fewest = max(0, -(-(drop - singles.shape[-1]) // granule))
    most = min(runs.shape[-1], drop // granule)
    n = fewest
    if most > fewest:
        losses = [order.values.sum((0, 1)) for order in (run_order, single_order)]
        parts = heads.sum(torch.cat(losses)).split([len(loss) for loss in losses])
        run_loss, single_loss = (torch.nn.functional.pad(loss.cumsum(-1), (1, 0)) for loss in parts)
        counts = torch.arange(fewest, most + 1, device=scores.device)
        n = int(counts[(run_loss[counts] + single_loss[drop - counts * granule]).argmin()])
    return Choice(
        granules=run_order.indices[..., n:].sort(dim=-1).values,
        raw=single_order.indices[..., drop - n * granule :].sort(dim=-1).values,
    )
