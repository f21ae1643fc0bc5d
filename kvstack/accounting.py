"""Bytes: what the tensors of a stack hold, their whole storages, and who pays for them. Never a formula."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .batch import Batch
from .packed import storage_bytes
from .report import Part
from .workspace import Workspace

__all__ = ["dense_bytes", "devices", "held", "model_bytes", "parts", "tensors_in"]

STACK = "stack"
"""Who pays for what no stage asked for."""
RAW = (STACK, "raw")


def tensors_in(thing: Any) -> list[Tensor]:
    """All tensors in nested mappings, lists and tuples."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, Mapping):
        return [x for value in thing.values() for x in tensors_in(value)]
    if isinstance(thing, list | tuple):
        return [x for value in thing for x in tensors_in(value)]
    return []


def held(batch: Batch, others: Sequence[Any]) -> Iterator[tuple[str, str, Tensor]]:
    """Every tensor held for the tokens of a batch, behind who pays for it and what it is; `others` are the layers that
    transformers caches itself."""
    for cohort in batch.cohorts:
        yield from ((STACK, name, x) for name, x in cohort.given.parts())
    if batch.text is not None:  # until assisted decoding has verified them
        yield from ((repr(batch.binding.plan.select), "tokens to read again", x) for x in batch.text.tensors)
    if batch.ids.sums is not None:
        yield STACK, "text hash", batch.ids.sums
    for store in batch.stores:
        for raw in store.raw:
            yield from ((STACK, name, x) for name, x in raw.parts())
        for part in store.sealed:
            yield from ((repr(payer), name, x) for payer, name, x in part.paid_parts())
        for track in (store.kept_positions, *store.memory, *store.queries, *store.biases, *store.references):
            yield from ((repr(store.plan.select), name, x) for name, x in track.parts())
    for other in others:
        yield from (("model", "uncompressed layers", x) for x in tensors_in(vars(other)))


def parts(batch: Batch, others: Sequence[Any], work: Workspace) -> list[Part]:
    """Bytes by payer and part, those of equal name added up, none of them empty. Raw tokens are told apart by why they
    are raw."""
    spent = [
        (STACK, name, nbytes)
        for store in batch.stores
        for raw in store.raw
        for name, nbytes in raw.spent(store.sinks, store.plan.window)
    ]
    rest = [(payer, name, storage_bytes([x])) for payer, name, x in held(batch, others) if (payer, name) != RAW]
    sums: dict[tuple[str, str], int] = {}
    for payer, name, nbytes in (*spent, *rest, (STACK, "scratch", storage_bytes(work.tensors()))):
        sums[payer, name] = sums.get((payer, name), 0) + nbytes
    return [Part(payer, name, nbytes) for (payer, name), nbytes in sums.items() if nbytes]


def devices(tensors: Sequence[Tensor]) -> dict[str, int]:
    """Bytes on each device."""
    places = sorted({str(x.device) for x in tensors})
    return {place: storage_bytes([x for x in tensors if str(x.device) == place]) for place in places}


def model_bytes(batch: Batch) -> int:
    """Bytes of what stages fitted to the model: held once for all its caches."""
    codecs, ranking = batch.binding.plan.codecs, batch.binding.plan.ranking
    fitted = [x for codec in codecs for x in codec.tensors]
    fitted += getattr(ranking, "tensors", ())  # a score may be any object
    encoders = [own for codec in codecs for own in codec.encoders.values()]
    encoders += [own for codec in codecs for lower in codec.lower.values() for own in lower]
    return storage_bytes(fitted + [x for own in encoders for x in own.tensors])


def dense_bytes(batch: Batch, others: Sequence[Any]) -> int:
    """Bytes a dense cache of the same seen tokens holds, in the model's own dtype."""
    rows = batch.size or 0
    dense = sum(rows * batch.columns[i] * numbers * size for i, (numbers, size) in batch.shapes.items())
    return dense + storage_bytes([x for other in others for x in tensors_in(vars(other))])
