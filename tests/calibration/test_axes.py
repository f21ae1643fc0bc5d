"""The arithmetic of one latent for a group of layers."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvstack.abilities import PackedAxes
from kvstack.calibration.axes import Axes, Basis, flat, split, widths
from kvstack.types import KV

SHAPES = ((2, 8, 4), (1, 6, 6))
N = 2 * (8 + 4) + 6 + 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group(seed=0, tokens=10):
    return [
        KV(random(2, heads, tokens, keys, seed=seed + i), random(2, heads, tokens, values, seed=seed + 9 + i))
        for i, (heads, keys, values) in enumerate(SHAPES)
    ]


def basis(rank=N, seed=0):
    weight = random(N, seed=seed).exp()
    axes = torch.linalg.qr(random(N, N, seed=seed + 1)).Q[:rank]
    return Basis(axes / weight.sqrt(), random(N, seed=seed + 2), weight, SHAPES)


def test_full_rank_is_the_identity():
    made, layers = basis(), group()
    z = made.project(flat(layers))
    for i, kv in enumerate(layers):
        torch.testing.assert_close(made.keys(z, i), kv.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(made.values(z, i), kv.values, atol=1e-4, rtol=1e-4)


@given(st.integers(1, N), st.integers(0, 5), st.floats(1e-3, 3))
def test_no_other_latent_is_better(rank, seed, size):
    """Projection is least squares: any step away from it adds weighed error."""
    made = basis(rank, seed)
    x = random(7, N, seed=seed + 3)
    z = made.project(x)

    def loss(latent):
        return float((made.weight * (x - made.mean - latent @ made.axes).square()).sum())

    assert loss(z) <= loss(z + size * random(7, rank, seed=seed + 4)) * (1 + 1e-5)


def test_error_falls_with_the_rank():
    x = random(50, N)
    errors = []
    for rank in (1, 8, 16, N):
        made = basis(rank)
        errors.append(float((made.weight * (x - made.mean - made.project(x) @ made.axes).square()).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]


@pytest.mark.parametrize("layer", [0, 1])
def test_weighing_latents_is_weighing_values(layer):
    made, kv = basis(rank=9), group()[layer]
    z = made.project(flat(group()))
    weights = random(2, kv.values.shape[1], 3, 10, seed=5).softmax(-1)
    torch.testing.assert_close(made.weigh(weights, z, layer), weights @ made.values(z, layer))


def test_rebuilding_in_bfloat16_is_close():
    made = basis(rank=9)
    z = made.project(flat(group()))
    half = Basis(made.axes, made.mean, made.weight, made.shapes, torch.bfloat16)
    error = (half.keys(z, 0) - made.keys(z, 0)).norm() / made.keys(z, 0).norm()
    assert 0 < error < 0.01


@given(st.integers(0, N), st.integers(0, 5), st.integers(1, N))
def test_axes_in_codes_are_the_axes(fine, seed, rank):
    """Every number is off by half a step of its head at most, and everything that is made of axes is made of these."""
    rows, unit = torch.linalg.qr(random(N, N, seed=seed)).Q[:rank], random(N, seed=seed + 1).exp()
    axes = Axes.of(rows, unit, widths(SHAPES), fine)
    step = axes.scale.repeat_interleave(torch.tensor(axes.widths), dim=1)
    assert float(step.max()) <= 1 / 127 + 1e-9
    off = (axes.rows() - rows).abs()
    assert bool((off[fine:] <= step[fine:] * 0.51).all())  # and rounding of the product
    assert bool((off[:fine] <= step[:fine] * 0.51 / 127).all())
    coded, plain = (Basis(x, random(N, seed=seed + 2), unit**-2, SHAPES) for x in (axes, axes.full()))
    layers = group(seed)
    z = plain.project(flat(layers))
    torch.testing.assert_close(coded.project(flat(layers)), z)
    for layer in range(len(SHAPES)):
        torch.testing.assert_close(coded.keys(z, layer), plain.keys(z, layer))
        torch.testing.assert_close(coded.values(z, layer), plain.values(z, layer))
        for keys in (True, False):
            (packed, mean), (numbers, same) = coded.cut(layer, keys), plain.cut(layer, keys)
            assert isinstance(packed, PackedAxes)
            torch.testing.assert_close(packed.full(), numbers)
            torch.testing.assert_close(packed.full(1), numbers[:, :1])
            assert packed.shape == numbers.shape
            assert torch.equal(mean, same)


def test_leading_axes_share_memory():
    axes = Axes.of(torch.linalg.qr(random(N, N)).Q, torch.ones(N), widths(SHAPES), 2)
    assert axes.leading(5).codes.data_ptr() == axes.codes.data_ptr()
    assert torch.equal(axes.leading(5).full(), axes.full()[:5])


def test_an_axis_that_is_nothing_in_a_head_is_nothing_in_codes():
    axes = Axes.of(torch.zeros(2, N), torch.ones(N), widths(SHAPES), 1)
    assert torch.equal(axes.full(), torch.zeros(2, N))


def test_numbers_of_a_layer_out_of_flat_ones():
    layers = group()
    for layer, kv in enumerate(layers):
        again = split(flat(layers), SHAPES, layer)
        assert torch.equal(again.keys, kv.keys)
        assert torch.equal(again.values, kv.values)
