"""A cache on disk: one safetensors file with what is held, and the settings, lengths and fingerprints to go on with it.

Nothing is decoded: what is packed stays packed, so the file is about as large as the cache. With `compress`
the bytes of each tensor are deflated where that makes them fewer; "deflated" in the description has its type and shape.

    description    stack, model, dtype, batch, columns, shapes, scaling, direct, shares
                   cohorts: rows, seen, columns, given (positions, where not the tokens' indices), stores: one entry
                   per track of the store, "sealed" by (slot, role)
                   others:  layers that transformers caches
    tensors        by number; the description holds the numbers in their place
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attend import Learned
from .batch import Batch, Cohort
from .columns import Columns
from .errors import UseError
from .files import read_tensors, write_tensors
from .model.fingerprint import fingerprint
from .store.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Saved", "Writer", "describe_layer", "load", "restored", "write"]

FORMAT = "kvstack cache 1"


class Writer:
    """Collects tensors under short names; a description holds the names in their place."""

    def __init__(self, compress: bool = False) -> None:
        self.compress = compress
        self.tensors: dict[str, Tensor] = {}
        self.deflated: dict[str, tuple[str, list[int]]] = {}
        self._known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}

    def put(self, x: Tensor | None) -> str | None:
        if x is None:
            return None
        key = (x.data_ptr(), tuple(x.shape), x.stride())  # what several share is written once
        if key not in self._known or not x.numel():
            name = self._known[key] = str(len(self.tensors))
            self.tensors[name] = x.contiguous()
            if self.compress:
                self._deflate(name)
        return self._known[key]

    def _deflate(self, name: str) -> None:
        x = self.tensors[name]
        plain = x.cpu().flatten().view(torch.uint8).numpy()
        smaller = zlib.compress(plain.data, 9)
        if len(smaller) < plain.nbytes:
            self.tensors[name] = torch.frombuffer(bytearray(smaller), dtype=torch.uint8)
            self.deflated[name] = str(x.dtype).removeprefix("torch."), list(x.shape)


def _inflated(x: Tensor, dtype: str, shape: list[int]) -> Tensor:
    plain = torch.frombuffer(bytearray(zlib.decompress(x.numpy().data)), dtype=torch.uint8)
    return plain.view(getattr(torch, dtype)).view(shape)


def write(
    path: str | os.PathLike[str],
    stack: Mapping[str, Any],
    batch: Batch,
    learned: Learned,
    others: Sequence[Any],
    compress: bool = False,
) -> None:
    """Write a batch whose forwards are all settled; `stack` is the dict that builds the stack again."""
    writer, binding = Writer(compress), batch.binding
    assert binding.model is not None
    described = {
        "stack": stack,
        "model": fingerprint(binding.model),
        "dtype": str(binding.model.dtype),
        "batch": batch.size,
        "columns": list(batch.columns.items()),
        "shapes": [[layer, *shape] for layer, shape in batch.shapes.items()],
        "scaling": list(learned.scaling.items()),
        "direct": sorted(learned.direct),
        "shares": list(binding.shares.items()),
        "cohorts": [
            {
                "rows": None if cohort.rows is None else cohort.rows.tolist(),
                "seen": cohort.seen,
                "columns": cohort.columns.runs,
                "given": writer.put(cohort.given.told),
                "stores": [_describe_store(store, writer) for store in cohort.stores],
            }
            for cohort in batch.cohorts
        ],
        "others": [describe_layer(layer, writer) for layer in others],
    }
    described["deflated"] = writer.deflated
    write_tensors(Path(path), writer.tensors, {"format": FORMAT, "cache": json.dumps(described)})


def _describe_store(store: Store, writer: Writer) -> dict[str, Any]:
    """The state of all tracks; sealed tokens in one list, each entry with its slot."""
    state: dict[str, Any] = store.state(writer.put)
    parts, size = state.pop("sealed"), store.plan.stored_together
    (state["kept"],) = state.pop("kept")
    return state | {
        "sealed": [{"slot": i * size} | entry for i, part in enumerate(parts) for entry in part["codes"]],
        "sealed_tokens": store.sealed_tokens,
        "bases": [part["bases"] for part in parts if "bases" in part],
        "fitted": _fitted(store),
    }


def _fitted(store: Store) -> list[str]:
    """What the transform was fitted to: latents mean nothing on other axes."""
    return [codec.fingerprint for codec in store.codecs]


def describe_layer(layer: Any, writer: Writer) -> dict[str, Any]:
    """All that a layer of transformers holds, in JSON with tensors by name."""
    known = {name: x for name, x in vars(layer).items() if not isinstance(x, (torch.dtype, torch.device))}
    return {name: _described(x, writer, f"{type(layer).__name__}.{name}") for name, x in known.items()}


def _described(x: Any, writer: Writer, where: str) -> Any:
    if isinstance(x, Tensor):
        return {"tensor": writer.put(x), "device": str(x.device)}
    if isinstance(x, Mapping):
        return {"items": [[key, _described(value, writer, where)] for key, value in x.items()]}
    if isinstance(x, (list, tuple)):
        return [_described(value, writer, where) for value in x]
    if isinstance(x, (bool, int, float, str, type(None))):
        return x
    raise UseError(f"{where} is a {type(x).__name__}, which cannot be saved: this model's cache stays in memory.")


def restored(x: Any, get: Any) -> Any:
    if isinstance(x, dict) and "tensor" in x:
        return get(x["tensor"], torch.device(x["device"]))
    if isinstance(x, dict):
        return {key: restored(value, get) for key, value in x["items"]}
    return [restored(value, get) for value in x] if isinstance(x, list) else x


@dataclass(frozen=True)
class Saved:
    """A file that was read.

    Attributes:
        name: the file, as messages name it.
        described: its description; tensors: by the names in it.
    """

    name: str
    described: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def stack(self) -> dict[str, Any]:
        """The dict that builds the stack."""
        stack: dict[str, Any] = self.described["stack"]
        return stack

    def check(self, model: PreTrainedModel) -> None:
        """Refuse another model before anything is fitted to it."""
        kind, described = type(model).__name__, self.described
        if described["model"] != fingerprint(model):
            raise UseError(f"{self.name!r} was saved with another model than this {kind}. Load it with that.")
        if described["dtype"] != str(model.dtype):
            raise UseError(
                f"{self.name!r} was saved with a model in {described['dtype']}, and this one is in {model.dtype}."
            )

    def fill(self, label: str, batch: Batch, learned: Learned, others: Sequence[Any]) -> None:
        """Fill the empty batch of the stack `label`, and the layers that transformers caches."""
        described, binding = self.described, batch.binding
        if dict(described.get("shares", [])) != dict(binding.shares):
            raise UseError(
                f"{self.name!r} was saved where other layers shared keys and values than {label} lets share here. Keep "
                "what it was made with beside the cache."
            )
        batch.size = described["batch"]
        batch.columns = dict(described["columns"])
        batch.shapes = {layer: (numbers, size) for layer, numbers, size in described["shapes"]}
        learned.scaling, learned.direct = dict(described["scaling"]), set(described["direct"])
        cohorts = []
        for entry in described["cohorts"]:
            rows = None if entry["rows"] is None else torch.tensor(entry["rows"])
            # files of 0.1 knew of padding on the left only
            runs = entry.get("columns", [[0, max(batch.columns.values(), default=0) - entry["seen"]]])
            columns = Columns(tuple((token, column) for token, column in runs))
            cohort = Cohort(rows, binding.stores(), entry["seen"], columns)
            cohort.given.restore(self._told(entry))
            for store, state in zip(cohort.stores, entry["stores"], strict=True):
                self._fill_store(store, state, [binding.device_of(layer) for layer in store.layers])
            cohorts.append(cohort)
        batch.cohorts = cohorts
        for layer, held in zip(others, described["others"], strict=True):
            for key, value in held.items():
                setattr(layer, key, restored(value, self._get))

    def _told(self, entry: Mapping[str, Any]) -> Tensor | None:
        """The positions that the rows of a cohort were given; files of earlier versions have none."""
        told = self._get(entry.get("given"), torch.device("cpu"))
        rows = self.described["batch"] if entry["rows"] is None else len(entry["rows"])
        if told is not None and (
            told.dtype != torch.int32 or told.dim() != 3 or (told.shape[0], told.shape[2]) != (rows, entry["seen"])
        ):
            raise UseError(f"{self.name!r} is damaged: its positions are not those of its tokens. Save it again.")
        return told

    def _fill_store(self, store: Store, state: Mapping[str, Any], devices: Sequence[torch.device]) -> None:
        stage = store.plan.transform.stage if store.plan.transform else None
        if state["fitted"] != _fitted(store):
            raise UseError(
                f"{self.name!r} was saved with another calibration than {stage!r} has here. "
                f"Keep the calibration with the cache: {type(stage).__name__}(calibration=PATH)."
            )
        size = store.plan.stored_together
        bases = state.get("bases") or [{}] * len(store.codecs)
        parts: list[dict[str, Any]] = [
            {"codes": [], "bases": bases[i] if bases else {}} for i in range(len(store.sealed))
        ]
        for entry in state["sealed"]:
            parts[entry["slot"] // size]["codes"].append(entry)
        tracks = {**state, "sealed": parts, "kept": [state["kept"]]}
        gets = [partial(self._get, device=device) for device in devices]
        store.restore(tracks, state["sealed_tokens"], gets)

    def _get(self, key: str | None, device: torch.device) -> Tensor | None:
        return None if key is None else self.tensors[key].to(device)


def load(path: str | os.PathLike[str]) -> Saved:
    """Read a file that `write` wrote."""
    again = "Save it again."
    metadata, tensors = read_tensors(Path(path), UseError, "cache", again)
    if metadata.get("format") != FORMAT:
        raise UseError(f"{os.fspath(path)!r} is no cache of this version of kvstack. {again}")
    described = json.loads(metadata["cache"])
    for key, (dtype, shape) in described.get("deflated", {}).items():
        tensors[key] = _inflated(tensors[key], dtype, shape)
    return Saved(os.fspath(path), described, tensors)
