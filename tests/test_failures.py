"""A forward that is stopped anywhere leaves the model clean for every other cache, and the stack refuses to go on."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstack import Evict, KVStack, Quant, UseError
from kvstack.batch import Batch
from kvstack.model.hooks import running
from kvstack.testing import tiny_model
from tests import tiny
from tests.stages import Pairs

STAGES = [Quant(4), Evict(0.5)]


class Stopped(Exception):
    pass


def places(model):
    """Where a forward may be stopped: modules inside attention, attention itself, what comes before and after."""
    layer = model.model.layers[2]
    return {
        "embedding": model.model.embed_tokens,
        "projection": layer.self_attn.q_proj,
        "output": layer.self_attn.o_proj,
        "mlp": layer.mlp,
        "last layer": model.model.layers[-1].self_attn.o_proj,
    }


def stopped_at(model, place, error, stack, ids):
    def stop(*args):
        raise error

    handle = places(model)[place].register_forward_pre_hook(stop)
    try:
        with pytest.raises(error):
            model(ids, past_key_values=stack)
    finally:
        handle.remove()


ERRORS = [KeyboardInterrupt, SystemExit, Stopped, torch.OutOfMemoryError]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("place", places(tiny_model()))
def test_a_stopped_forward(place, error):
    model, ids = tiny_model(), tiny.tokens(1, 200)
    expected = model(ids, past_key_values=DynamicCache()).logits
    before = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    stack = KVStack(STAGES, model=model)
    stopped_at(model, place, error, stack, ids)
    assert (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)) == before
    assert running() is None
    assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, expected)
    if place != "embedding":  # before any layer was fed
        for go_on in (
            lambda: model(ids, past_key_values=stack),
            lambda: stack.crop(-1),
            lambda: stack.reorder_cache(torch.tensor([0])),
            lambda: copy.deepcopy(stack),
        ):
            with pytest.raises(UseError, match=r"the last forward of this cache did not end.* Call reset\(\)"):
                go_on()
        stack.reset()
    fresh = KVStack(STAGES, model=model)
    for cache in (stack, fresh):
        model(ids, past_key_values=cache)
    new = tiny.tokens(1, 1)
    assert torch.equal(model(new, past_key_values=stack).logits, model(new, past_key_values=fresh).logits)


def test_a_stopped_stack_can_be_freed():
    model = tiny_model()
    stack = KVStack(STAGES, model=model)
    stopped_at(model, "output", KeyboardInterrupt, stack, tiny.tokens(1, 50))
    gone = weakref.ref(stack)
    del stack
    gc.collect()
    assert gone() is None
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_error_while_sealing_loses_nothing_in_silence(monkeypatch):
    model, ids = tiny_model(), tiny.tokens(1, 300)
    stack = KVStack([Quant(4)], model=model)

    def full(self, x, role):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Quant, "encode", full)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids, past_key_values=stack)
    with pytest.raises(UseError, match="did not end"):
        model(tiny.tokens(1, 1), past_key_values=stack)
    stack.reset()
    model(ids, past_key_values=stack)
    assert stack.seen == 300


def test_a_copy_of_the_model_has_forwards_of_its_own():
    model, ids = tiny_model(), tiny.tokens(1, 20)
    stack = KVStack([Quant(4)], model=model)
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.v_proj.weight.data.zero_()
    assert not torch.equal(model(ids).logits, other(ids).logits)
    stack.unbind()
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_that_others_wrapped_meanwhile_stays_wrapped():
    model, ids = tiny_model(), tiny.tokens(1, 20)
    expected = model(ids).logits
    stack = KVStack([Quant(4)], model=model)
    attention, calls = model.model.layers[0].self_attn, []
    inside = attention.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return inside(*args, **kwargs)

    attention.forward = forward
    stack.unbind()
    assert torch.equal(model(ids).logits, expected)
    assert calls == [1]


def test_the_outermost_model_is_the_one_a_stack_is_bound_to():
    """Also when the inner model ran before, by itself or with the stack."""
    for first in (lambda model, stack: model.model(tiny.tokens(1, 9)), lambda model, stack: model(tiny.tokens(1, 9))):
        model = tiny_model()
        stack = KVStack([Quant(4)])
        first(model, stack)
        model(tiny.tokens(1, 100), past_key_values=stack)
        assert stack.binding.model is model
    stack = KVStack([Quant(4)])
    model(tiny.tokens(1, 9))
    model.model(tiny.tokens(1, 100), past_key_values=stack)
    assert stack.binding.model is model


@pytest.mark.parametrize("where", ["begin", "place"])
def test_an_interrupt_while_a_forward_begins(where, monkeypatch):
    model, stack = tiny_model(), KVStack([Pairs()], sinks=2, window=6)
    model(tiny.tokens(1, 40), past_key_values=stack)
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(Batch, where, stop)
        with pytest.raises(KeyboardInterrupt):
            model(tiny.tokens(1, 8), past_key_values=stack)
    with pytest.raises(UseError, match="the last forward of this cache did not end"):
        model(tiny.tokens(1, 3), past_key_values=stack)
    stack.reset()
    found = model(tiny.tokens(1, 9), past_key_values=stack).logits
    assert torch.equal(found, model(tiny.tokens(1, 9), past_key_values=DynamicCache()).logits)
