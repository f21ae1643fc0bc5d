"""A rotation as what it is: pairs of channels that turn by an angle, each pair at a speed of its own.

    k'[first]  = cos k[first] - sin k[second]
    k'[second] = sin k[first] + cos k[second]

Pairs are found by rotating unit vectors, so halves, neighbours and complex numbers come out alike. Whoever looks for
what a query meets need not rotate keys: turning the query back comes to the same, and pairs that hardly move among the
tokens of a block need it turned only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Pairs", "Turns", "find_pairs"]

FAST, SLOW = 32, 128
"""Tokens of a block, for pairs that turn fast and for those that turn slowly."""
STILL = 0.5
"""A pair is slow where it turns, between the tokens of a slow block and the middle one, by so much at most (the mean of
the distances on the unit circle)."""
LOST = 0.9
"""The same for tokens of fast blocks, beyond which turning a query for a block says nothing; 4 / pi is chance."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Channels of a head.

    Attributes:
        first, second: (P,) those that turn together.
        still: (S,) those that do not turn.
    """

    first: Tensor
    second: Tensor
    still: Tensor

    def to(self, device: torch.device) -> Pairs:
        return Pairs(self.first.to(device), self.second.to(device), self.still.to(device))

    @cached_property
    def every(self) -> Tensor:
        """(D,): the first of each pair, the second of each pair, and those that do not turn."""
        return torch.cat([self.first, self.second, self.still])

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Of pairs, and of channels that do not turn."""
        return len(self.first), len(self.still)


def find_pairs(rotate: Callable[[Tensor, int], Tensor], width: int, device: torch.device) -> Pairs | None:
    """The pairs of a rotation of heads of `width` channels; None where it is none of pairs. `rotate` turns vectors
    (n, width) to one position."""
    unit = torch.eye(width, device=device)
    # column i: what becomes of channel i. Slow pairs hardly move at a near position
    near, far = (rotate(unit, position).T for position in (3, 1009))
    moved = (near != 0) | (far != 0)
    partner = moved & ~torch.eye(width, dtype=torch.bool, device=device)
    if int(partner.sum(0).max()) > 1 or not torch.equal(partner, partner.T):
        return None
    first, second = partner.triu().nonzero(as_tuple=True)
    still = (~partner.any(0)).nonzero()[:, 0]
    for turned in (near, far):
        cos, sin = turned[first, first], turned[second, first]
        same = torch.allclose(turned[second, second], cos, atol=1e-5)
        back = torch.allclose(turned[first, second], -sin, atol=1e-5)
        stays = torch.allclose(turned[still, still], torch.ones_like(turned[still, still]), atol=1e-5)
        if not (same and back and stays):
            return None
    return Pairs(first, second, still)


