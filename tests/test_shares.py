"""Transforms that let a layer read what an earlier one holds. The package kvstack-kvsharer tests what comes of it."""

from dataclasses import dataclass

import pytest
import torch

from kvstack import BindError, Evict, KVStack, Quant, Transform, UseError
from kvstack.testing import check_stage, tiny_model

from . import tiny


@dataclass(frozen=True, repr=False)
class Third(Transform):
    """Layer `deeper` reads layer `earlier`."""

    deeper: int = 3
    earlier: int = 1
    name = "third"
    layers = 1

    @property
    def shares(self):
        return {self.deeper: self.earlier}


def test_contract():
    check_stage(Third())
    with pytest.raises(AssertionError, match="layer 1 reads layer 3, which is not earlier"):
        check_stage(Third(1, 3))


def test_a_layer_that_reads_another_holds_nothing():
    model = tiny_model()
    stack = KVStack([Third(), Quant(4), Evict(0.5)])
    model.generate(tiny.tokens(2, 300), past_key_values=stack, max_new_tokens=10, do_sample=False)
    assert [layer for store in stack._cohorts[0].stores for layer in store.layers] == [0, 1, 2]
    assert torch.equal(stack.read(3).keys, stack.read(1).keys)
    assert torch.equal(stack.positions(3), stack.positions(1))
    assert stack.compressed_layers == [0, 1, 2, 3]
    assert stack.dense_nbytes == 2 * 309 * 4 * 2 * 2 * 16 * 4


def test_groups_of_layers_that_are_left():
    stack = KVStack([Third(1, 0), Evict(0.5, layers=2)], model=tiny_model(num_hidden_layers=5))
    assert stack._groups == [[0, 2], [3, 4]]
    assert stack._ends == [2, 4]


@pytest.mark.parametrize(("layer", "other"), [(3, 3), (1, 3), (4, 0), (3, -1)])
def test_a_layer_reads_an_earlier_one(layer, other):
    with pytest.raises(BindError, match=rf"lets layer {layer} of LlamaForCausalLM read layer {other}\. A"):
        KVStack([Third(layer, other)], model=tiny_model())


def test_a_stack_without_a_model_cannot_tell_who_reads_whom():
    with pytest.raises(UseError, match="does not know its model, which this stack needs"):
        KVStack([Third()]).update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
