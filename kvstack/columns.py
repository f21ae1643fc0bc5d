"""The columns of a row's tokens in the batch: padding is left out, and lies between runs of columns.

columns   0 1 2 3 4 5 6 7 8 9        what the model saw, and what its attention mask counts
row       . . a b c . . d e f        . is padding
tokens        0 1 2     3 4 5        what is held
runs      (0, 2), (3, 7)             first token of a run, its column
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Columns"]


@dataclass(frozen=True)
class Columns:
    """The columns of the tokens 0, 1, ... of some rows.

    Attributes:
        runs: (first token, its column), ascending; tokens up to the next run follow without a gap.
    """

    runs: tuple[tuple[int, int], ...] = ()

    def grown(self, seen: int, start: int, places: Iterable[int] | None, new: int) -> Columns:
        """With tokens behind the `seen` ones: `new` of them from column `start` on, or those at `places` behind it."""
        runs = list(self.runs)
        for at, column in enumerate(range(start, start + new) if places is None else (start + p for p in places)):
            token = seen + at
            if not runs or column - runs[-1][1] != token - runs[-1][0]:
                runs.append((token, column))
            elif places is None:
                break  # the rest follows without a gap
        return Columns(tuple(runs))

    def of(self, seen: int, device: torch.device) -> Tensor:
        """(seen,) column of every token."""
        parts = [torch.arange(column, column + n, device=device) for column, n in self._lengths(seen)]
        return torch.cat(parts) if parts else torch.arange(0, device=device)

    def _lengths(self, seen: int) -> list[tuple[int, int]]:
        """(first column, tokens) of every run."""
        ends = [token for token, _ in self.runs[1:]] + [seen]
        return [(column, end - token) for (token, column), end in zip(self.runs, ends, strict=False)]

    def before(self, limit: int, seen: int) -> int:
        """Return how many of `seen` tokens are before the column `limit`."""
        return sum(max(0, min(limit - column, n)) for column, n in self._lengths(seen))

    def first(self, seen: int) -> Columns:
        """Those of the first `seen` tokens."""
        return Columns(tuple(run for run in self.runs if run[0] < seen))
