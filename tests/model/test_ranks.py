"""Which processes share the heads of a model is told by the mesh of its weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvstack import BindError, KVStack, Quant
from kvstack.heads import ALONE
from kvstack.model.attention import parameters
from kvstack.model.ranks import heads_of
from kvstack.testing import tiny_model


def mesh(**sizes):
    """A stand-in for a mesh with these dimensions."""
    each = list(sizes.values())
    return SimpleNamespace(mesh_dim_names=tuple(sizes), ndim=len(each), size=lambda axis: each[axis])


def test_a_model_in_one_process():
    assert heads_of(tiny_model()) is ALONE


@pytest.mark.parametrize("names", [{"tp": 1}, {"fsdp": 2, "tp": 1}, {"dp_replicate": 2, "fsdp": 2}])
def test_processes_that_read_other_texts(names):
    model = tiny_model()
    model._device_mesh = mesh(**names)
    assert heads_of(model) is ALONE


@pytest.mark.parametrize("names", [{"pp": 2, "tp": 1}, {"model": 2}])
def test_a_mesh_that_is_not_known_is_refused(names):
    model = tiny_model()
    model._device_mesh = mesh(**names)
    with pytest.raises(BindError, match=f"spread over processes along a mesh dimension named '{next(iter(names))}'"):
        KVStack([Quant(4)], model=model)


def test_a_mesh_without_names_is_refused():
    model = tiny_model()
    model._device_mesh = SimpleNamespace(mesh_dim_names=None, ndim=1, size=lambda axis: 2)
    with pytest.raises(BindError, match="a mesh dimension named None"):
        KVStack([Quant(4)], model=model)


def test_a_forward_that_takes_anything_has_the_arguments_of_its_class():
    module = tiny_model().model.layers[0].self_attn
    known = list(parameters(module))
    forward = module.forward

    def anything(*args, **kwargs):
        return forward(*args, **kwargs)

    module.forward = anything
    assert list(parameters(module)) == known
    assert "past_key_values" in known
    assert list(parameters(torch.nn.Linear(1, 1))) == ["input"]
