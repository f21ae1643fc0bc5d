"""LMCache's serializer interface around `ChunkCodec` (`lmcache.v1.distributed.serde`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer

from .codec import ChunkCodec, ChunkError

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.serde import SerdeProcessor
    from lmcache.v1.memory_management import MemoryObj

__all__ = ["NAME", "KVStackDeserializer", "KVStackSerializer", "create"]

NAME = "kvstack"
SETTINGS = ("stack", "model", "head_dim", "world_size", "sinks", "chunk", "max_workers", "dtype")


class KVStackSerializer(Serializer):
    """Chunks to bytes."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Pack `src` into the byte buffer `dst`. Returns the bytes written."""
        chunk, buffer = _tensor(src, "src"), _tensor(dst, "dst").view(-1).view(torch.uint8)
        data = self.codec.encode(chunk, _start(src), _rank(key))
        if len(data) > len(buffer):
            raise ChunkError(f"a chunk takes {len(data)} bytes, and the buffer has {len(buffer)}.")
        buffer[: len(data)].copy_(data)
        return len(data)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Bytes that a chunk of this layout takes."""
        if len(layout_desc.shapes) != 1:
            raise ChunkError(f"a chunk of {len(layout_desc.shapes)} tensors: kvstack packs chunks of one.")
        return self.codec.nbytes(layout_desc.shapes[0], layout_desc.dtypes[0])


class KVStackDeserializer(Deserializer):
    """Bytes to chunks."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Unpack the byte buffer `src` into `dst`."""
        into = _tensor(dst, "dst")
        into.copy_(self.codec.decode(_tensor(src, "src").view(-1).view(torch.uint8), into.shape, into.dtype))


def create(kwargs: dict[str, object]) -> SerdeProcessor:
    """Make what `{"serde": {"type": "kvstack", ...}}` of an adapter asks for.

    `stack`, `head_dim`, `world_size`, `sinks` and `chunk` are those of `ChunkCodec`; `model` is a folder or a name, in
    `dtype` (default bfloat16), and is dropped when the codec is fitted; `max_workers` threads pack and unpack.
    """
    unknown = sorted(set(kwargs) - set(SETTINGS))
    if unknown:
        raise ChunkError(f"the serializer kvstack has no setting {', '.join(unknown)}. It has {', '.join(SETTINGS)}.")
    settings: dict[str, Any] = dict(kwargs)
    workers, name = int(settings.pop("max_workers", 1)), settings.pop("model", None)
    dtype = getattr(torch, str(settings.pop("dtype", "bfloat16")))
    model = None
    if name is not None:
        from kvstack.models import load

        model, _ = load(str(name), dtype=dtype)
    settings.setdefault("stack", "quant:4")
    codec = ChunkCodec(**settings, model=model)
    return AsyncSerdeProcessor(KVStackSerializer(codec), KVStackDeserializer(codec), max_workers=workers)


def _tensor(obj: MemoryObj, name: str) -> torch.Tensor:
    if obj.tensor is None:
        raise ChunkError(f"{name} has no tensor.")
    tensor: torch.Tensor = obj.tensor
    return tensor


def _start(obj: MemoryObj) -> int | None:
    """The position of a chunk's first token, where LMCache has noted it."""
    positions = getattr(obj.metadata, "cached_positions", None)
    return None if positions is None or not positions.numel() else int(positions.flatten()[0])


def _rank(key: ObjectKey) -> int:
    """The process within its tensor-parallel group. `kv_rank` has four bytes: world size, rank, and the same of a
    node, where the heads of a layer are shared."""
    local_size, rank = (key.kv_rank >> 8) & 255, key.kv_rank & 255
    return rank if local_size > 1 else 0
