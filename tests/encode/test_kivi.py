"""Codes, for whatever sizes hypothesis thinks of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack import Quant
from kvstack.encode.bits import PLANES, multiple, pack, unpack
from kvstack.encode.kivi import Kivi
from tests import tiny

# ---- bits


@given(
    bits=st.sampled_from(sorted(PLANES)), runs=st.integers(1, 9), dim=st.sampled_from([1, 2]), seed=st.integers(0, 99)
)
def test_pack_and_unpack(bits, runs, dim, seed):
    n = runs * multiple(bits)
    shape = [3, n, 4] if dim == 1 else [3, 4, n]
    dtype = torch.uint8 if bits <= 8 else torch.int16
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    packed = pack(codes, bits, dim)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits, dim, n), codes)


# ---- quantizer

KIVI = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group": st.sampled_from([8, 16]),
    "role": st.sampled_from(["keys", "values"]),
    "granules": st.integers(1, 4),
    "scale": st.sampled_from([1e-6, 1e-2, 1.0, 300.0, 2e5]),
    "offset": st.sampled_from([0.0, -3.0, 1000.0]),
    "seed": st.integers(0, 99),
}


def steps(kivi, packed, role):
    """The step of every number, shaped like the decoded tensor."""
    step = packed.parts["scale"].float()
    return step.repeat_interleave(kivi.group, dim=3 if role == "values" else 2)


@given(**KIVI)
def test_within_half_a_step_and_stable(bits, group, role, granules, scale, offset, seed):
    kivi = Kivi(bits, group)
    x = tiny.numbers(seed, 1, 2, granules * group, 16) * scale + offset
    packed = kivi.encode(x, role)
    once = kivi.decode(packed, role)
    # float32 arithmetic on numbers of this size
    rounding = (abs(offset) + 8 * scale) * 2**-20
    half = steps(kivi, packed, role) / 2
    assert bool(((once - x).abs() <= half * 1.001 + rounding).all())
    again = kivi.decode(kivi.encode(once, role), role)
    size = x.abs().max()
    exact = size * 2**-10 < half.min() or size > 6e4  # halves are fine enough, or too small and not used
    assert bool(((again - once).abs() <= half * (0.02 if exact else 1.001) + rounding * 2).all())


@given(bits=st.sampled_from([2, 3, 4, 8]), role=st.sampled_from(["keys", "values"]), seed=st.integers(0, 99))
def test_numbers_on_the_grid_survive_exactly(bits, role, seed):
    kivi = Kivi(bits, 8)
    codes = torch.randint(0, 2**bits, (1, 2, 16, 16), generator=torch.Generator().manual_seed(seed)).float()
    grouped = codes.unflatten(3 if role == "values" else 2, (2, 8))
    axis = 4 if role == "values" else 3
    grouped.select(axis, 0).fill_(0)
    grouped.select(axis, 1).fill_(2**bits - 1)  # every group spans its grid
    x = (grouped * 0.25 - 3).reshape(1, 2, 16, 16)
    assert torch.equal(kivi.decode(kivi.encode(x, role), role), x)


@pytest.mark.parametrize("value", [0.0, 5.0, -7.25, 1e-8, 123456.0])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_groups_that_do_not_vary(role, value):
    x = torch.full((1, 1, 16, 16), value)
    kivi = Kivi(2, 8)
    torch.testing.assert_close(kivi.decode(kivi.encode(x, role), role), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", ["kivi", "nf4", "int8"])
def test_dtypes_come_back(codec, dtype):
    stage = Quant(8 if codec == "int8" else 4, codec=codec)
    x = tiny.numbers(0, 1, 2, 128, 64).to(dtype)
    for role in ("keys", "values"):
        back = stage.decode(stage.encode(x, role), role)
        assert back.dtype == dtype
        assert float((back.float() - x.float()).norm() / x.float().norm()) < 0.15


@given(seed=st.integers(0, 20), role=st.sampled_from(["keys", "values"]))
def test_more_bits_lose_less(seed, role):
    x = tiny.numbers(seed, 1, 2, 64, 32)
    errors = [float((Kivi(b, 32).decode(Kivi(b, 32).encode(x, role), role) - x).norm()) for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
