"""The serializer in LMCache's own interface: memory objects, registry, and the processor that runs it."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip(
    "lmcache.v1.distributed.serde", reason="lmcache is not installed: pip install lmcache", exc_type=ImportError
)

from kvstack_lmcache import ChunkError, register
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor, serialized_layout_desc
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

KEY = ObjectKey(b"chunk", "tiny", ObjectKey.ComputeKVRank(1, 0, 1, 0))
SHAPE = torch.Size([2, 4, 256, 32])


def memory(shape: torch.Size, dtype: torch.dtype, fmt: MemoryFormat, positions: torch.Tensor | None = None):
    raw = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8)
    told = MemoryObjMetadata(
        shape, dtype, 0, len(raw), 1, 0, fmt, cached_positions=positions, shapes=[shape], dtypes=[dtype]
    )
    return TensorMemoryObj(raw, told, None)


def done(query, task: int) -> bool:
    for _ in range(500):
        if (answer := query(task)) is not None:
            return answer
        time.sleep(0.01)
    raise AssertionError("no answer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_chunk_there_and_back(dtype):
    register()
    register()  # a second time changes nothing
    processor = create_serde_processor(SerdeConfig("kvstack", {"stack": "quant:8", "head_dim": 16}))
    layout = MemoryLayoutDesc([SHAPE], [dtype])
    packed = serialized_layout_desc(layout, processor)
    size = packed.shapes[0].numel()
    assert size < SHAPE.numel() * dtype.itemsize * 0.75
    chunk, buffer, back = (
        memory(SHAPE, dtype, MemoryFormat.KV_2LTD),
        memory(packed.shapes[0], torch.uint8, MemoryFormat.BINARY),
        memory(SHAPE, dtype, MemoryFormat.KV_2LTD),
    )
    chunk.tensor.copy_(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    try:
        assert done(processor.query_serialize_result, processor.submit_serialize([chunk], [buffer], [KEY]))
        assert done(processor.query_deserialize_result, processor.submit_deserialize([buffer], [back], [KEY]))
        error = (back.tensor - chunk.tensor).float().norm() / chunk.tensor.float().norm()
        assert 0 < error < 0.01
        # a chunk that cannot be packed is a failed store, and nothing else
        chunk.tensor[0, 0, 50, 3] = float("nan")
        assert not done(processor.query_serialize_result, processor.submit_serialize([chunk], [buffer], [KEY]))
    finally:
        processor.close()


def test_the_start_and_the_rank_of_a_chunk():
    from kvstack_lmcache.serde import _rank, _start

    assert _start(memory(SHAPE, torch.float16, MemoryFormat.KV_2LTD)) is None
    assert _start(memory(SHAPE, torch.float16, MemoryFormat.KV_2LTD, torch.arange(512, 768))) == 512
    assert _rank(KEY) == 0
    assert _rank(ObjectKey(b"chunk", "tiny", ObjectKey.ComputeKVRank(8, 5, 4, 1))) == 1


def test_refused():
    register()
    with pytest.raises(ChunkError, match="has no setting bits"):
        create_serde_processor(SerdeConfig("kvstack", {"bits": 4}))
    processor = create_serde_processor(SerdeConfig("kvstack", {"head_dim": 16}))
    try:
        with pytest.raises(ChunkError, match="a chunk of 2 tensors: kvstack packs chunks of one"):
            processor.estimate_serialized_size(MemoryLayoutDesc([SHAPE] * 2, [torch.float16] * 2))
    finally:
        processor.close()
