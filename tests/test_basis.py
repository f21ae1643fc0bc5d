"""The arithmetic of one latent for a group of layers."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvstack.calibration.axes import Basis, flat
from kvstack.calibration.calibration import GroupAxes, orthonormal
from kvstack.model.attention import attention_modules
from kvstack.model.rope import find_ropes
from kvstack.types import KV

from . import tiny

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


def test_axes_stored_as_halves_are_orthonormal_again():
    axes = torch.linalg.qr(random(64, 64)).Q.half()
    made = GroupAxes((0,), SHAPES, torch.zeros(64), torch.ones(64), axes, torch.ones(64))
    product = orthonormal(made.axes.float())
    torch.testing.assert_close(product @ product.T, torch.eye(64), atol=1e-5, rtol=0)


@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=12, unique=True), st.sampled_from(["llama", "phi3", "gpt_neox"])
)
def test_unrotating_and_rotating_is_the_identity(positions, name):
    model = tiny.model(name)
    rope = find_ropes(model, attention_modules(model), ["full_attention"] * 4)[0]
    where = torch.tensor(sorted(positions), dtype=torch.int32)[None, None]
    keys = random(2, 2, len(positions), 16)
    torch.testing.assert_close(rope.rotate(rope.unrotate(keys, where), where), keys, atol=1e-4, rtol=1e-4)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
SCALED = [("llama", {}), ("llama", {"rope_parameters": YARN}), ("stablelm", {})]


@pytest.mark.parametrize(("name", "changes"), SCALED, ids=str)
def test_a_gradient_is_pulled_back_by_the_transpose(name, changes):
    """Also where attention is scaled, or a part of each head is not rotated."""
    config_type, model_type, own = tiny.MODELS[name]
    model = model_type(config_type(**(tiny.SHAPE | own | changes))).eval()
    rope = find_ropes(model, attention_modules(model), ["full_attention"] * 4)[0]
    where = torch.arange(5, 11)[None, None]
    keys, gradient = random(1, 2, 6, 16), random(1, 2, 6, 16, seed=1)
    here, there = (gradient * rope.rotate(keys, where)).sum(), (rope.pull(gradient, where) * keys).sum()
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-4)
