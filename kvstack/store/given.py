"""Positions of tokens as the model was given them, where these are not simply the tokens' indices.

Positions may start elsewhere, start again (packed texts), leave gaps, or have several dimensions (images and video).
They are told for each token the model saw, not for each that is held: a token's index finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import LONG, Rotation, positions_between

__all__ = ["Given", "Placed"]

WAITING = 64
"""Forwards whose positions may wait to be compared."""


class Given:
    """The positions of rows that have seen equally many tokens."""

    def __init__(self) -> None:
        self._told: Tensor | None = None
        # (tokens seen before, their positions), not compared yet: comparing waits for the device
        self._new: list[tuple[int, Tensor]] = []

    @property
    def told(self) -> Tensor | None:
        """(rows, axes, seen) int32; None where positions are the tokens' indices."""
        self._compare()
        return self._told

    def _compare(self) -> None:
        for seen, new in self._new:
            if self._told is None and _plain(new, seen):
                continue
            before = self._told
            if before is None:
                before = positions_between(0, seen, new.device).expand(*new.shape[:2], seen)
            axes = max(before.shape[1], new.shape[1])
            parts = (x.expand(-1, axes, -1).to(new.device, torch.int32) for x in (before, new))
            self._told = torch.cat(list(parts), dim=-1)
        self._new = []

    def append(self, positions: Tensor, seen: int) -> None:
        """New tokens were given `positions` (rows, axes, new), behind the `seen` ones before them."""
        self._new.append((seen, positions))
        if positions.device.type == "cpu" or len(self._new) >= WAITING:
            self._compare()

    def at(self, index: Tensor) -> Tensor:
        """Positions of the tokens at `index` (B or 1, H or 1, n): the indices themselves, or (B, axes, H or 1, n).
        Tokens to come are counted on from the last one."""
        told = self.told
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

    # ---- moving

    def rows(self, index: Tensor) -> Given:
        """Of the rows at `index`; nothing is shared with this one."""
        other, told = Given(), self.told
        if told is not None:
            other._hold(told.index_select(0, index.to(told.device)))
        return other

    def crop(self, seen: int) -> None:
        """Only the first `seen` tokens were seen."""
        told = self.told
        if told is not None:
            self._hold(told[..., :seen].clone())

    def _hold(self, told: Tensor | None) -> None:
        self._told = None if told is None or _plain(told, 0) else told

    # ---- bytes and files

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """All that is held, what was not compared yet included."""
        held = [self._told, *(new for _, new in self._new)]
        yield from (("positions given", x) for x in held if x is not None)

    def restore(self, told: Tensor | None) -> None:
        """Hold what `told` was when it was saved."""
        self._told, self._new = told, []


def _plain(positions: Tensor, first: int) -> bool:
    """Whether positions (rows, axes, n) are the indices of the tokens from `first` on."""
    count = torch.arange(first, first + positions.shape[-1], device=positions.device)
    return bool((positions == count).all())


@dataclass(frozen=True)
class Placed:
    """The rotation of a layer for the tokens of some rows, by their indices."""

    rope: Rotation
    given: Given

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.rotate(x, self.given.at(positions).to(x.device))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.unrotate(x, self.given.at(positions).to(x.device))
