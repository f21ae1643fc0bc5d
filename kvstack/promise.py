"""The results of `update`: the plain tensors of a dense cache if there are such, and lazy ones otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .batch import Batch, Cohort
from .lazy import Lazy, refusing_gradient
from .store.split import SplitStore
from .store.store import Store
from .types import KV
from .workspace import Workspace

__all__ = ["Promise", "Promises"]


@dataclass
class Promise:
    """The result of one layer's `update`.

    Attributes:
        layer: whose keys and values they are.
        kv: the returned keys and values.
        whole: these are the plain tensors that a dense cache would have returned.
        attached: the new keys and values, where gradients may be asked for.
    """

    layer: int
    kv: KV
    whole: bool
    attached: KV | None

    def holds(self, key: Tensor, value: Tensor) -> bool:
        """Return True if attention was called with these tensors, or with those that these were decoded to."""
        return self.holds_keys(key) and _same(value, self.kv.values)

    def holds_keys(self, key: Tensor) -> bool:
        return _same(key, self.kv.keys)


def _same(x: Tensor, promised: Tensor) -> bool:
    return x is promised or (isinstance(promised, Lazy) and promised.is_decoded_as(x))


class Promises:
    """The promises to the layers of the running forward.

    Args:
        label: the stack, as messages name it.
    """

    def __init__(self, label: str, batch: Batch) -> None:
        self.label, self.batch = label, batch
        self._made: dict[int, Promise] = {}
        self._attached: dict[int, KV | None] = {}

    def of(self, layer: int) -> Promise | None:
        return self._made.get(layer)

    def held_by(self, layer: int, key: Tensor, value: Tensor) -> Promise | None:
        """The promise that attention of `layer` was called with: its own, or that of an earlier layer."""
        own = self._made.get(layer)
        if own is not None and own.holds(key, value):
            return own
        return next((promise for promise in self._made.values() if promise.holds(key, value)), None)

    def kept(self, layer: int) -> None:
        """Attention of a layer is over, and nobody else will ask: its tensors may go."""
        self._made.pop(layer, None)

    def forget(self) -> None:
        """The forward is over."""
        self.batch.attached |= any(attached is not None for attached in self._attached.values())
        self._made, self._attached = {}, {}

    def make(self, layer: int, new: KV, ours: bool) -> Promise:
        """For the `new` keys and values of a layer, which are stored by now. `ours`: our attention will ask."""
        promise = self._made[layer] = self._promise(layer, new, ours)
        return promise

    def _promise(self, layer: int, new: KV, ours: bool) -> Promise:
        batch = self.batch
        group, slot = batch.binding.places[layer]
        attached = new if torch.is_grad_enabled() and (new.keys.requires_grad or new.values.requires_grad) else None
        if layer in batch.binding.shares:
            attached = self._attached[batch.binding.shares[layer]]
        self._attached[layer] = attached
        stores = [cohort.stores[group] for cohort in batch.cohorts]
        store, dense = stores[0], batch.columns[layer]
        if len(stores) == 1 and isinstance(store, SplitStore) and new.keys.shape[2] == dense:
            return Promise(layer, new, True, attached)  # all that was seen is of this forward
        if len(stores) == 1 and isinstance(store, Store) and store.held == dense and not store.sealed_tokens:
            # views: they stay right for whoever holds on to them until the forward ends
            kv = self.attach(store.read(slot, dense, batch.work), batch.cohorts[0], attached)
            return Promise(layer, kv, True, attached)
        promise = Promise(layer, new, False, attached)
        lay = partial(self._laid_out, promise)
        if not ours:  # nobody will ask: hand it out as it is
            promise.kv = lay()
            return promise
        rows, heads, width = new.keys.shape[0], new.keys.shape[1], self._width(group, dense)
        raw = store.sample(slot) or new
        decoded: list[KV] = []

        def part(name: str) -> Tensor:
            if not decoded:
                decoded.append(lay())
            return getattr(decoded[0], name)

        promise.kv = KV(
            *(
                Lazy((rows, heads, width, x.shape[-1]), like, partial(part, name))
                for name, x, like in (("keys", new.keys, raw.keys), ("values", new.values, raw.values))
            )
        )
        return promise

    def _width(self, group: int, dense: int) -> int:
        """Tokens in one tensor for all rows: as a dense cache has them, padding included, or what is left of them."""
        held = [(cohort.stores[group].held, cohort.seen) for cohort in self.batch.cohorts]
        return dense if all(n == seen for n, seen in held) else max(n for n, _ in held)

    def _laid_out(self, promise: Promise) -> KV:
        """All that a layer holds, decoded, in one tensor for all rows: every token in its column where nothing was
        evicted, at the right end otherwise. Padding is zero."""
        batch = self.batch
        group, slot = batch.binding.places[promise.layer]
        dense, new = batch.columns[promise.layer], promise.attached or promise.kv
        width = self._width(group, dense)
        first = batch.cohorts[0]
        if len(batch.cohorts) == 1 and first.stores[group].held == width:
            kv = self.attach(first.stores[group].read(slot, first.seen, Workspace()), first, promise.attached)
            return KV(kv.keys, kv.values)
        whole = None
        for cohort in batch.cohorts:
            store = cohort.stores[group]
            if not store.held:
                continue
            kv = self.attach(store.read(slot, cohort.seen, batch.work), cohort, promise.attached)
            device = kv.keys.device
            if whole is None:
                shapes = [(batch.size or 0, x.shape[1], width, x.shape[3]) for x in (kv.keys, kv.values)]
                whole = KV(kv.keys.new_zeros(shapes[0]), kv.values.new_zeros(shapes[1]))
            at = torch.arange(width - store.held, width, device=device)
            if width == dense:
                at = cohort.columns.of(cohort.seen, device)
            rows = torch.arange(batch.size or 0) if cohort.rows is None else cohort.rows
            where = rows.to(device)[:, None]
            whole.keys[where, :, at] = kv.keys.transpose(1, 2)
            whole.values[where, :, at] = kv.values.transpose(1, 2)
        return whole or KV(*(x.new_zeros(*x.shape[:2], width, x.shape[3]) for x in (new.keys, new.values)))

    def attach(self, kv: KV, cohort: Cohort, attached: KV | None) -> KV:
        """Return `kv`, as it was read, with the new tokens as the model made them, so that gradients reach them."""
        refuses = self.batch.attached and torch.is_grad_enabled()
        if not cohort.new or (attached is None and not refuses):
            return kv
        whole = []
        for name in ("keys", "values"):
            read: Tensor = getattr(kv, name)
            past, fresh = read.tensor_split([read.shape[2] - cohort.new], dim=2)
            if attached is not None:
                fresh = cohort.its(getattr(attached, name))
            if past.shape[2] and refuses:
                past = refusing_gradient(
                    past,
                    f"{self.label} keeps no gradients of earlier forwards, and this text was read in several with "
                    "gradients on. Read it in one forward, read what needs no gradient under torch.no_grad(), or use "
                    "a DynamicCache.",
                )
            # a copy: what was read is scratch memory, and the backward pass comes later
            whole.append(torch.cat([past, fresh.to(read.dtype)], dim=2))
        return KV(*whole)
