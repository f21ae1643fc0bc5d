"""Refitting: tokens that stay stand in for those that are dropped.

Attention of a query q to the middle tokens t, of which the `n` at `stay` are kept, is two sums:

    mass    sum of exp(q k_t)          kept tokens get a bias each:   sum of exp(q k_s + bias_s) is nearly the same
    answer  sum of exp(q k_t) v_t      and other values:              sum of exp(q k_s + bias_s) v'_s is nearly the same

Both are taken over the whole attention of the query, for queries of the text itself, moved behind it: as later tokens
would ask. Biases are non-negative least squares with a pull to no bias, values ridge regression with a pull to the old
ones. Both pulls are strong, because the queries to come are others than these.

Source: Attention Matching, arXiv 2602.16284, section 3. Differs from the paper: the ridge, tokens are chosen by the
stack's score, and biases are stored in 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import KV

__all__ = ["STEP", "Refitted", "refitted"]

STEP = 1 / 16
"""Nats of one step of a bias: in 8 bits a token stands for up to exp(8) tokens, to within three per cent."""
MOST = 127
ROUNDS = 60
"""Of the multiplicative updates; more change next to nothing."""
PULL = 1e-3
"""Of the biases to none, as a share of the mean square of what a token explains."""
RIDGE = 1.0
"""Of values to the old ones, as a share of the mean square of a query's weights."""


class Refitted(NamedTuple):
    """Of the middle tokens that stay: bias (B, H, n) int8, in `STEP` nats; values (B, H, raw, D) of the raw ones."""

    bias: Tensor
    values: Tensor


def refitted(
    kv: KV, bias: Tensor | None, queries: Tensor, stay: Tensor, raw: int, middle: slice, scaling: float
) -> Refitted:
    """Return the biases and values of tokens that stand for others.

    Args:
        kv: all held tokens (B, H, T, D).
        bias: (B, H, T) nats, what they have already.
        queries: (B, H*G, Q, D) that see all of them.
        stay: (B or 1, H or 1, n) indices among the tokens of `middle`; the last `raw` of them may get other values.
    """
    b, h, _, d = kv.keys.shape
    n = stay.shape[-1]
    stay = stay.to(kv.keys.device).long().expand(b, h, -1)
    asked = queries.to(kv.keys.device).float().reshape(b, h, -1, d)  # (B, H, G*Q, D)
    codes, values = [], []
    for head in range(h):  # one at a time: the weights of all queries over all tokens are large
        logits = asked[:, head] @ kv.keys[:, head].float().mT * scaling
        if bias is not None:
            logits += bias[:, head, None]
        weights = logits.softmax(-1)[..., middle]  # (B, G*Q, middle)
        old = kv.values[:, head, middle].float()  # (B, middle, D)
        chosen = stay[:, head]
        kept = weights.gather(-1, chosen[:, None].expand(-1, weights.shape[1], -1))  # (B, G*Q, n)
        # the mass, then the answer with biases as they are stored
        extra = torch.zeros_like(kept[:, 0]) if bias is None else bias[:, head, middle].gather(-1, chosen)
        code = ((_shares(kept, weights.sum(-1)).log() + extra) / STEP).round().clamp(-MOST, MOST)
        kept = kept * (code * STEP - extra).exp()[:, None]
        mine = old.gather(1, chosen[..., None].expand(-1, -1, old.shape[-1]))
        missing = weights @ old - kept @ mine  # (B, G*Q, D)
        loose = kept[..., n - raw :]
        codes.append(code.to(torch.int8))
        values.append(mine[:, n - raw :] + _ridge(loose, missing))
    return Refitted(torch.stack(codes, 1), torch.stack(values, 1))


def _shares(kept: Tensor, mass: Tensor) -> Tensor:
    """Return the number of tokens that each kept one stands for, (B, n), above 0: `kept` (B, Q, n) times them is nearly
    `mass` (B, Q).

    Multiplicative updates (Lee and Seung 2001) of non-negative least squares: they stay above 0, and need no more
    memory than `kept`."""
    pull = PULL * kept.square().sum(1).mean(-1, keepdim=True)
    wanted = (mass[:, None] @ kept)[:, 0] + pull
    shares = (mass.sum(-1) / kept.sum((1, 2)).clamp_min(torch.finfo(kept.dtype).tiny)).clamp(1, 20)
    shares = shares[:, None].expand_as(wanted)
    for _ in range(ROUNDS):
        explained = (kept @ shares[..., None]).mT @ kept  # (B, 1, n)
        shares = shares * wanted / (explained[:, 0] + pull * shares).clamp_min(torch.finfo(kept.dtype).tiny)
    return shares.clamp_min(torch.finfo(kept.dtype).tiny)


def _ridge(weights: Tensor, missing: Tensor) -> Tensor:
    """The smallest change (B, n, D) of values that gives `weights` (B, Q, n) nearly all of `missing` (B, Q, D)."""
    among = weights @ weights.mT if weights.shape[1] <= weights.shape[2] else weights.mT @ weights
    pull = RIDGE * weights.square().sum(-1).mean(-1) + torch.finfo(weights.dtype).tiny
    among.diagonal(dim1=-2, dim2=-1).add_(pull[:, None])
    if weights.shape[1] <= weights.shape[2]:  # as many equations as queries, or as tokens
        return weights.mT @ torch.linalg.solve(among, missing)
    return torch.linalg.solve(among, weights.mT @ missing)
