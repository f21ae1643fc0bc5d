"""A hash of the token ids that the rows of a cache have read, so that a text which does not begin with them is noticed.

    ids      a    b    c    d              ids of a row, padding included
    terms    f(a,0) f(b,1) f(c,2) f(d,3)   each depends on an id and its column
    sums     ...  f(a,0) + f(b,1) + f(c,2) + f(d,3)

A sum can go on without what was read before, so 8 bytes a row are enough. Where tokens may be taken back, the sums
before each token of the last forward are kept, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["TextHash"]

STEP, FIRST, SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB
"""Large odd numbers. Products of integers keep their last 64 bits."""


def _terms(ids: Tensor, first: int) -> Tensor:
    """A number (rows, n) int64 for each of the `ids` in the columns from `first` on."""
    columns = torch.arange(first + 1, first + 1 + ids.shape[1], device=ids.device)
    x = (ids.long() + 1) * FIRST + columns * STEP
    x = (x ^ (x >> 29)) * SECOND
    return x ^ (x >> 32)


@dataclass(frozen=True)
class TextHash:
    """The ids of all rows that were read.

    Attributes:
        columns: tokens of each row.
        sums: (rows, n) int64, of all tokens and of all but the newest 1, 2, ... in front of that; None: nothing was
            read, or the ids are not known.
        known: True if `sums` are of all that was read: embeddings have no ids.
    """

    columns: int = 0
    sums: Tensor | None = None
    known: bool = True

    @property
    def all_read(self) -> list[int] | None:
        """The sum of each row; None: not known, or nothing was read."""
        return None if self.sums is None else self.sums[:, -1].tolist()

    def grown(self, ids: Tensor | None, rows: int, new: int, recent: bool) -> TextHash:
        """With `new` tokens of these `ids` (rows, new); None: not known. `recent`: they may be taken back."""
        if not self.known or ids is None or ids.shape != (rows, new) or ids.is_floating_point():
            return TextHash(self.columns + new, known=False)
        sums = _terms(ids, self.columns)
        sums = sums.cumsum(1) if recent else sums.sum(1, keepdim=True)
        if self.sums is not None:
            before = self.sums[:, -1:].to(sums.device)
            sums = before + sums
            sums = torch.cat([before, sums], dim=1) if recent else sums
        return TextHash(self.columns + new, sums)

    def rows(self, index: Tensor) -> TextHash:
        """Of the rows at `index` (n,)."""
        return self if self.sums is None else replace(self, sums=self.sums[index.to(self.sums.device)])

    def cropped(self, columns: int) -> TextHash:
        """Of the first `columns` tokens; not known where the sum of just these is not there any more."""
        gone = self.columns - columns
        if not columns or not gone:
            return self if columns else TextHash()
        if self.sums is None or self.sums.shape[1] <= gone:
            return TextHash(columns, known=False)
        return TextHash(columns, self.sums[:, :-gone].clone())

    def begins(self, ids: Tensor) -> bool:
        """Return True if a text of these `ids` (rows, n) begins with what was read, or if that is not known."""
        if self.sums is None or ids.dim() != 2 or len(ids) != len(self.sums):
            return True
        found = _terms(ids[:, : self.columns], 0).sum(1)
        return torch.equal(found, self.sums[:, -1].to(found.device))
