"""A stack's hooks do nothing to anyone else, and go when the stack goes."""

import copy
import gc
import threading
import time

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstack import BindError, Evict, KVStack, Quant, UseError
from kvstack.model import hooks
from tests import tiny


def footprint(model):
    """Everything of torch, transformers and a model that a stack might have changed."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    functions = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    return hooks, functions, len(nn.modules.module._global_forward_pre_hooks), model.config._attn_implementation


def fresh(attention="sdpa"):
    return copy.deepcopy(tiny.model("llama", attention))


def run(model, ids, cache=None):
    cache = DynamicCache() if cache is None else cache
    first = model(ids[:, :-1], past_key_values=cache).logits
    return torch.cat([first, model(ids[:, -1:], past_key_values=cache).logits], dim=1)


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_is_left(attention, bound):
    model = fresh(attention)
    before = footprint(model)
    stack = KVStack([Quant(4), Evict(0.5)], model=model if bound else None)
    run(model, tiny.tokens(1, 120), stack)
    assert footprint(model)[1:] == before[1:]
    assert footprint(model) != before
    del stack
    gc.collect()
    assert footprint(model) == before


def test_a_stack_that_never_ran_leaves_nothing():
    model = fresh()
    before = footprint(model)
    stack = KVStack([Quant(4)])
    run(model, tiny.tokens(1, 20))  # the stack waits, but this is not its forward
    del stack
    gc.collect()
    assert footprint(model) == before


def test_others_do_not_notice():
    """Another cache on the same model, and another model: equal bit for bit before, during and after."""
    model, other = fresh(), tiny.model("qwen2")
    ids = tiny.tokens(2, 100)
    expected = run(model, ids), run(other, ids)
    stack = KVStack([Evict(0.3), Quant(2)], sinks=2, window=8)
    waiting = KVStack([Quant(2)])
    during = run(model, ids), run(other, ids)
    run(model, ids, stack)
    while_used = run(model, ids), run(other, ids)
    del stack, waiting
    gc.collect()
    after = run(model, ids), run(other, ids)
    for found in (during, while_used, after):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_binds_to_the_model_it_is_given_to():
    """Another model may run first."""
    first, second = tiny.model("qwen2"), fresh()
    stack = KVStack([Quant(4)])
    run(first, tiny.tokens(1, 20))
    run(second, tiny.tokens(1, 20), stack)
    assert stack.binding.model is second


def test_binds_inside_the_first_call_of_a_bare_base_model():
    model = fresh()
    stack = KVStack([Evict(0.5)], sinks=2, window=8)
    model.model(tiny.tokens(1, 60), past_key_values=stack)
    assert stack.held < 60


def test_two_stacks_on_one_model_take_turns():
    model = fresh()
    ids = tiny.tokens(1, 90)
    make = lambda: KVStack([Evict(0.4), Quant(4)], sinks=2, window=8)  # noqa: E731
    expected = run(model, ids, make())
    one, other = make(), make()
    for stack in (one, other):
        model(ids[:, :-1], past_key_values=stack)
    assert torch.equal(model(ids[:, -1:], past_key_values=other).logits[:, -1], expected[:, -1])
    del other
    gc.collect()
    assert torch.equal(model(ids[:, -1:], past_key_values=one).logits[:, -1], expected[:, -1])


def test_two_threads():
    """Two models of one architecture share the function registry that a stack steps into."""
    models = [fresh(), fresh()]
    ids = tiny.tokens(1, 80)
    make = lambda: KVStack([Evict(0.4)], sinks=2, window=8)  # noqa: E731
    expected = run(models[0], ids, make())
    plain = run(models[1], ids)
    found, errors = {}, []

    def work(name, cache):
        try:
            with torch.no_grad():
                found[name] = [run(models[name != "stack"], ids, cache()) for _ in range(8)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in (("stack", make), ("dense", DynamicCache))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(x, expected) for x in found["stack"])
    assert all(torch.equal(x, plain) for x in found["dense"])
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_threads_that_bind_at_once_share_the_hooks(monkeypatch):
    model = fresh()
    before = footprint(model)
    ready = threading.Barrier(4)
    make = hooks.ModelHooks.__init__

    def slow(self, model):
        time.sleep(0.1)  # the others ask for hooks meanwhile
        make(self, model)

    monkeypatch.setattr(hooks.ModelHooks, "__init__", slow)
    stacks = []

    def work():
        stack = KVStack([Quant(4)])
        ready.wait(timeout=60)
        stacks.append(stack.bind(model))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stacks) == 4
    assert footprint(model)[0] == [(1, 1) if hasattr(m, "layer_idx") else (0, 0) for m in model.modules()]
    stacks.clear()
    gc.collect()
    assert footprint(model) == before


def test_an_exception_in_attention_leaves_no_function_behind(monkeypatch):
    model = fresh()
    stack = KVStack([Quant(4)])
    run(model, tiny.tokens(1, 10), stack)
    monkeypatch.setattr(model.model.layers[2].self_attn.o_proj, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, tiny.tokens(1, 10), stack)
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_stack_serves_one_model():
    stack = KVStack([Quant(4)])
    run(fresh(), tiny.tokens(1, 10), stack)
    other = fresh()
    with pytest.raises(UseError, match=r"bound to a LlamaForCausalLM.*make a new KVStack"):
        run(other, tiny.tokens(1, 10), stack)
    with pytest.raises(BindError, match=r"make a new stack"):
        stack.bind(other)


def test_a_copy_is_its_own():
    model = fresh()
    ids = tiny.tokens(1, 100)
    stack = KVStack([Evict(0.4), Quant(4)], sinks=2, window=8)
    model(ids[:, :90], past_key_values=stack)
    twin = copy.deepcopy(stack)
    one = model(ids[:, 90:], past_key_values=stack).logits
    assert twin.seen == 90
    assert torch.equal(model(ids[:, 90:], past_key_values=twin).logits, one)


def test_importing_changes_nothing():
    import subprocess
    import sys

    code = (
        "import torch, transformers.modeling_utils as m;"
        "f = lambda: (dict(m.ALL_ATTENTION_FUNCTIONS), dict(m.AttentionInterface._global_mapping),"
        " len(torch.nn.modules.module._global_forward_pre_hooks), transformers_cache());"
        "import transformers.cache_utils as c; transformers_cache = lambda: dict(c.DYNAMIC_LAYER_TYPE_MAPPING);"
        "before = f(); import kvstack; assert f() == before; import sys; assert 'bitsandbytes' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
