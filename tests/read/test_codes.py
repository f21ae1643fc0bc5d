"""Readers of codes beside the codec, which is the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack import KVStack, Quant
from kvstack.encode.kivi import Kivi
from kvstack.read import codes, compiled, openmp
from kvstack.read.codes import CompiledCodes, fastest
from kvstack.workspace import Workspace
from tests import tiny

CLOSE = 1e-5
"""Of the largest number: sums of floats in another order."""

SIZES = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group": st.sampled_from([8, 16, 32, 40]),
    "rows": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "queries": st.integers(1, 5),
    "units": st.integers(1, 7),
    "seed": st.integers(0, 99),
    "apart": st.integers(0, 3),
}


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= CLOSE * max(1e-30, float(expected.abs().max()))


def numbers(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoded(codec, x, role, apart):
    """In buffers with room for `apart` units more behind those of each head."""
    packed = codec.encode(x, role)
    return packed.with_room(apart * codec.group) if apart else packed


@given(width=st.sampled_from([8, 16, 24, 64, 80, 128, 136]), scale=st.sampled_from([1e-2, 1.0, 300.0, 2e5]), **SIZES)
def test_keys(bits, group, rows, heads, queries, units, width, scale, seed, apart):
    codec, work = Kivi(bits, group), Workspace()
    packed = encoded(codec, numbers(rows, heads, units * group, width, seed=seed, scale=scale), "keys", apart)
    query = numbers(rows, heads, queries, width, seed=seed + 1)
    found = CompiledCodes(codec).dot(query, packed, "keys", work)
    assert_close(found, codec.dot(query, packed, "keys", work))
    decoded = codec.decode(packed, "keys")
    assert_close(found, query.double() @ decoded.double().mT)


@given(channel_groups=st.integers(1, 5), **SIZES)
def test_values(bits, group, rows, heads, queries, units, channel_groups, seed, apart):
    codec, work = Kivi(bits, group), Workspace()
    packed = encoded(codec, numbers(rows, heads, units * group, channel_groups * group, seed=seed), "values", apart)
    weights = numbers(rows, heads, queries, units * group, seed=seed + 1).softmax(-1)
    found = CompiledCodes(codec).mix(weights, packed, "values", work)
    assert_close(found, codec.mix(weights, packed, "values", work))
    assert_close(found, weights.double() @ codec.decode(packed, "values").double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(raw=st.integers(0, 37), room=st.integers(0, 5), width=st.sampled_from([16, 64, 72]), **SIZES)
def test_raw_tokens_come_last(dtype, bits, group, rows, heads, queries, units, width, raw, room, seed, apart):
    """In a buffer that has room for more, as a view of it."""
    codec, work, reader = Kivi(bits, 8), Workspace(), CompiledCodes(Kivi(bits, 8))
    keys, values = (
        encoded(reader.codec, numbers(rows, heads, 8 * units, width, seed=seed), name, apart)
        for name in ("keys", "values")
    )
    view = numbers(rows, heads, raw + room, width, seed=seed + 2).to(dtype)[:, :, :raw]
    query = numbers(rows, heads, queries, width, seed=seed + 1)
    found = reader.dot(query, keys, "keys", work, view)
    assert_close(found, query.double() @ torch.cat([codec.decode(keys, "keys"), view.float()], dim=2).double().mT)
    weights = found.softmax(-1)
    mixed = reader.mix(weights, values, "values", work, view)
    whole = torch.cat([codec.decode(values, "values"), view.float()], dim=2)
    assert_close(mixed, weights.double() @ whole.double())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    codec, work, before = Kivi(4, 32), Workspace(), torch.get_num_threads()
    packed, query = codec.encode(numbers(1, 3, 320, 64), "keys"), numbers(1, 3, 3, 64)
    try:
        torch.set_num_threads(threads)
        found = CompiledCodes(codec).dot(query, packed, "keys", work)
    finally:
        torch.set_num_threads(before)
    assert_close(found, codec.dot(query, packed, "keys", work))


def test_one_thread_without_openmp(monkeypatch):
    """As on a machine whose torch has another library for threads."""
    monkeypatch.setattr(openmp, "library", lambda: None)
    codec, work = Kivi(2, 8), Workspace()
    packed, query = codec.encode(numbers(1, 2, 24, 16), "keys"), numbers(1, 2, 3, 16)
    kernel = compiled.kernel.__wrapped__("kivi.dot")
    monkeypatch.setattr(compiled, "kernel", lambda name: kernel)
    assert_close(CompiledCodes(codec).dot(query, packed, "keys", work), codec.dot(query, packed, "keys", work))


def test_memory_in_another_order():
    codec, work = Kivi(4, 8), Workspace()
    packed = codec.encode(numbers(2, 3, 40, 16), "keys")
    query = numbers(2, 16, 3, 3).permute(0, 2, 3, 1)
    assert not query.is_contiguous()
    assert_close(CompiledCodes(codec).dot(query, packed, "keys", work), codec.dot(query, packed, "keys", work))
    turned = packed.mapped(lambda part: part.transpose(0, 1).contiguous().transpose(0, 1))
    assert_close(CompiledCodes(codec).dot(query, turned, "keys", work), codec.dot(query, packed, "keys", work))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_kernels_do_not_know_the_codec_reads(dtype):
    codec, work = Kivi(4, 8), Workspace()
    packed, query = codec.encode(numbers(1, 2, 16, 16), "keys"), numbers(1, 2, 3, 16).to(dtype)
    assert torch.equal(CompiledCodes(codec).dot(query, packed, "keys", work), codec.dot(query, packed, "keys", work))
    huge = codec.encode(numbers(1, 2, 16, 16, scale=1e6), "keys")
    assert huge.parts["scale"].dtype == torch.float32
    assert torch.equal(CompiledCodes(codec).dot(query, huge, "keys", work), codec.dot(query, huge, "keys", work))


@pytest.mark.parametrize("role", ["keys", "values"])
def test_codes_with_room_behind_them_are_read_by_kernels(role, monkeypatch):
    """Where the tokens of a head have room behind them, the codec is not asked either."""
    codec, work = Kivi(4, 8), Workspace()
    packed = encoded(codec, numbers(2, 3, 40, 16), role, 2)
    assert not any(part.is_contiguous() for part in packed.parts.values())
    query, weights = numbers(2, 3, 2, 16), numbers(2, 3, 2, 40)
    expected = codec.dot(query, packed, role, work) if role == "keys" else codec.mix(weights, packed, role, work)
    for name in ("dot", "mix", "decode"):
        monkeypatch.setattr(Kivi, name, None)
    reader = CompiledCodes(codec)
    found = reader.dot(query, packed, role, work) if role == "keys" else reader.mix(weights, packed, role, work)
    assert_close(found, expected)


# ---- which one answers


def filled(stack):
    ids = tiny.tokens(1, 120)
    with torch.no_grad():
        tiny.model()(ids, past_key_values=stack)
        return tiny.model()(ids[:, :1], past_key_values=stack).logits


def test_codes_are_stored_as_they_are_read():
    """From the prompt on, whose keys and values the model hands over in another order."""
    stack = KVStack([Quant(4, group=8)], model=tiny.model(), window=8)
    filled(stack)
    parts = [x for store in stack.batch.stores for packed in store.packed.values() for x in packed.parts.values()]
    assert parts
    assert all(x.is_contiguous() for x in parts)


def test_the_report_names_the_reader():
    stack = KVStack([Quant(4, group=8)], model=tiny.model(), window=8)
    filled(stack)
    assert stack.report().reads_with == ["numba"]
    assert "read with numba" in " ".join(str(stack.report()).split())
    stack.fused = False
    assert stack.report().reads_with == []
    assert KVStack([], model=tiny.model()).report().reads_with == []


@pytest.mark.parametrize("broken", ["numba is missing", "a kernel computes something else", "kernels do not compile"])
def test_without_kernels_torch_reads(broken, monkeypatch):
    expected = filled(KVStack([Quant(2, group=8)], model=tiny.model(), window=8))
    codes._agrees.cache_clear()
    if broken == "numba is missing":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    elif broken == "a kernel computes something else":
        monkeypatch.setattr(CompiledCodes, "mix", lambda self, weights, packed, role, work: weights[..., :24] + 1)
    else:
        monkeypatch.setattr(compiled, "kernel", lambda name: 1 / 0)
    stack = KVStack([Quant(2, group=8)], model=tiny.model(), window=8)
    found = filled(stack)
    codes._agrees.cache_clear()
    assert stack.report().reads_with == ["torch"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_device_without_kernels():
    codec = Kivi(4, 32)
    assert fastest(codec, torch.device("meta")) is codec
