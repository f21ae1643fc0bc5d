"""A cache on disk: one safetensors file with what is held, and the settings, lengths and identities to go on with it.

Nothing is decoded: what is packed stays packed, so the file is about as large as the cache. With `compress`
the bytes of each tensor are deflated where that makes them fewer; "deflated" in the description has its type and shape.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .calibration.calibration import identity
from .errors import UseError
from .files import read_tensors, write_tensors
from .packed import Packed
from .types import Channels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cache import KVStack
    from .store.store import Store

__all__ = ["read", "write"]

FORMAT = "kvstack cache 1"


class _Writer:
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


def write(stack: KVStack, path: str | os.PathLike[str], compress: bool = False) -> None:
    writer, model = _Writer(compress), stack._model
    assert model is not None
    described = {
        "stack": stack.to_dict(),
        "model": identity(model),
        "dtype": str(model.dtype),
        "batch": stack._batch,
        "columns": list(stack._columns.items()),
        "shapes": [[layer, *shape] for layer, shape in stack._shapes.items()],
        "scaling": list(stack._scaling.items()),
        "direct": sorted(stack._direct),
        "shares": list(stack._shares.items()),
        "cohorts": [
            {
                "rows": None if cohort.rows is None else cohort.rows.tolist(),
                "seen": cohort.seen,
                "stores": [_describe(store, writer) for store in cohort.stores],
            }
            for cohort in stack._cohorts
        ],
        "others": [_describe_layer(layer, writer) for layer in stack._others()],
    }
    described["deflated"] = writer.deflated
    write_tensors(Path(path), writer.tensors, {"format": FORMAT, "cache": json.dumps(described)})


def _describe(store: Store, writer: _Writer) -> dict[str, Any]:
    put = writer.put
    return {
        "raw": [[put(buffer.view) if buffer.tensors else None for buffer in buffers] for buffers in store.raw],
        "sealed": [
            {
                "slot": slot,
                "role": role,
                "parts": {name: put(part) for name, part in packed.parts.items()},
                "tokens": packed.tokens,
                "width": packed.width,
                "exact": packed.exact,
                "dtype": str(packed.dtype).removeprefix("torch."),
                "channels": packed.channels and [put(packed.channels.energy), put(packed.channels.bits)],
            }
            for (slot, role), packed in store.sealed.items()
        ],
        "sealed_tokens": store.sealed_tokens,
        "bases": [{name: put(x) for name, x in stage.fitted.items()} for stage in store.transforms.values()],
        "kept": put(store.kept),
        "memory": [{name: put(x) for name, x in memory.items()} for memory in store.memory],
        "recent": [put(x) for x in store.recent],
        "fitted": _fitted(store),
    }


def _fitted(store: Store) -> list[str]:
    """Marks of what the transform was fitted to: latents mean nothing on other axes."""
    return [transform.mark for transform in store.transforms.values()]


def _describe_layer(layer: Any, writer: _Writer) -> dict[str, Any]:
    """All that a layer of transformers holds, in JSON with tensors by name."""
    known = {name: x for name, x in vars(layer).items() if not isinstance(x, (torch.dtype, torch.device))}
    return {name: _described(x, writer, f"{type(layer).__name__}.{name}") for name, x in known.items()}


def _described(x: Any, writer: _Writer, where: str) -> Any:
    if isinstance(x, Tensor):
        return {"tensor": writer.put(x), "device": str(x.device)}
    if isinstance(x, Mapping):
        return {"items": [[key, _described(value, writer, where)] for key, value in x.items()]}
    if isinstance(x, (list, tuple)):
        return [_described(value, writer, where) for value in x]
    if isinstance(x, (bool, int, float, str, type(None))):
        return x
    raise UseError(f"{where} is a {type(x).__name__}, which cannot be saved: this model's cache stays in memory.")


def _restored(x: Any, get: Any) -> Any:
    if isinstance(x, dict) and "tensor" in x:
        return get(x["tensor"], torch.device(x["device"]))
    if isinstance(x, dict):
        return {key: _restored(value, get) for key, value in x["items"]}
    return [_restored(value, get) for value in x] if isinstance(x, list) else x


def check(described: Mapping[str, Any], model: PreTrainedModel, name: str) -> None:
    """Refuse another model before anything is fitted to it."""
    kind = type(model).__name__
    if described["model"] != identity(model):
        raise UseError(f"{name!r} was saved with another model than this {kind}. Load it with that.")
    if described["dtype"] != str(model.dtype):
        raise UseError(f"{name!r} was saved with a model in {described['dtype']}, and this one is in {model.dtype}.")


def read(stack: KVStack, described: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Fill an empty, bound stack."""
    model = stack._model
    assert model is not None

    def get(key: str | None, device: torch.device) -> Tensor | None:
        return None if key is None else tensors[key].to(device)

    if dict(described.get("shares", [])) != stack._shares:
        raise UseError(
            f"{name!r} was saved where other layers shared keys and values than {stack!r} lets share here. Keep what "
            "it was made with beside the cache."
        )
    stack._batch = described["batch"]
    stack._columns = dict(described["columns"])
    stack._shapes = {layer: (numbers, size) for layer, numbers, size in described["shapes"]}
    stack._scaling = dict(described["scaling"])
    stack._direct = set(described["direct"])
    cohorts = []
    for entry in described["cohorts"]:
        cohort = stack._new_cohort()
        cohort.rows = None if entry["rows"] is None else torch.tensor(entry["rows"])
        cohort.seen = entry["seen"]
        for store, held in zip(cohort.stores, entry["stores"], strict=True):
            if held["fitted"] != _fitted(store):
                transform = store.plan.transform
                raise UseError(
                    f"{name!r} was saved with another calibration than {transform!r} has here. "
                    f"Keep the calibration with the cache: {type(transform).__name__}(calibration=PATH)."
                )
            _fill(store, held, [stack._device_of(layer) for layer in store.layers], get)
        cohorts.append(cohort)
    stack._cohorts = cohorts
    for layer, held in zip(stack._others(), described["others"], strict=True):
        for key, value in held.items():
            setattr(layer, key, _restored(value, get))


