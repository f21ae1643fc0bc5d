"""Questions of attention to the tokens that are held, and the answers of several kv heads put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batch import Cohort
from .model import masks
from .model.hooks import Call
from .store.store import Store
from .types import KV

__all__ = ["Asked", "answered", "by_head", "fitted"]


@dataclass(frozen=True)
class Asked:
    """A question of attention to one cohort in one layer, to all heads or some.

    Attributes:
        number: of the cohort.
        places, n: the forward's tokens that ask (None: all), and their number.
        query: (b, query heads, n, D) of the cohort's rows.
        mask: the model's, for all rows and heads.
        dense: tokens the model has seen.
        every: True if the cohort has all rows, and all new tokens of them ask.
        attached: the new keys and values, where gradients may be asked for.
        kwargs: other arguments of the attention function.
        heads: places of the kv heads that are asked; None: all of them. `groups`: query heads of each.
    """

    call: Call
    cohort: Cohort
    number: int
    places: Tensor | None
    n: int
    query: Tensor
    mask: Any
    dense: int
    every: bool
    attached: KV | None
    slot: int
    kwargs: Mapping[str, Any]
    heads: tuple[int, ...] | None = None
    groups: int = 1

    def of(self, heads: tuple[int, ...] | None, groups: int) -> Asked:
        """The same of the kv heads at `heads` alone."""
        if heads is None:
            return self
        asked = replace(self, heads=heads, groups=groups)
        attached = self.attached and KV(*(x[:, list(heads)] for x in (self.attached.keys, self.attached.values)))
        return replace(asked, query=asked.of_queries(self.query), attached=attached)

    def of_queries(self, x: Tensor) -> Tensor:
        """The query heads of these kv heads, of `x` (B, query heads, ...)."""
        return x if self.heads is None else x.unflatten(1, (-1, self.groups))[:, list(self.heads)].flatten(1, 2)

    def groups_of(self, pieces: Pieces) -> int:
        """Query heads of each kv head."""
        return self.query.shape[1] // max(1, sum(len(heads or ()) for heads, _ in pieces))

    def cut(self, mask: Any) -> Any:
        """A mask for these heads: most masks are for all."""
        return self.of_queries(mask) if by_head(mask) else mask


Pieces = Sequence[tuple[tuple[int, ...] | None, Store]]
"""Places of kv heads, and the store that holds them; None: of all heads."""
Ask = Callable[[Asked, Store], tuple[Tensor, Tensor | None]]


def fitted(asked: Asked, store: Store) -> Tensor:
    """The mask for what a store holds."""
    return masks.fitted(asked.cut(asked.mask), store.positions(asked.cohort.seen), asked.query.shape[1])


def _in_order(x: Tensor, dim: int, order: Sequence[int]) -> Tensor:
    """Query heads, axis `dim` of `x`, that are those of the kv heads in `order`, as the model has them."""
    back = sorted(range(len(order)), key=order.__getitem__)
    if back == list(range(len(back))):
        return x
    heads = x.unflatten(dim, (len(order), -1))
    return heads.index_select(dim, torch.tensor(back, device=x.device)).flatten(dim, dim + 1)


def answered(asked: Asked, pieces: Pieces, ask: Ask) -> tuple[Tensor, Tensor | None]:
    """The answer of all heads, and their weights over all tokens seen; `ask` gives those of some heads."""
    if len(pieces) == 1:
        return ask(asked, pieces[0][1])
    order = [head for heads, _ in pieces for head in heads or ()]
    groups = asked.groups_of(pieces)
    answers, weights = zip(*(ask(asked.of(heads, groups), store) for heads, store in pieces), strict=True)
    answer = _in_order(torch.cat(answers, dim=2), 2, order)
    known = [looked for looked in weights if looked is not None]
    return answer, _in_order(torch.cat(known, dim=1), 1, order) if known else None


def by_head(mask: Any) -> bool:
    """Return True if a mask differs from head to head."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1
