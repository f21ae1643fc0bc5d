"""One layer whose kv heads keep different numbers of tokens: a store for every few heads that keep equally many.

    head 0    sinks | ........ | window        piece (0, 2): two heads, one store
    head 1    sinks | .. | window              piece (1,)
    head 2    sinks | ........ | window

Each piece is scored, dropped, sealed and read by itself, so nothing is padded and all bytes are true. Attention asks
one piece after the other. Where all heads hold everything, they can be read as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UseError
from ..types import KV
from ..workspace import Workspace
from .given import Given
from .plan import Plan
from .store import Store

__all__ = ["SplitStore", "heads_of"]


def heads_of(x: Tensor, places: Sequence[int] | None) -> Tensor:
    """The kv heads at `places` of `x` (B, H, ...); None: all of them."""
    return x if places is None else x[:, list(places)]


def _only(kv: KV, places: Sequence[int] | None) -> KV:
    return KV(heads_of(kv.keys, places), heads_of(kv.values, places))


class SplitStore:
    """Tokens of one layer, as a `Store` holds them.

    Args:
        pieces: stores of this layer, and the places of their kv heads.
    """

    def __init__(self, plan: Plan, layer: int, pieces: Sequence[tuple[tuple[int, ...], Store]]) -> None:
        self.plan, self.layers = plan, [layer]
        self.pieces: list[tuple[tuple[int, ...] | None, Store]] = list(pieces)
        order = [head for heads, _ in pieces for head in heads]
        self._order = sorted(
            range(len(order)), key=order.__getitem__
        )  # of the heads, in all pieces one after the other

    @property
    def _stores(self) -> list[Store]:
        return [store for _, store in self.pieces]

    # ---- lengths and positions

    @property
    def dirty(self) -> bool:
        return any(store.dirty for store in self._stores)

    @property
    def held(self) -> int:
        """Tokens of the heads that hold most."""
        return max(store.held for store in self._stores)

    @property
    def mean_held(self) -> float:
        return sum(len(heads or ()) * store.held for heads, store in self.pieces) / len(self._order)

    def tokens_in(self, slot: int) -> int:
        return max(store.tokens_in(slot) for store in self._stores)

    def sample(self, slot: int) -> KV | None:
        samples = [store.sample(slot) for store in self._stores]
        # after a deep crop, some heads may hold nothing
        few = [KV(kv.keys[:, :, :0], kv.values[:, :, :0]) for kv in samples if kv is not None]
        return self._joined(few) if len(few) == len(samples) else None

    def positions(self, seen: int) -> Tensor:
        """(B or 1, H, held), ascending.

        Raises:
            UseError: heads hold different numbers of tokens.
        """
        self._check_even()
        each = [store.positions(seen) for store in self._stores]
        rows = max(len(positions) for positions in each)
        heads = [len(places or ()) for places, _ in self.pieces]
        whole = [x.expand(rows, n, -1) for x, n in zip(each, heads, strict=True)]
        return torch.cat(whole, dim=1)[:, self._order]

    # ---- a forward

    def append(self, slot: int, kv: KV) -> None:
        for heads, store in self.pieces:
            store.append(slot, _only(kv, heads))

    def remember(self, slot: int, queries: Tensor, seen: int, may_be_cropped: bool) -> None:
        for store, own in self._each(queries):
            store.remember(slot, own, seen, may_be_cropped)

    def hear(self, slot: int, queries: Tensor, seen: int, scaling: float, work: Workspace) -> None:
        for store, own in self._each(queries):
            store.hear(slot, own, seen, scaling, work)

    def _each(self, queries: Tensor) -> Iterator[tuple[Store, Tensor]]:
        """Each store with its part of the queries (B, H*G, Q, D)."""
        grouped = queries.unflatten(1, (len(self._order), -1))  # (B, H, G, Q, D)
        return ((store, heads_of(grouped, heads).flatten(1, 2)) for heads, store in self.pieces)

    def mix_heads(self) -> None:
        raise UseError(
            f"attention of layer {self.layers[0]} makes something else of the keys and values that it caches, across "
            f"kv heads, and {self.plan.select!r} lets heads keep different numbers of tokens. Use "
            'budgets="layers" or budgets="equal".'
        )

    def settle(self, seen: int, new: int, scalings: Sequence[float], work: Workspace) -> None:
        for store in self._stores:
            if store.dirty:
                store.settle(seen, new, scalings, work)

    # ---- reading

    def read(self, slot: int, seen: int, work: Workspace) -> KV:
        """All held tokens in position order: (B, H, held, D), copied.

        Raises:
            UseError: heads hold different numbers of tokens.
        """
        self._check_even()
        return self._joined([store.read(slot, seen, Workspace()) for store in self._stores])

    def _joined(self, each: Sequence[KV]) -> KV:
        keys, values = (torch.cat([getattr(kv, name) for kv in each], dim=1) for name in ("keys", "values"))
        return KV(keys[:, self._order], values[:, self._order])

    def _check_even(self) -> None:
        if len(lengths := {store.held for store in self._stores}) > 1:
            raise UseError(
                f"kv heads of layer {self.layers[0]} hold {min(lengths)} to {max(lengths)} tokens, which no one tensor "
                "can. Read them one by one: KVStack.read(layer, row, head), and positions(layer, row, head)."
            )

    def piece_of(self, head: int) -> tuple[Store, int]:
        """The store that holds a head, and the head's place there."""
        return next((store, heads.index(head)) for heads, store in self.pieces if heads and head in heads)

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def end_forward(self) -> None:
        for store in self._stores:
            store.end_forward()

    # ---- rows

    def rows(self, index: Tensor) -> SplitStore:
        """The batch rows at `index`; nothing is shared with this one."""
        pieces = [(heads or (), store.rows(index)) for heads, store in self.pieces]
        return SplitStore(self.plan, self.layers[0], pieces)

    def fork(self) -> SplitStore:
        """A store of the same tokens, in the same memory as long as neither changes it."""
        pieces = [(heads or (), store.fork()) for heads, store in self.pieces]
        return SplitStore(self.plan, self.layers[0], pieces)

    @property
    def given(self) -> Given:
        return self._stores[0].given

    @given.setter
    def given(self, given: Given) -> None:
        for store in self._stores:
            store.given = given
