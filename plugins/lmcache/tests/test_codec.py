"""Chunks of keys and values as bytes, and back."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvstack_lmcache import ChunkCodec, ChunkError
from transformers import DynamicCache

from kvstack import calibrate
from kvstack.testing import tiny_model

LAYERS, HEADS, WIDTH = 4, 2, 16
FITTED = "commonkv:1.0+quant:8"


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=2048)


@pytest.fixture(scope="module")
def fitted(model):
    return ChunkCodec(FITTED, model=model)


def chunk_of(model, start: int, tokens: int) -> torch.Tensor:
    """[2, layers, tokens, hidden] of a text, from position `start` on."""
    cache = DynamicCache()
    ids = torch.randint(3, 97, (1, start + tokens), generator=torch.Generator().manual_seed(1))
    model(ids, past_key_values=cache)
    both = [[x[0, :, start:].transpose(0, 1).flatten(1) for x in (one.keys, one.values)] for one in cache.layers]
    return torch.stack([torch.stack([one[i] for one in both]) for i in (0, 1)])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@settings(max_examples=30)
@given(
    tokens=st.integers(1, 300),
    bits=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    sinks=st.integers(0, 8),
)
def test_bytes_are_those_foretold_and_what_comes_back_is_near(tokens, bits, dtype, sinks):
    codec = ChunkCodec(f"quant:{bits}", head_dim=WIDTH, sinks=sinks)
    chunk = torch.randn(2, LAYERS, tokens, HEADS * WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = codec.encode(chunk)
    assert data.dtype == torch.uint8
    assert len(data) == codec.nbytes(chunk.shape, dtype)
    # a buffer may be longer than what is in it
    back = codec.decode(torch.cat([data, data[:5]]), chunk.shape, dtype)
    assert back.dtype == dtype
    packed = max(0, tokens - sinks) // 32 * 32
    raw = [*range(sinks), *range(sinks + packed, tokens)] if packed else [*range(tokens)]
    assert torch.equal(back[:, :, raw], chunk[:, :, raw])
    assert error(back, chunk) < {2: 0.5, 3: 0.25, 4: 0.12, 8: 0.01}[bits]
    if packed:
        assert not torch.equal(back, chunk)


def test_numbers_on_the_grid_come_back_exactly():
    """Eight bits hold whole numbers from 0 to 255 in every group."""
    draw = torch.Generator().manual_seed(0)
    chunk = torch.randint(0, 256, (2, LAYERS, 64, HEADS * WIDTH), generator=draw).float()
    chunk[:, :, ::32], chunk[:, :, 1::32] = 0.0, 255.0
    chunk[1, :, :, ::WIDTH], chunk[1, :, :, 1::WIDTH] = 0.0, 255.0
    codec = ChunkCodec("quant:8", head_dim=WIDTH, sinks=0)
    assert torch.equal(codec.decode(codec.encode(chunk), chunk.shape, torch.float32), chunk)


@pytest.mark.parametrize("start", [0, 256, 1024])
def test_latents_of_a_chunk(model, fitted, start):
    """With all axes, what comes back is near, wherever the chunk begins."""
    chunk = chunk_of(model, start, 256)
    data = fitted.encode(chunk, start)
    assert len(data) == fitted.nbytes(chunk.shape, chunk.dtype)
    assert error(fitted.decode(data, chunk.shape, chunk.dtype), chunk) < 0.03
    small = ChunkCodec("commonkv:0.5+quant:4", model=model)
    assert len(small.encode(chunk, start)) < len(ChunkCodec("quant:4", head_dim=WIDTH).encode(chunk))


def test_a_start_that_is_not_told_is_found(model, fitted):
    few = ChunkCodec("commonkv:0.4+quant:8", model=model)
    for start in (0, 256, 1024):
        chunk = chunk_of(model, start, 256)
        assert torch.equal(few.encode(chunk), few.encode(chunk, start))
    # a wrong start costs quality; what comes back is still the chunk
    wrong = few.decode(few.encode(chunk, 0), chunk.shape, chunk.dtype)
    right = few.decode(few.encode(chunk, 1024), chunk.shape, chunk.dtype)
    assert error(right, chunk) < error(wrong, chunk) < 1


def test_ranks_have_axes_of_their_own_heads(model, tmp_path):
    """Two processes with a kv head each: the numbers of both together are those of the whole."""
    path = tmp_path / "axes.safetensors"
    calibrate(model, layers=4, block=4 * WIDTH * 2, keep_axes=1.0).save(path)
    spec = f"commonkv:1.0,calibration='{path}'+quant:8"
    codec = ChunkCodec(spec, model=model, world_size=2)
    whole = chunk_of(model, 256, 256)
    for rank in (0, 1):
        mine = whole[..., rank * WIDTH : (rank + 1) * WIDTH].contiguous()
        data = codec.encode(mine, 256, rank)
        assert len(data) <= codec.nbytes(mine.shape, mine.dtype)
        assert error(codec.decode(data, mine.shape, mine.dtype), mine) < 0.03
    with pytest.raises(ChunkError, match="rank 2: world_size=2"):
        codec.encode(mine, 256, 2)
    with pytest.raises(ChunkError, match=r"64 numbers|32 numbers is not of this model"):
        codec.encode(whole, 256)


def test_axes_of_all_heads_are_refused_for_several_ranks(model):
    with pytest.raises(ChunkError, match=r"for 1 runs of kv heads, .* kvstack calibrate MODEL --layers 4"):
        ChunkCodec(FITTED, model=model, world_size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stack": "quant:4"}, "needs the size of a head. Give head_dim=128"),
        ({"stack": "evict:0.5+quant:4", "head_dim": 16}, "a chunk keeps all its tokens"),
        ({"stack": "quant:4@window=16", "head_dim": 16}, "without settings behind an @"),
        ({"stack": "", "head_dim": 16}, "Use quant:4, or commonkv:0.65+quant:2"),
        ({"stack": "commonkv:0.5+quant:4"}, "is fitted to a model. Name it: model='FOLDER'."),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ChunkError, match=re.escape(message)):
        ChunkCodec(**arguments)


def test_bytes_that_are_refused(fitted, model):
    codec = ChunkCodec("quant:4", head_dim=WIDTH)
    chunk = chunk_of(model, 0, 100)
    data = codec.encode(chunk)
    told = (chunk.shape, chunk.dtype)
    with pytest.raises(ChunkError, match="not a chunk that kvstack packed"):
        codec.decode(data.flip(0), *told)
    with pytest.raises(ChunkError, match="not a chunk that kvstack packed"):
        codec.decode(data[:3], *told)
    with pytest.raises(ChunkError, match="too few for this chunk, which takes"):
        codec.decode(data[:-1], *told)
    with pytest.raises(ChunkError, match="packed by another stack, model or calibration"):
        ChunkCodec("quant:2", head_dim=WIDTH).decode(data, *told)
    with pytest.raises(ChunkError, match="hold 100 tokens, and a chunk of 99 tokens"):
        codec.decode(data, (2, LAYERS, 99, HEADS * WIDTH), torch.float32)
    with pytest.raises(ChunkError, match=r"a chunk is \[2, layers, tokens, hidden\]"):
        codec.encode(chunk[0])
    with pytest.raises(ChunkError, match="no heads of 16"):
        codec.encode(chunk[..., :20])
    with pytest.raises(ChunkError, match="3 layers and 32 numbers is not of this model"):
        fitted.encode(chunk[:, :3])
    with pytest.raises(ChunkError, match="cannot be packed"):
        codec.encode(chunk.double())


def test_a_chunk_whose_scales_need_32_bits_is_left_out():
    codec = ChunkCodec("quant:4", head_dim=WIDTH)
    chunk = torch.randn(2, LAYERS, 64, HEADS * WIDTH)
    chunk[0, 0, 10, 3] = 1e6
    with pytest.raises(ChunkError, match="scales need 32 bits, and no longer fit"):
        codec.encode(chunk)
