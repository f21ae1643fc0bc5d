"""A model that torch.compile has compiled gives the output of the same model uncompiled."""

import copy

import pytest
import torch

from kvstack import Evict, KVStack, Quant
from tests import tiny

IDS = tiny.tokens(1, 80)


def small(model=None):
    return KVStack([Quant(4, group=8), Evict(0.5)], model=model, sinks=2, window=8, block=8)


def whole(model):
    return torch.compile(model, backend="eager")


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def in_place(model):
    model.compile(backend="eager")
    return model


def decoder(model):
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    return model


def layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def attention(model):
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    return model


@pytest.mark.filterwarnings("ignore")  # torch says that it sees hooks
@pytest.mark.parametrize("bound", [None, "before", "after"])
@pytest.mark.parametrize("way", [whole, forward, in_place, decoder, layers, attention], ids=lambda way: way.__name__)
def test_a_compiled_model_is_the_same(way, bound):
    torch._dynamo.reset()
    model = copy.deepcopy(tiny.model("llama"))
    plain = small()
    expected = model.generate(IDS, past_key_values=plain, max_new_tokens=12)
    with torch.no_grad():
        logits = model(IDS[:, :20], past_key_values=plain).logits
    plain.unbind()  # the hooks come again
    stack = small(model) if bound == "before" else None
    compiled = way(model)
    stack = stack or small(model if bound == "after" else None)
    found = compiled.generate(IDS, past_key_values=stack, max_new_tokens=12)
    assert torch.equal(found, expected)
    assert stack.held < stack.seen
    with torch.no_grad():
        assert torch.equal(compiled(IDS[:, :20], past_key_values=stack).logits, logits)


@pytest.mark.filterwarnings("ignore")
def test_one_graph_of_the_whole_model_is_refused_by_torch_with_the_fix():
    torch._dynamo.reset()
    model = copy.deepcopy(tiny.model("llama"))
    stack = small(model)
    with pytest.raises(Exception, match="Leave out fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(IDS, past_key_values=stack)
    assert not stack.seen