@dataclass(frozen=True, eq=False)
class Turns:
    """The turns of the pairs of T tokens.

    Attributes:
        pairs: their channels.
        cos, sin: (B or 1, P, T) float32, scaled as the model scales them.
    """

    pairs: Pairs
    cos: Tensor
    sin: Tensor

    @classmethod
    def none(cls, tokens: int, width: int, device: torch.device) -> Turns:
        """Of keys that are not rotated."""
        nothing = torch.empty(0, dtype=torch.long, device=device)
        angles = torch.empty(1, 0, tokens, device=device)
        return cls(Pairs(nothing, nothing, torch.arange(width, device=device)), angles, angles)

    def to(self, device: torch.device) -> Turns:
        return Turns(self.pairs.to(device), self.cos.to(device), self.sin.to(device))

    def take(self, index: Tensor) -> Turns:
        """Those of the tokens at `index` (B, n)."""
        places = index.unsqueeze(1).expand(-1, self.cos.shape[1], -1)
        cos, sin = (x.expand(len(index), -1, -1).gather(2, places) for x in (self.cos, self.sin))
        return Turns(self.pairs, cos, sin)

    @property
    def rotates(self) -> bool:
        return self.pairs.counts[0] > 0

    @cached_property
    def fast(self) -> Blocks:
        """Blocks of few tokens, with the pairs that need them."""
        blocks = Blocks.of(self, FAST)
        mine = (self._slow.spread > STILL) & (blocks.spread <= LOST)
        return blocks.only(mine, still=False)

    @cached_property
    def slow(self) -> Blocks:
        """Blocks of many tokens, with the pairs that hardly turn among them and the channels that do not turn."""
        return self._slow.only(self._slow.spread <= STILL, still=True)

    @cached_property
    def _slow(self) -> Blocks:
        tokens = self.cos.shape[2]
        return Blocks.of(self, SLOW if self.rotates else tokens + -tokens % FAST)

    def facing(self, query: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the products of scaled queries (B, H, G, D) with the `mean` (H, D) of un-rotated keys: with a token's
        cosines (P,) and sines (P,), numbers (B, H, G, 2 P); and with the channels that do not turn, (B, H, G)."""
        pairs, mean = self.pairs, mean.to(query.dtype).unsqueeze(1)
        q, k = (query[..., pairs.first], query[..., pairs.second]), (mean[..., pairs.first], mean[..., pairs.second])
        turning = torch.cat([q[0] * k[0] + q[1] * k[1], q[1] * k[0] - q[0] * k[1]], dim=-1)
        return turning, (query[..., pairs.still] * mean[..., pairs.still]).sum(-1)

    @cached_property
    def angles(self) -> Tensor:
        """(B or 1, 2 P, T): cosines, then sines."""
        return torch.cat([self.cos, self.sin], dim=1)

    @cached_property
    def padded(self) -> Tensor:
        """`angles`, room for whole vectors of tokens behind each row."""
        return torch.nn.functional.pad(self.angles, (0, -self.angles.shape[-1] % 16))

    @cached_property
    def by_token(self) -> Tensor:
        """(B or 1, T, 2 P)."""
        return self.angles.mT.contiguous()

    def rotate_at(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotate `x` (B, H, n, D) to the positions of the tokens at `places` (B, H, n)."""
        rows = torch.arange(len(places), device=x.device)[:, None, None] if self.cos.shape[0] > 1 else 0
        cos, sin = (table.transpose(1, 2)[rows, places].to(x.dtype) for table in (self.cos, self.sin))  # (B, H, n, P)
        one, other = x[..., self.pairs.first], x[..., self.pairs.second]
        turned = x.clone()
        turned[..., self.pairs.first] = cos * one - sin * other
        turned[..., self.pairs.second] = sin * one + cos * other
        return turned


@dataclass(frozen=True, eq=False)
class Blocks:
    """Queries turned back once for all tokens of a block, in some of the channels.

    Attributes:
        size: tokens in a block.
        first, second: (pairs,) channels that turn together.
        still: (S,) channels that do not turn.
        cos, sin: (B or 1, blocks, pairs) at the middle of each block.
        spread: (pairs,) how far, on average, tokens are turned from the middle of their block.
    """

    size: int
    first: Tensor
    second: Tensor
    still: Tensor
    cos: Tensor
    sin: Tensor
    spread: Tensor

    @classmethod
    def of(cls, turns: Turns, size: int) -> Blocks:
        """All pairs of `turns`, in blocks of `size` tokens."""
        tokens = turns.cos.shape[2]
        device = turns.cos.device
        middles = torch.arange(size // 2, tokens + size // 2, size, device=device).clamp_(max=tokens - 1)
        cos, sin = turns.cos[..., middles], turns.sin[..., middles]
        x, y = (
            known - middle.repeat_interleave(size, dim=-1)[..., :tokens]
            for known, middle in ((turns.cos, cos), (turns.sin, sin))
        )
        scale = torch.hypot(cos, sin).mean(-1)  # (B or 1, P); yarn and longrope scale rotations
        spread = (torch.hypot(x, y).mean(-1) / scale).amax(0)
        pairs = turns.pairs
        return cls(size, pairs.first, pairs.second, pairs.still, cos.mT, sin.mT, spread)

    def only(self, mine: Tensor, *, still: bool) -> Blocks:
        """Those pairs that are `mine` (P,), and the channels that do not turn or none of them."""
        at = mine.nonzero()[:, 0]
        return Blocks(
            self.size,
            self.first[at],
            self.second[at],
            self.still if still else self.still[:0],
            self.cos[..., at].contiguous(),  # kernels read them
            self.sin[..., at].contiguous(),
            self.spread[at],
        )

    @cached_property
    def channels(self) -> Tensor:
        """(C,): the first of each pair, the second of each pair, and those that do not turn."""
        return torch.cat([self.first, self.second, self.still])

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Of pairs, and of channels that do not turn."""
        return len(self.first), len(self.still)

    @property
    def count(self) -> int:
        return self.cos.shape[1]

    def facing(self, query: Tensor) -> Tensor:
        """Queries (B, H, G, D), turned back: (B, H, blocks, G, C)."""
        cos, sin = (x[:, None, :, None].to(query.dtype) for x in (self.cos, self.sin))
        one, other = (query[..., channels].unsqueeze(2) for channels in (self.first, self.second))
        kept = query[..., self.still].unsqueeze(2)
        kept = kept.expand(-1, -1, self.count, -1, -1)
        return torch.cat([cos * one + sin * other, cos * other - sin * one, kept], dim=-1)
