"""The kv heads of a layer that other processes hold (tensor parallelism), as far as somebody here must know of them.

process 0    heads 0 .. H-1        whatever is decided for all heads of a layer is decided by all processes
process 1    heads H .. 2H-1       together: they add up, or compare, and each gets the same result
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["ALONE", "Heads"]

T = TypeVar("T")


@dataclass(frozen=True)
class Heads:
    """The processes that hold equally many kv heads each, or all of them the same. Every method but `places` is called
    by all of them in turn, with tensors of one shape.

    Attributes:
        rank: the number of this one, from 0 on.
        size: the number of all (default 1: this one holds all heads).
        whole: layers of which each process holds all heads.
        group: torch's process group; None for one process.
        chosen: places in their layer of the heads that somebody looks at; None: all that are here.
    """

    rank: int = 0
    size: int = 1
    whole: frozenset[int] = frozenset()
    group: Any = field(default=None, repr=False, compare=False)
    chosen: tuple[int, ...] | None = None

    def places(self, layer: int, held: int) -> list[int]:
        """Of the `held` heads that are here, their places in the layer."""
        if self.chosen is not None:
            return list(self.chosen)
        first = 0 if layer in self.whole else self.rank * held
        return list(range(first, first + held))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process' `x`."""
        return x if self.group is None else self._reduced(x, "SUM")

    def mean(self, x: Tensor) -> Tensor:
        """The mean (B, 1, ...) over all heads of the layer, of `x` (B, H, ...) of those that are here."""
        if self.group is None:
            return x.mean(1, keepdim=True)
        return self._reduced(x.sum(1, keepdim=True), "SUM") / (self.size * x.shape[1])

    def max(self, x: Tensor) -> Tensor:
        """The maximum (B, 1, ...) over all heads of the layer, of `x` (B, H, ...) of those that are here."""
        most = x.amax(1, keepdim=True)
        return most if self.group is None else self._reduced(most, "MAX")

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, getattr(torch.distributed.ReduceOp, how), self.group)
        return x

    def gathered(self, thing: T) -> list[T]:
        """Return the `thing` of each process, in their order. For small things: they are pickled."""
        if self.group is None:
            return [thing]
        told: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(told, thing, self.group)
        return told


ALONE = Heads()
"""All heads are here."""
