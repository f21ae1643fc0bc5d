"""Rotary embedding: forwards, backwards, and its transpose."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvstack.model.attention import attention_modules
from kvstack.model.rope import find_ropes
from tests import tiny


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=12, unique=True), st.sampled_from(["llama", "phi3", "gpt_neox"])
)
def test_unrotating_and_rotating_is_the_identity(positions, name):
    model = tiny.model(name)
    rope = find_ropes(model, attention_modules(model))[0]
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
    rope = find_ropes(model, attention_modules(model))[0]
    where = torch.arange(5, 11)[None, None]
    keys, gradient = random(1, 2, 6, 16), random(1, 2, 6, 16, seed=1)
    here, there = (gradient * rope.rotate(keys, where)).sum(), (rope.pull(gradient, where) * keys).sum()
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-4)
