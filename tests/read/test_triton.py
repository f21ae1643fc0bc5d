"""Triton's readers beside plain torch, which is the reference. Without a GPU triton interprets the same kernels.

The environment says so before anything imports triton: see conftest.py of the repository.
"""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton, which compiles these kernels, is not installed")

from kvstack.abilities import Linear
from kvstack.encode.bits import MOST
from kvstack.encode.channel_codes import ChannelCodes
from kvstack.encode.kivi import Kivi
from kvstack.read import codes, latents
from kvstack.read.codes import TritonCodes, fastest
from kvstack.read.latents import opened, reader_of
from kvstack.read.linear import Decoded, LatentReader
from kvstack.read.linear_triton import DeviceCodes, TritonReader
from kvstack.turns import Pairs, Turns
from kvstack.workspace import Workspace

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CLOSE = 1e-5
"""Of the largest number: sums of floats in another order."""


def draw(seed):
    return torch.Generator().manual_seed(seed)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=draw(seed)).to(DEVICE)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= CLOSE * max(1e-30, float(expected.abs().max()))


@pytest.fixture
def forgets():
    """What was found out about kernels belongs to one test."""
    for known in (codes._agrees_on, latents._agrees_on):
        known.cache_clear()
    yield
    for known in (codes._agrees_on, latents._agrees_on):
        known.cache_clear()


@pytest.fixture
def unchecked(monkeypatch):
    """Kernels are used as they are: the test compares them itself."""
    for module in (codes, latents):
        monkeypatch.setattr(module, "_agrees_on", lambda *sizes, **known: True)


# ---- codes with scales

SIZES = [  # group, rows, heads, queries, units, width
    (32, 1, 1, 1, 1, 32),
    (32, 2, 2, 3, 5, 96),
    (8, 1, 3, 5, 9, 80),
    (40, 2, 1, 4, 2, 40),
    (16, 1, 2, 17, 3, 16),
]


