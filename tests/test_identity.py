"""The first test of all: a stack without stages equals `DynamicCache`, bit for bit."""

import pytest
import torch
from transformers import DynamicCache

from kvstack import Evict, KVStack, Quant
from tests import tiny

ATTENTION = ["sdpa", "eager"]


def pair(model):
    return DynamicCache(config=model.config), KVStack()


def logits(model, ids, cache, **kwargs):
    return model(ids, past_key_values=cache, **kwargs).logits


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_prefill_and_decode(name, attention):
    model = tiny.model(name, attention)
    ids = tiny.tokens(2, 50)
    dense, stack = pair(model)
    assert torch.equal(logits(model, ids[:, :37], dense), logits(model, ids[:, :37], stack))
    for i in range(37, 50):
        assert torch.equal(logits(model, ids[:, i : i + 1], dense), logits(model, ids[:, i : i + 1], stack))
    assert stack.get_seq_length() == stack.held == 50


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_chunks(name, attention):
    model = tiny.model(name, attention)
    ids = tiny.tokens(2, 60)
    dense, stack = pair(model)
    for chunk in ids.split(17, dim=1):
        assert torch.equal(logits(model, chunk, dense), logits(model, chunk, stack))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_left_padding(name, attention):
    model = tiny.model(name, attention)
    ids, mask = tiny.left_padded([30, 21, 9])
    dense, stack = pair(model)
    generate = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    generate |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, past_key_values=dense, **generate)
    given = model.generate(ids, past_key_values=stack, **generate)
    assert torch.equal(expected.sequences, given.sequences)
    for one, other in zip(expected.logits, given.logits, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", tiny.MODES)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_generate(name, mode):
    model = tiny.model(name)
    ids = tiny.tokens(1, 25).repeat(1, 2)
    found = []
    for cache in pair(model):
        torch.manual_seed(3)
        found.append(model.generate(ids, past_key_values=cache, max_new_tokens=15, **tiny.MODES[mode]))
    assert torch.equal(*found)


@pytest.mark.parametrize("stage", [Evict(1.0), Evict(10_000), Evict(1.0, score="h2o")], ids=repr)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_keeping_everything_changes_nothing(name, stage):
    model = tiny.model(name)
    ids = tiny.tokens(2, 90)
    dense, stack = DynamicCache(config=model.config), KVStack([stage], sinks=2, window=8, block=8)
    for chunk in ids.split([70, 1, 1, 9, 9], dim=1):
        assert torch.equal(logits(model, chunk, dense), logits(model, chunk, stack))


def test_tokens_on_the_grid_survive_exactly():
    """Values that a quantizer can represent lose nothing in the whole pipeline."""
    model = tiny.model("llama")
    stack = KVStack([Quant(8, group=8)], sinks=0, window=0, block=8)
    keys = torch.randint(0, 256, (1, 2, 16, 16)).float()
    keys[:, :, ::8], keys[:, :, 1::8] = 0, 255  # every group spans the whole range, so its step is 1
    values = torch.randint(0, 256, (1, 2, 16, 16)).float()
    values[..., ::8], values[..., 1::8] = 0, 255
    one = torch.zeros(1, 2, 1, 16)
    for layer in range(model.config.num_hidden_layers):
        stack.update(keys, values, layer)
    for layer in range(model.config.num_hidden_layers):
        read_keys, read_values = stack.update(one, one, layer)
        assert torch.equal(read_keys[:, :, :16], keys)
        assert torch.equal(read_values[:, :, :16], values)