def _fill(store: Store, held: Mapping[str, Any], devices: list[torch.device], get: Any) -> None:
    for buffers, names, device in zip(store.raw, held["raw"], devices, strict=True):
        for buffer, key in zip(buffers, names, strict=True):
            if key is not None:
                buffer.replace(get(key, device))
    for entry in held["sealed"]:
        device = devices[entry["slot"]]
        known = entry["channels"]
        store.sealed[entry["slot"], entry["role"]] = Packed(
            {name: get(key, device) for name, key in entry["parts"].items()},
            tokens=entry["tokens"],
            width=entry["width"],
            exact=entry["exact"],
            dtype=getattr(torch, entry["dtype"]),
            channels=known and Channels(*(get(key, device) for key in known)),
        )
    store.sealed_tokens = held["sealed_tokens"]
    fitted = held.get("bases") or [{}] * len(store.transforms)
    for (start, stage), bases in zip(list(store.transforms.items()), fitted, strict=True):
        if bases:
            store.transforms[start] = stage.hold({name: get(key, devices[start]) for name, key in bases.items()})
    store.kept = get(held["kept"], devices[0])
    store.memory = [
        {name: get(key, d) for name, key in m.items()} for m, d in zip(held["memory"], devices, strict=True)
    ]
    store.recent = [get(key, device) for key, device in zip(held["recent"], devices, strict=True)]


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a saved cache."""
    again = "Save it again."
    metadata, tensors = read_tensors(Path(path), UseError, "cache", again)
    if metadata.get("format") != FORMAT:
        raise UseError(f"{os.fspath(path)!r} is no cache of this version of kvstack. {again}")
    described = json.loads(metadata["cache"])
    for key, (dtype, shape) in described.get("deflated", {}).items():
        tensors[key] = _inflated(tensors[key], dtype, shape)
    return described, tensors