@pytest.mark.parametrize(("raw", "apart"), [(None, 0), (0, 0), (13, 0), (13, 2)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group", "rows", "heads", "queries", "units", "width"), SIZES)
def test_keys_and_values(group, rows, heads, queries, units, width, bits, raw, apart, unchecked):
    codec, work, tokens = Kivi(bits, group), Workspace(), group * units
    keys, values = (codec.encode(numbers(rows, heads, tokens, width, seed=i), ("keys", "values")[i]) for i in (0, 1))
    if apart:
        keys, values = (packed.with_room(apart * group) for packed in (keys, values))
    query = numbers(rows, heads, queries, width, seed=2)
    # in a buffer that has room for more, as a view of it
    loose = None if raw is None else numbers(rows, heads, raw + 4, width, seed=3).bfloat16()[:, :, :raw]
    decoded = [codec.decode(keys, "keys"), codec.decode(values, "values")]
    if loose is not None:
        decoded = [torch.cat([x, loose.float()], dim=2) for x in decoded]
    reader = TritonCodes(codec)
    scores = reader.dot(query, keys, "keys", work, loose)
    assert_close(scores, query @ decoded[0].mT)
    weights = scores.softmax(-1)
    assert_close(reader.mix(weights, values, "values", work, loose), weights @ decoded[1])


def test_kernels_read_them(monkeypatch):
    """What is compared with the codec does not come from the codec."""
    codec, work = Kivi(4, 32), Workspace()
    assert codes._agrees_on(DEVICE, 4, 32, 64, 2)
    packed = [codec.encode(numbers(1, 2, 64, 64), role) for role in ("keys", "values")]
    for name in ("dot", "mix", "decode"):
        monkeypatch.setattr(Kivi, name, None)
    TritonCodes(codec).dot(numbers(1, 2, 2, 64), packed[0], "keys", work)
    TritonCodes(codec).mix(numbers(1, 2, 2, 64), packed[1], "values", work)


def test_memory_in_another_order(unchecked):
    codec, work = Kivi(4, 8), Workspace()
    packed, query = codec.encode(numbers(2, 3, 40, 16), "keys"), numbers(2, 16, 3, 3).permute(0, 2, 3, 1)
    assert_close(TritonCodes(codec).dot(query, packed, "keys", work), codec.dot(query, packed, "keys", work))
    turned = packed.mapped(lambda part: part.transpose(0, 1).contiguous().transpose(0, 1))
    assert_close(TritonCodes(codec).dot(query, turned, "keys", work), codec.dot(query, packed, "keys", work))


@pytest.mark.parametrize("kind", ["3 bits", "float32 scales", "float64 queries", "wide heads", "many queries"])
def test_what_kernels_do_not_know_the_codec_reads(kind):
    codec, work = Kivi(3 if kind == "3 bits" else 4, 8), Workspace()
    width, queries = (512 if kind == "wide heads" else 16), (70 if kind == "many queries" else 3)
    packed = codec.encode(numbers(1, 2, 16, width) * (1e6 if kind == "float32 scales" else 1), "keys")
    query = numbers(1, 2, queries, width).to(torch.float64 if kind == "float64 queries" else torch.float32)
    reader = TritonCodes(codec)
    assert not reader._reads(query, packed)
    assert torch.equal(reader.dot(query, packed, "keys", work), codec.dot(query, packed, "keys", work))


# ---- latents in codes of channels


def a_latent(widths, rows, tokens, seed=0):
    bits = torch.tensor(sorted(widths, reverse=True), dtype=torch.uint8)
    energy = torch.rand(len(bits), generator=draw(seed)).sort(descending=True).values
    encoder = ChannelCodes(energy, bits).to(DEVICE)
    z = numbers(rows, 1, tokens, len(bits), seed=seed) * encoder.deviation
    return encoder, encoder.encode(z, "latent")


def turns_of(pairs, width, tokens, rows):
    """`pairs` of channels in any order that turn, each at its own speed; the others do not."""
    if not pairs:
        return Turns.none(tokens, width, DEVICE)
    order = torch.randperm(width, generator=draw(pairs))
    channels = Pairs(order[:pairs], order[pairs : 2 * pairs], order[2 * pairs :].sort().values)
    angles = torch.rand(rows, pairs, 1, generator=draw(pairs)) * torch.arange(tokens) / 4
    return Turns(channels, 1.3 * angles.cos(), 1.3 * angles.sin()).to(DEVICE)


def linears(rank, heads, width, mean, rows=1, dtype=torch.float32):
    for seed in (1, 2):
        axes = numbers(rows, rank, heads, width, seed=seed).to(dtype)
        yield Linear("latent", axes, numbers(heads, width, seed=seed).to(dtype) if mean else None)


def assert_reads(encoder, packed, keys, values, turns, query, raw):
    """All keys exact, in the way of those who rebuild and rotate them; and some of them, as plain torch does."""
    latent, tokens = DeviceCodes(encoder, packed), packed.tokens
    reader = reader_of(keys, values, (latent, latent), turns, tokens, 5, Workspace())
    assert isinstance(reader, TritonReader)
    z = encoder.decode(packed, "latent")[:, 0]
    made = [
        torch.einsum("btr,brhd->bhtd", z, x.axes.float().expand(len(z), -1, -1, -1))
        + (0 if x.mean is None else x.mean.float().unsqueeze(1))
        for x in (keys, values)
    ]
    places = torch.arange(tokens, device=DEVICE).expand(*query.shape[:2], -1)
    made = [torch.cat([x, raw.float()], dim=2) for x in (turns.rotate_at(made[0], places), made[1])]
    scores = reader.dot(query, raw)
    assert_close(scores, query @ made[0].mT)
    weights = (scores / 8).softmax(-1)
    assert_close(reader.mix(weights, raw), weights @ made[1])
    for exact, rough in ((6, 3), (12, 40)):
        settings = turns, min(exact, tokens - 1), rough
        plain = LatentReader(keys, values, (Decoded(z.unsqueeze(1)),) * 2, *settings)
        found, expected = (
            each.dot(query, raw)
            for each in (TritonReader(keys, values, (latent, latent), *settings, latents._agrees_on), plain)
        )
        # a token whose share is the least that counts, up to rounding, may be exact for one and rough for the other
        same = torch.isclose(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
        assert found.shape == expected.shape
        assert (~same.all(2)).sum(-1).max() <= 1
    assert "z" not in vars(latent), "decoded"


EVERY = [bits for bits in range(1, MOST + 1) for _ in range(5)]
LATENTS = {  # widths, rows, heads, queries, units, width, pairs
    "one token group": ([3], 1, 1, 1, 1, 8, 4),
    "every width": (EVERY, 2, 2, 3, 11, 20, 8),
    "head of no power of two": ([5] * 33 + [2] * 40, 1, 3, 2, 9, 24, 12),
    "few channels turn": ([8, 7, 6, 1], 2, 1, 5, 17, 40, 3),
    "many queries": ([4] * 32, 1, 2, 33, 3, 16, 8),
}


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "no mean"])
@pytest.mark.parametrize("rotates", [True, False], ids=["rotated", "not rotated"])
@pytest.mark.parametrize(
    ("widths", "rows", "heads", "queries", "units", "width", "pairs"), LATENTS.values(), ids=LATENTS
)
def test_latents(widths, rows, heads, queries, units, width, pairs, rotates, mean, unchecked):
    encoder, packed = a_latent(widths, rows, 8 * units)
    packed = packed if mean else packed.with_room(24)
    turns = turns_of(pairs if rotates else 0, width, 8 * units, rows)
    query, raw = numbers(rows, heads, queries, width, seed=4), numbers(rows, heads, 7, width, seed=5)
    assert_reads(encoder, packed, *linears(len(widths), heads, width, mean), turns, query, raw)


@pytest.mark.parametrize("raw", [0, 1])
def test_axes_of_each_row_in_halves(raw, unchecked):
    """Axes that were fitted to each text, as half-precision numbers, and memory in another order."""
    encoder, packed = a_latent(EVERY, 2, 40)
    keys, values = linears(len(EVERY), 2, 16, True, rows=2, dtype=torch.bfloat16)
    keys = Linear("latent", keys.axes.transpose(1, 2).contiguous().transpose(1, 2), keys.mean)
    values = Linear("latent", values.axes.transpose(2, 3).contiguous().transpose(2, 3), values.mean)
    query = numbers(2, 16, 3, 2).permute(0, 3, 2, 1)
    for turns in (turns_of(8, 16, 40, 1), turns_of(0, 16, 40, 1)):
        assert_reads(encoder, packed, keys, values, turns, query, numbers(2, 2, raw, 16).bfloat16())


@pytest.mark.parametrize("kind", ["float64 queries", "wide heads", "many queries"])
def test_what_kernels_do_not_know_plain_torch_reads(kind):
    width, queries = (320 if kind == "wide heads" else 16), (70 if kind == "many queries" else 3)
    encoder, packed = a_latent([4, 2], 1, 16)
    keys, values = linears(2, 1, width, True)
    query = numbers(1, 1, queries, width).to(torch.float64 if kind == "float64 queries" else torch.float32)
    turns, latent = turns_of(0, width, 16, 1), DeviceCodes(encoder, packed)
    known = keys, values, (latent, latent), turns, 4, 5
    plain, found = LatentReader(*known), TritonReader(*known, latents._agrees_on)
    assert not found._serves(query, query.shape[2])
    if query.dtype == torch.float32:
        raw = numbers(1, 1, 2, width)
        scores = found.dot(query, raw)
        assert torch.equal(scores, plain.dot(query, raw))
        assert torch.equal(found.mix(scores, raw), plain.mix(scores, raw))


# ---- which one answers


@pytest.mark.parametrize("broken", ["triton is missing", "a kernel computes something else", "kernels do not compile"])
def test_without_kernels_torch_reads(broken, monkeypatch, forgets):
    from kvstack.read.triton import channels, kivi

    if broken == "triton is missing":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    elif broken == "a kernel computes something else":
        for module in (kivi, channels):
            monkeypatch.setattr(module, "mix", lambda *given, right=module.mix: 1.001 * right(*given))
    else:
        for module in (kivi, channels):
            monkeypatch.setattr(module, "_mix", None)
    codec, work = Kivi(4, 32), Workspace()
    assert not codes._agrees_on(DEVICE, 4, 32, 64, 2)
    packed, weights = codec.encode(numbers(1, 2, 64, 64), "values"), numbers(1, 2, 2, 64)
    assert torch.equal(
        TritonCodes(codec).mix(weights, packed, "values", work), codec.mix(weights, packed, "values", work)
    )
    encoder, sealed = a_latent([4, 2, 1], 1, 40)
    keys, values = linears(3, 2, 16, True)
    latent, turns = DeviceCodes(encoder, sealed), turns_of(8, 16, 40, 1)
    known = keys, values, (latent, latent), turns, 4, 5
    readers = TritonReader(*known, latents._agrees_on), LatentReader(*known)
    query, raw = numbers(1, 2, 3, 16), numbers(1, 2, 3, 16)
    assert not readers[0]._serves(query, query.shape[2])
    scores = [each.dot(query, raw) for each in readers]
    assert torch.equal(*scores)
    assert torch.equal(*(each.mix(scores[0], raw) for each in readers))


@pytest.mark.parametrize("right", [True, False])
def test_a_gpu_is_read_by_triton_where_it_is_right(right, monkeypatch):
    """Settled by the device alone: no tensor is there yet."""
    gpu, (encoder, packed) = torch.device("cuda"), a_latent([4, 2], 1, 16)
    for module in (codes, latents):
        monkeypatch.setattr(module, "_agrees_on", lambda device, *sizes, **known: right)
    assert fastest(Kivi(4, 32), gpu).reads_with == latents.reads_with(encoder, gpu) == ("triton" if right else "torch")
    if DEVICE.type == "cuda":
        made = opened(encoder, packed, lambda: encoder.decode(packed, "latent"))
        assert isinstance(made, DeviceCodes if right else Decoded)


def test_three_bits_are_left_to_the_codec():
    assert not codes._agrees_on(DEVICE, 3, 32, 96, 3)


def test_a_processor_is_not_read_by_triton():
    assert fastest(Kivi(4, 32), torch.device("cpu")).reads_with in ("numba", "torch")
    assert "kvstack.read.triton.kivi" in sys.modules, "imported by the tests above"
