"""Bytes: what the tensors of a stack hold, their whole storages, and who pays for them. Never a formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .batch import Batch
from .packed import storage_bytes
from .report import Part
from .store.store import Store
from .workspace import Workspace

__all__ = ["dense_bytes", "model_bytes", "parts", "tensors", "tensors_in"]

STACK = "stack"
"""Who pays for what no stage asked for."""


def tensors_in(thing: Any) -> list[Tensor]:
    """All tensors in nested mappings, lists and tuples."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, Mapping):
        return [x for value in thing.values() for x in tensors_in(value)]
    if isinstance(thing, list | tuple):
        return [x for value in thing for x in tensors_in(value)]
    return []


def tensors(batch: Batch, others: Sequence[Any]) -> list[Tensor]:
    """All tensors held for the tokens of a batch; `others` are the layers that transformers caches itself."""
    held = [x for store in batch.stores for track in store.tracks() for _, x in track.parts()]
    return held + [x for other in others for x in tensors_in(vars(other))]


def parts(batch: Batch, others: Sequence[Any], work: Workspace) -> list[Part]:
    """Bytes by payer and part, those of equal name added up, none of them empty."""
    sums: dict[tuple[str, str], int] = {}
    for payer, name, nbytes in _spent(batch.stores, others, work):
        sums[payer, name] = sums.get((payer, name), 0) + nbytes
    return [Part(payer, name, nbytes) for (payer, name), nbytes in sums.items() if nbytes]


def _spent(stores: Sequence[Store], others: Iterable[Any], work: Workspace) -> Iterator[tuple[str, str, int]]:
    for store in stores:
        for raw in store.raw:
            yield from ((STACK, name, nbytes) for name, nbytes in raw.spent(store.sinks, store.plan.window))
    for store in stores:
        for part in store.sealed:
            yield from ((repr(payer), name, storage_bytes([x])) for payer, name, x in part.paid_parts())
        for track in (store.kept_positions, *store.memory, *store.queries):
            yield from ((repr(store.plan.evict), name, storage_bytes([x])) for name, x in track.parts())
    for other in others:
        yield from (("model", "uncompressed layers", storage_bytes([x])) for x in tensors_in(vars(other)))
    yield STACK, "scratch", storage_bytes(work.tensors())


def model_bytes(batch: Batch) -> int:
    """Bytes of what stages fitted to the model: held once for all its caches."""
    codecs = batch.binding.plan.codecs
    encoders = [encoder for codec in codecs for encoder in codec.encoders.values()]
    return storage_bytes([x for thing in (*codecs, *encoders) for x in thing.tensors])


def dense_bytes(batch: Batch, others: Sequence[Any]) -> int:
    """Bytes a dense cache of the same seen tokens holds, in the model's own dtype."""
    rows = batch.size or 0
    dense = sum(rows * batch.columns[i] * numbers * size for i, (numbers, size) in batch.shapes.items())
    return dense + storage_bytes([x for other in others for x in tensors_in(vars(other))])
