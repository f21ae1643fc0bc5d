"""Every encoder on every floating type, from the smallest to the largest numbers it has: decoded within its bound."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack import Quant
from kvstack.encode.channel_codes import ChannelCodes
from kvstack.workspace import Workspace

ENCODERS = {
    "2 bits": (Quant(2), 0.51 / 3),
    "3 bits": (Quant(3), 0.51 / 7),
    "4 bits": (Quant(4, group=8), 0.51 / 15),
    "8 bits": (Quant(8), 0.51 / 255),
    # of the largest number of a block, which is half of its range at least
    "nf4": (Quant(4, codec="nf4"), 0.16),
    "fp4": (Quant(4, codec="fp4"), 0.17),
    "int8": (Quant(8, codec="int8"), 0.02),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def blocks(draw, dtype):
    """(1, 2, 64, 64): channels of very different sizes, some constant, some zero."""
    info = torch.finfo(dtype if dtype != torch.float64 else torch.float32)
    sizes = [0.0, info.smallest_normal / 8, info.smallest_normal, 1e-4, 1.0, 100.0, 6e4, info.max / 2, info.max]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    largest = draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=4))
    unit = torch.rand(1, 2, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1
    if draw(st.booleans()):
        unit[..., ::3] = draw(st.sampled_from([1.0, -1.0, 0.5]))  # channels that do not vary
    channels = torch.tensor([largest[i % len(largest)] for i in range(64)], dtype=torch.float64)
    x = unit * (channels if draw(st.booleans()) else channels[:, None])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("encoder", "share"), ENCODERS.values(), ids=ENCODERS)
def test_within_the_bound(encoder, share, dtype):
    @given(blocks(dtype))
    def check(x):
        for role in ("keys", "values"):
            packed = encoder.encode(x, role)
            decoded = encoder.decode(packed, role)
            assert decoded.dtype == dtype
            assert bool(decoded.isfinite().all())
            out = encoder.decode(packed, role, torch.empty_like(x))
            assert torch.equal(out, decoded)
            error, most = (decoded.double() - x.double()).abs().amax(), x.double().abs().amax()
            # beside the codes, what the type and the halves of the scales round away
            rounding = torch.finfo(dtype).eps * 2 + 2**-9
            assert error <= most * (2 * share + rounding) + torch.finfo(torch.float32).tiny * 4

    check()


@pytest.mark.parametrize("encoder", [encoder for encoder, _ in ENCODERS.values()], ids=ENCODERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_codes_does_not_overflow(encoder, dtype):
    x = torch.linspace(-6e4, 6e4, 64 * 64).view(1, 1, 64, 64).to(dtype)
    query = torch.full((1, 1, 3, 64), 30.0, dtype=dtype)
    weights = torch.full((1, 1, 3, 64), 1 / 64)
    keys, values = encoder.encode(x, "keys"), encoder.encode(x, "values")
    logits = encoder.dot(query, keys, "keys", Workspace())
    expected = query.float() @ encoder.decode(keys, "keys").float().transpose(-1, -2)
    torch.testing.assert_close(logits.float(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    mixed = encoder.mix(weights, values, "values", Workspace())
    expected = weights @ encoder.decode(values, "values").float()
    torch.testing.assert_close(mixed.float(), expected, rtol=1e-3, atol=10 + 6e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_channels_of_any_energy(dtype):
    most = torch.finfo(dtype).max
    deviation = torch.tensor([most / 8, most / 64, 1.0, 0.0]).double()
    codes = ChannelCodes(deviation.square().clamp_max(3e38).float(), torch.tensor([8, 4, 2, 1], dtype=torch.uint8))
    x = torch.tensor([[most, -most, 0.0, 1e-7]] * 8).to(dtype)[None, None]
    packed = codes.encode(x, "latent")
    decoded = codes.decode(packed, "latent")
    assert decoded.dtype == dtype
    assert bool(decoded.isfinite().all())
    if dtype == torch.float16:
        assert abs(float(decoded[0, 0, 0, 0]) - most) < most / 8
