"""Codes of a latent whose variances are known."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvstack import KV, Channels, KVStack, Latent, Quant, StageError, Transform, UseError
from kvstack.authoring import BoundTransform, Codec
from kvstack.encode.bits import MOST
from kvstack.encode.channel_codes import GRANULE, ChannelCodes
from kvstack.encode.exact import EXACT
from kvstack.store.plan import Plan
from kvstack.store.sealed import GroupLatents
from kvstack.testing import check_stage, tiny_model
from kvstack.waterfilling import STEPS
from tests import tiny


def codes(decay=0.8, count=24, bits=60):
    energy = 50 * decay ** torch.arange(float(count))
    encoders = Quant(2).allot([Channels(energy)], numbers=bits)
    assert encoders is not None
    return encoders[0]


def back(known, x):
    return known.decode(known.encode(x, "latent"), "latent")


def latent(known, tokens=64, seed=0):
    x = torch.randn(2, 1, tokens, len(known.energy), generator=torch.Generator().manual_seed(seed))
    return x * known.energy.sqrt()


def test_bytes_are_the_bits():
    known = codes()
    packed = known.encode(latent(known), "latent")
    assert packed.parts["codes"].numel() == 2 * 64 * int(known.bits.sum()) // 8
    assert packed.parts["gains"].numel() == 2 * 64 * 2 * len(known.runs) // 8


def test_numbers_on_the_grid_survive():
    """Codes at unit gain come back as they were: for every width, both ends of the range included."""
    for bits in range(1, MOST + 1):
        known = ChannelCodes(torch.full((4,), 9.0), torch.full((4,), bits, dtype=torch.uint8))
        codes = torch.randint(0, 2**bits, (1, 1, 16, 4), generator=torch.Generator().manual_seed(bits))
        codes[:, :, :, 0], codes[:, :, :, 1] = 0, 2**bits - 1
        x = (codes - (2**bits - 1) / 2) * STEPS[bits - 1] * 3
        torch.testing.assert_close(back(known, x), x)


def test_decoding_and_encoding_again_changes_nothing():
    known = codes()
    once = back(known, latent(known))
    torch.testing.assert_close(back(known, once), once)


def test_error_falls_with_the_bits():
    errors = []
    whole = latent(codes(bits=90))
    for bits in (30, 40, 60, 90):
        known = codes(bits=bits)
        kept, lost = whole.split([len(known.energy), whole.shape[-1] - len(known.energy)], dim=-1)
        error = (back(known, kept) - kept).square().sum()
        errors.append(float(error + lost.square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_twice_the_bits_leave_little_of_the_error_where_few_channels_carry_most():
    """What channels of most energy cannot take does not go to those that hardly need it."""
    energy = torch.cat([torch.full((4,), 1e3), 0.9 ** torch.arange(96.0)])
    errors = []
    for bits in (2, 4, 8):
        (known,) = Quant(bits).allot([Channels(energy)], numbers=90)
        whole = torch.randn(1, 1, 256, 100, generator=torch.Generator().manual_seed(bits)) * energy.sqrt()
        kept, lost = whole.split([known.rank, 100 - known.rank], dim=-1)
        errors.append(float((back(known, kept) - kept).square().sum() + lost.square().sum()))
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 10


@pytest.mark.parametrize("size", [0.3, 1.0, 2.0])
def test_gains_follow_tokens_that_are_large_or_small(size):
    """Without a gain, a token twice as large is clipped and a small one gets coarse steps."""
    known = ChannelCodes(torch.ones(32), torch.full((32,), 3, dtype=torch.uint8))
    x = size * latent(known)
    error = (back(known, x) - x).square().mean()
    step = STEPS[2]
    fixed = ((x / step + 3.5).round().clamp(0, 7) - 3.5) * step
    assert error <= (fixed - x).square().mean()
    if size != 1.0:
        assert error < 0.6 * (fixed - x).square().mean()


@given(st.integers(0, 10), st.integers(1, 4))
def test_moves_and_products_agree_with_decoding(seed, granules):
    known = stage = codes()
    x = latent(known, tokens=8 * (granules + 1), seed=seed)
    packed = stage.encode(x, "latent")
    whole = stage.decode(packed, "latent")
    assert torch.equal(stage.decode(packed.first(8), "latent"), whole[:, :, :8])
    taken = packed.take(torch.tensor([granules])[None, None], 8)
    assert torch.equal(stage.decode(taken, "latent"), whole[:, :, 8 * granules :])
    assert torch.equal(stage.decode(packed.first(8).append(taken), "latent")[:, :, 8:], whole[:, :, 8 * granules :])
    out = torch.empty_like(whole)
    stage.decode(packed, "latent", out)
    assert torch.equal(out, whole)


def test_nan_is_refused():
    known = codes()
    x = latent(known)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(UseError, match="NaN or infinity"):
        known.encode(x, "latent")


def test_a_channel_without_energy_is_harmless():
    known = ChannelCodes(torch.tensor([4.0, 0.0]), torch.tensor([4, 1], dtype=torch.uint8))
    x = torch.tensor([[1.0, 0.0]]).expand(8, 2)[None, None]
    assert torch.allclose(back(known, x), x, atol=0.5)


# ---- a codec with encoders of its own


class FiveBitsCodec(Codec):
    """Keys and values of a layer side by side, five bits for each number."""

    exact = False

    def __init__(self):
        self.encoders = {"both": ChannelCodes(torch.full((64,), 4.0), torch.full((64,), 5, dtype=torch.uint8))}

    def forward(self, group):
        both = torch.cat([group[0].keys, group[0].values], dim=-1)  # (B, 2, T, 32)
        return {"both": Latent(both.transpose(1, 2).flatten(2).unsqueeze(1), exact=self.exact)}

    def inverse(self, latents, layer):
        return KV(*latents["both"].squeeze(1).unflatten(-1, (2, 32)).transpose(1, 2).chunk(2, dim=-1))


class KeptCodec(FiveBitsCodec):
    """The same numbers, said to be exact."""

    exact = True


@dataclass(frozen=True, repr=False)
class FiveBits(Transform):
    layers: int = 1

    name = "fivebits"
    encodes_itself = True

    def codec(self):
        return FiveBitsCodec()


@dataclass(frozen=True, repr=False)
class Kept(FiveBits):
    def codec(self):
        return KeptCodec()


def test_a_latent_is_packed_by_its_own_encoder_whatever_the_stack_has():
    codec = FiveBitsCodec()
    x = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = []
    for encode in (EXACT, Quant(2)):
        plan = Plan(None, BoundTransform(FiveBits(), 1, codec=codec), encode, 0, 0, 1, codecs=(codec,))
        sealed = GroupLatents(plan, [0], codec, [None])
        sealed.append([KV(x, x)], torch.arange(16)[None, None])
        packed.append(sealed.packed["both"])
        assert plan.granule(24) == GRANULE
    assert packed[0].parts.keys() == packed[1].parts.keys()
    assert all(torch.equal(part, packed[1].parts[name]) for name, part in packed[0].parts.items())
    expected = codec.encoders["both"].encode(codec.forward([KV(x, x)])["both"].data, "both")
    assert all(torch.equal(part, expected.parts[name]) for name, part in packed[0].parts.items())
    plain = Codec()
    assert Plan(None, BoundTransform(FiveBits(), 1, codec=plain), EXACT, 0, 0, 1, codecs=(plain,)).granule(24) == 1


def test_a_transform_that_gives_its_channels_bits():
    check_stage(FiveBits())
    stack = KVStack([FiveBits()], model=tiny.model("llama"), sinks=2, window=8)
    tiny.model("llama")(tiny.tokens(1, 2 + 8 + 80), past_key_values=stack)
    found = {part.part: part.nbytes for part in stack.report().parts if part.payer == "FiveBits()"}
    assert found == {"both: codes": 4 * 80 * 64 * 5 // 8, "both: gains": 4 * 80 * 2 // 8}


def test_what_is_exact_is_not_packed_whatever_bits_its_channels_have():
    model, ids = tiny_model(), tiny.tokens(1, 90)
    stack, dense = (KVStack(stages, model=model, sinks=2, window=8) for stages in ([Kept()], []))
    for cache in (stack, dense):
        model(ids, past_key_values=cache)
    assert torch.equal(stack.read(1).values, dense.read(1).values)
    assert stack.batch.cohorts[0].stores[1].sealed_tokens == 80


def test_keys_that_are_no_numbers_name_the_transform():
    model = tiny_model()
    model.model.embed_tokens.weight.data[5] = torch.nan
    with pytest.raises(UseError, match=r"^FiveBits\(\) on layer 0: keys hold NaN or infinity"):
        model(torch.full((1, 90), 5), past_key_values=KVStack([FiveBits()], sinks=2, window=8))


def test_an_encoder_beside_it_has_nothing_to_do():
    with pytest.raises(
        StageError, match=r"FiveBits\(\) packs its numbers itself, and Quant\(bits=4\) has none left\. Leave"
    ):
        KVStack([Quant(4), FiveBits()])
