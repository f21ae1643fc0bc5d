"""Sizes of chunks and drift of the next tokens, with kvstack's serializer and with those of LMCache.

Each text is read by the model, its cache is cut into chunks of 256 tokens, and every chunk goes through a serializer
and back. A dense cache of what came back is read by the next 256 tokens, and their logits are compared with those of
the exact cache. Texts are those of `kvstack bench quality`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import Deserializer, Serializer
from lmcache.v1.distributed.serde.fp8 import Fp8QuantizationDeserializer, Fp8QuantizationSerializer
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from torch import Tensor

from kvstack.bench.measure.quality import windows_of
from kvstack.bench.measure.run import Run
from kvstack.bench.measure.subject import opened, prefill
from kvstack.models import source

from .codec import ChunkCodec
from .serde import KVStackDeserializer, KVStackSerializer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["run"]

CHUNK, SCORED = 256, 256
STACKS = ("quant:8", "quant:4", "quant:2", "commonkv:0.9+quant:4", "commonkv:0.65+quant:2", "commonkv:0.35+quant:2")
KEY = ObjectKey(b"chunk", "model", ObjectKey.ComputeKVRank(1, 0, 1, 0))

Through = Callable[[Tensor], tuple[Tensor, int]]
"""A chunk [2, layers, tokens, hidden] -> what comes back, and the bytes between."""


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvstack_lmcache measure")
    parser.add_argument("measure")
    parser.add_argument("--model", help="folder or name; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--context", type=int, default=1024, help="tokens that are read, a multiple of 256")
    parser.add_argument("--stack", action="append", help="may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="where in the texts the windows are")
    parser.add_argument("--sinks", type=int, help="first tokens of a chunk that stay as they are")
    told = parser.parse_args()
    with opened(Run((told.context,), (), told.model, threads=torch.get_num_threads(), seed=told.seed)) as subject:
        model = subject.model
        windows = list(windows_of(subject, Run((), (), seed=told.seed), told.context + SCORED + 1, 1).values())
        ways: dict[str, Through] = {"naive": lambda chunk: (chunk, _nbytes(chunk)), "fp8": _fp8()}
        try:
            ways["cachegen"] = _cachegen(model, source(told.model))
        except Exception as error:  # it is not made for processors
            print(f"cachegen: skipped, {type(error).__name__}: {error}")
        for stack in told.stack or STACKS:
            codec = ChunkCodec(
                stack, head_dim=_head_dim(model), model=model if "commonkv" in stack else None, sinks=told.sinks
            )
            ways[stack] = _through(KVStackSerializer(codec), KVStackDeserializer(codec))
        print("| serializer | bytes of bfloat16 | KL | top-1 the same |\n|---|---|---|---|")
        for name, way in ways.items():
            try:
                share, kl, same = _drift(model, windows, told.context, way)
            except Exception as error:
                print(f"{name}: skipped, {type(error).__name__}: {error}")
                continue
            print(f"| `{name}` | {share:.1%} | {kl:.2g} | {same:.1%} |")


def _drift(model: PreTrainedModel, windows: list[Tensor], context: int, way: Through) -> tuple[float, float, float]:
    """Bytes as a share of bfloat16 chunks, KL in nats, and how often the likeliest token is the same."""
    from transformers import DynamicCache

    sent = whole = 0
    kl, same = [], []
    for ids in windows:
        dense = DynamicCache(config=model.config)
        prefill(model, ids[:, :context], dense)
        back = DynamicCache(config=model.config)
        chunk = torch.stack([torch.stack([_flat(x) for x in (one.keys, one.values)]) for one in dense.layers], dim=1)
        parts = []
        for piece in chunk.to(torch.bfloat16).split(CHUNK, dim=2):
            found, nbytes = way(piece.contiguous())
            parts.append(found)
            sent, whole = sent + nbytes, whole + _nbytes(piece)
        keys, values = torch.cat(parts, dim=2).to(chunk.dtype)
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            back.update(_heads(k, _head_dim(model)), _heads(v, _head_dim(model)), layer)
        exact, read = (
            model(ids[:, context:-1], past_key_values=cache).logits[0].float().log_softmax(-1)
            for cache in (dense, back)
        )
        kl.append((exact.exp() * (exact - read)).sum(-1))
        same.append((exact.argmax(-1) == read.argmax(-1)).float())
    return sent / whole, float(torch.cat(kl).mean()), float(torch.cat(same).mean())


# ---- serializers


def _through(serializer: Serializer, deserializer: Deserializer) -> Through:
    def way(chunk: Tensor) -> tuple[Tensor, int]:
        size = serializer.estimate_serialized_size(MemoryLayoutDesc([chunk.shape], [chunk.dtype]))
        src, dst = _memory(chunk.shape, chunk.dtype), _memory(torch.Size([size]), torch.uint8)
        back = _memory(chunk.shape, chunk.dtype)
        src.tensor.copy_(chunk)
        serializer.serialize(src, dst, KEY)
        deserializer.deserialize(dst, back, KEY)
        found: Tensor = back.tensor
        return found, size

    return way


def _fp8() -> Through:
    return _through(Fp8QuantizationSerializer(), Fp8QuantizationDeserializer())


def _cachegen(model: PreTrainedModel, name: str) -> Through:
    """The older interface, which makes a buffer of its own."""
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.naive_serde import CreateSerde

    config = model.config.get_text_config(decoder=True)
    heads, width = config.num_key_value_heads, _head_dim(model)
    shape = (config.num_hidden_layers, 2, CHUNK, heads, width)
    told = LMCacheMetadata(
        model_name=str(Path(name)), world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
        kv_dtype=torch.bfloat16, kv_shape=shape,
    )  # fmt: skip
    serializer, deserializer = CreateSerde("cachegen", told, LMCacheEngineConfig.from_defaults(chunk_size=CHUNK))

    def way(chunk: Tensor) -> tuple[Tensor, int]:
        src = _memory(chunk.shape, chunk.dtype)
        src.tensor.copy_(chunk)
        packed = serializer.serialize(src)
        back = deserializer.deserialize(packed)
        return back.tensor.view(chunk.shape).to(chunk.dtype), len(packed.byte_array)

    return way


def _memory(shape: torch.Size, dtype: torch.dtype) -> TensorMemoryObj:
    raw = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8)
    told = MemoryObjMetadata(shape, dtype, 0, len(raw), 1, 0, MemoryFormat.KV_2LTD, shapes=[shape], dtypes=[dtype])
    return TensorMemoryObj(raw, told, None)


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _flat(x: Tensor) -> Tensor:
    """(1, H, T, D) -> (T, hidden)."""
    return x[0].transpose(0, 1).flatten(1)


def _heads(x: Tensor, width: int) -> Tensor:
    """(T, hidden) -> (1, H, T, D)."""
    return x.unflatten(-1, (-1, width)).transpose(0, 1)[None]
