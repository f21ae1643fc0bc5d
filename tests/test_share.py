"""Layers that read what an earlier one holds. The package kvstack-kvsharer tests what comes of it."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from kvstack import BindError, Evict, KVStack, Quant, Share, UseError, binding
from kvstack.testing import check_stage, tiny_model
from tests import tiny
from tests.stages import Pairs, Third


def test_contract():
    check_stage(Third())
    with pytest.raises(AssertionError, match="layer 1 reads layer 3, which is not earlier"):
        check_stage(Third(1, 3))


def test_a_layer_that_reads_another_holds_nothing():
    model = tiny_model()
    stack = KVStack([Third(), Quant(4), Evict(0.5)])
    model.generate(tiny.tokens(2, 300), past_key_values=stack, max_new_tokens=10, do_sample=False)
    assert [layer for store in stack.batch.cohorts[0].stores for layer in store.layers] == [0, 1, 2]
    assert torch.equal(stack.read(3).keys, stack.read(1).keys)
    assert torch.equal(stack.positions(3), stack.positions(1))
    assert stack.compressed_layers == [0, 1, 2, 3]
    assert stack.dense_nbytes == 2 * 309 * 4 * 2 * 2 * 16 * 4


def test_groups_of_layers_that_are_left():
    stack = KVStack([Third(1, 0), Evict(0.5, layers=2)], model=tiny_model(num_hidden_layers=5))
    assert stack.binding.groups == [[0, 2], [3, 4]]
    assert stack.binding.ends == [2, 4]


@pytest.mark.parametrize(("layer", "other"), [(3, 3), (1, 3), (4, 0), (3, -1)])
def test_a_layer_reads_an_earlier_one(layer, other):
    with pytest.raises(BindError, match=rf"lets layer {layer} of LlamaForCausalLM read layer {other}\. A"):
        KVStack([Third(layer, other)], model=tiny_model())


def test_a_stack_without_a_model_cannot_tell_who_reads_whom():
    with pytest.raises(UseError, match="does not know its model, which this stack needs"):
        KVStack([Third()]).update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)


def test_shares_are_settled_when_it_is_bound(monkeypatch):
    model = tiny_model()
    stack = KVStack([Third()])
    assert stack.binding is None
    assert stack.bind(model).binding.shares == {3: 1}
    monkeypatch.setattr(binding, "gives_queries", lambda module: False)
    with pytest.raises(BindError, match=r"lets layers read each other's keys and values, and the attention of Llama"):
        KVStack([Third()], model=model)


def test_layers_of_other_shapes():
    model = tiny_model()
    wide = copy.deepcopy(model.config)
    wide.num_key_value_heads = 4
    model.model.layers[3].self_attn = LlamaAttention(wide, 3).eval()
    message = r"layer 3 of LlamaForCausalLM read layer 1: they hold 4 heads of 16 \+ 16 numbers on cpu and 2 heads"
    with pytest.raises(BindError, match=message):
        KVStack([Third()], model=model)
    assert KVStack([Third(2, 1)], model=model).binding.shares == {2: 1}


def test_layers_on_other_devices(monkeypatch):
    model = tiny_model()
    KVStack([Third()], model=model)
    model.model.layers[3].self_attn.to("meta")
    with pytest.raises(BindError, match=r"they hold .* on meta and .* on cpu\. Leave .* out, or pair layers alike"):
        KVStack([Third()], model=model)


@dataclass(frozen=True, repr=False)
class Two(Share):
    """Both."""

    both: tuple
    name = "two"

    def bind(self, model):
        return {layer: source for one in self.both for layer, source in one.bind(model).items()}


def test_a_transform_stores_the_layers_that_are_left():
    """Four kinds in one stack: the groups of the transform are those of the layers that hold something."""
    model = tiny_model(num_hidden_layers=6)
    stack = KVStack([Two((Third(3, 1), Third(4, 0))), Pairs(), Quant(8), Evict(0.5)], model=model)
    model.generate(tiny.tokens(2, 300), past_key_values=stack, max_new_tokens=10, do_sample=False)
    assert [store.layers for store in stack.batch.cohorts[0].stores] == [[0, 1], [2, 5]]
    assert torch.equal(stack.read(3).keys, stack.read(1).keys)
    assert torch.equal(stack.positions(4), stack.positions(0))
    assert {part for _, part in stack.batch.cohorts[0].stores[0].packed} == {"mean", "half"}


def test_layers_that_are_left_must_divide():
    with pytest.raises(BindError, match=r"Pairs\(\) stores 2 layers together, and 3 layers of Llama.* one of \[1, 3\]"):
        KVStack([Third(), Pairs()], model=tiny_model())
