"""Positions of tokens as the model was given them, where these are not simply the tokens' indices.

Positions may start elsewhere, start again (packed texts), leave gaps, or have several dimensions (images and video).
They are told for each token the model saw, not for each that is held: a token's index finds them.

With `Evict(positions="cache")` a token has two positions: the one that its key was rotated by when it came (`Given`),
and its place among the tokens that are held now (`Numbered`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import LONG, Rotation, positions_between

__all__ = ["Given", "Numbered", "Placed"]

WAITING = 64
"""Forwards whose positions may wait to be compared."""


class Given:
    """The positions of rows that have seen equally many tokens."""

    def __init__(self) -> None:
        self._told: Tensor | None = None
        # (tokens seen before, their positions), not compared yet: comparing waits for the device
        self._new: list[tuple[int, Tensor]] = []
        self._run: tuple[tuple[int, int, torch.device], Tensor] | None = None

    @property
    def told(self) -> Tensor | None:
        """(rows, axes, seen) int32; None where positions are the tokens' indices."""
        self._compare()
        return self._told

    def _compare(self) -> None:
        told, new = self._told, self._new
        if told is not None or not (new and _plain(new)):
            for seen, positions in new:
                if told is None and _plain([(seen, positions)]):
                    continue
                if told is None:
                    told = positions_between(0, seen, positions.device).expand(*positions.shape[:2], seen)
                axes = max(told.shape[1], positions.shape[1])
                parts = (x.expand(-1, axes, -1).to(positions.device, torch.int32) for x in (told, positions))
                told = torch.cat(list(parts), dim=-1)
        self._told, self._new = told, []  # together: an interrupt loses nothing

    def append(self, positions: Tensor, seen: int) -> None:
        """New tokens were given `positions` (rows, axes, new), behind the `seen` ones before them."""
        self._new.append((seen, positions))
        if positions.device.type == "cpu" or len(self._new) >= WAITING:
            self._compare()

    def at(self, index: Tensor, compared: bool = False) -> Tensor:
        """Positions of the tokens at `index` (B or 1, H or 1, n): the indices themselves, or (B, axes, H or 1, n).
        Tokens to come are counted on from the last one. `compared`: those of these tokens were asked for before, so
        what newer ones were told need not be looked at."""
        told = self._told if compared else self.told
        if told is None:
            return index
        told = told.to(index.device)
        rows, axes, seen = told.shape
        index = index.expand(max(rows, index.shape[0]), -1, -1).long()
        ahead = (index - (seen - 1)).clamp_min(0).unsqueeze(1)
        inside = index.clamp(0, seen - 1).unsqueeze(1).expand(-1, axes, -1, -1)
        wide = told.unsqueeze(2).expand(len(index), axes, index.shape[1], seen)
        last = told[..., -1]
        last = torch.where(last >= LONG, last - LONG, last).amax(1)[:, None, None, None]
        return torch.where(ahead > 0, last + ahead, wide.gather(3, inside)).to(torch.int32)

    def of_run(self, first: int, last: int, device: torch.device) -> Tensor:
        """`at` for the tokens from `first` to before `last`, which were asked for before: one tensor for all groups of
        layers until the forward ends."""
        key = first, last, device
        if self._run is None or self._run[0] != key:
            self._run = key, self.at(positions_between(first, last, device)[None, None], compared=True)
        return self._run[1]

    def end_forward(self) -> None:
        self._run = None

    # ---- moving

    def rows(self, index: Tensor) -> Given:
        """Of the rows at `index`; nothing is shared with this one."""
        other, told = Given(), self.told
        if told is not None:
            other._hold(told.index_select(0, index.to(told.device)))
        return other

    def fork(self) -> Given:
        """The same, in the same memory: what was told is replaced, and never written to."""
        other = Given()
        other._told, other._new = self._told, list(self._new)
        return other

    def crop(self, seen: int) -> None:
        """Only the first `seen` tokens were seen."""
        told = self.told
        if told is not None:
            self._hold(told[..., :seen].clone())

    def _hold(self, told: Tensor | None) -> None:
        self._told, self._run = None if told is None or _plain([(0, told)]) else told, None

    # ---- bytes and files

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """All that is held, what was not compared yet included."""
        held = [self._told, *(new for _, new in self._new)]
        yield from (("positions given", x) for x in held if x is not None)

    def restore(self, told: Tensor | None) -> None:
        """Hold what `told` was when it was saved."""
        self._told, self._new, self._run = told, [], None


def _plain(new: Sequence[tuple[int, Tensor]]) -> bool:
    """Return True if positions (rows, axes, n) are the indices of the tokens from the first on, those of all forwards.
    Asked together: a GPU is waited for once."""
    each = []
    for first, positions in new:
        count = torch.arange(first, first + positions.shape[-1], device=positions.device)
        each.append((positions == count).all())
    return bool(torch.stack([found.to(each[0].device) for found in each]).all())


@dataclass(frozen=True, eq=False)
class Numbered:
    """The places of tokens inside the cache, by their indices in the text.

    They are counted back from the newest token, which has the position that it was given. New tokens are given the
    places behind those that are held, so in a forward the first token held has place 0. When tokens were dropped, the
    others are counted back from the same newest place, until the next forward begins.

    Attributes:
        index: (B or 1, H or 1, held) tokens held, ascending.
        seen: tokens the model saw.
        newest: (B or 1, 1, 1) position of the newest of these.
    """

    index: Tensor
    seen: int
    newest: Tensor

    def held(self) -> Tensor:
        """(B or 1, 1, held) places of the tokens held."""
        tokens = self.index.shape[-1]
        return self.newest + positions_between(1 - tokens, 1, self.index.device)

    def at(self, index: Tensor) -> Tensor:
        """Places of the tokens at `index` (B or 1, H or 1, n), as `Given.at`: (B or 1, H or 1, n). Where heads hold
        different tokens and `index` is the same for all of them, it names newest tokens, or some to come."""
        index, newest, last = index.to(self.newest.device), self.newest, self.seen - 1
        if index.shape[1] < self.index.shape[1]:
            return (newest + index - last).to(torch.int32)
        rows, heads, tokens = max(len(index), len(self.index)), index.shape[1], self.index.shape[-1]
        held = self.index.to(index).expand(rows, heads, -1).contiguous()
        rank = torch.searchsorted(held, index.expand(rows, heads, -1).contiguous()).clamp_max(tokens - 1)
        return (newest + 1 - tokens + rank + (index - last).clamp_min(0)).to(torch.int32)


@dataclass(frozen=True)
class Placed:
    """The rotation of a layer for the tokens of some rows, by their indices."""

    rope: Rotation
    given: Given | Numbered

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.rotate(x, self.given.at(positions).to(x.device))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.unrotate(x, self.given.at(positions).to(x.device))
