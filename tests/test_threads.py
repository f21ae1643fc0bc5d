"""Stacks come and go in some threads while others run forwards: nobody notices, and nothing is left."""

import contextlib
import copy
import gc
import itertools
import os
import sys
import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvstack import Evict, KVStack, Quant, UseError
from kvstack.model.hooks import running
from kvstack.model.rest import at_rest
from tests import tiny
from tests.stages import Third

FORWARDS = int(os.environ.get("KVSTACK_SOAK", "60"))
"""Dense forwards beside the stacks; 2,000 and more for an hour of doubt."""


@pytest.fixture
def switching():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def model():
    return copy.deepcopy(tiny.model("llama"))


def left_on(model):
    """What is left of a stack on a model and in the libraries."""
    modules = [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._forward_pre_hooks_with_kwargs
        or module._forward_hooks_always_called
    ]
    everywhere = [*nn.modules.module._global_forward_pre_hooks.values(), *nn.modules.module._global_forward_hooks]
    return modules, everywhere, ALL_ATTENTION_FUNCTIONS._local_mapping, type(ALL_ATTENTION_FUNCTIONS)


NOTHING = ([], [], {}, AttentionInterface)


def together(*works):
    """Run each of `works` again and again in a thread of its own until the first of them has ended; their errors."""
    stop, errors = threading.Event(), []

    def guarded(work, once):
        torch.set_grad_enabled(False)
        try:
            for _ in range(1) if once else itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                work()
        except BaseException as error:
            errors.append(error)
        finally:
            if once:
                stop.set()

    threads = [threading.Thread(target=guarded, args=(work, i == 0)) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_forwards_beside_stacks_that_come_and_go(model, switching, attention):
    model.set_attn_implementation(attention)
    ids = tiny.tokens(1, 12)
    expected = model(ids, past_key_values=DynamicCache()).logits

    def dense():
        for _ in range(FORWARDS):
            assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, expected)

    def stacks():
        model(tiny.tokens(1, 90), past_key_values=KVStack([Quant(4)]))
        KVStack([Quant(4)])

    def shared():
        model(ids, past_key_values=KVStack([Third()], model=model))

    def collected():
        stack = KVStack([Evict(0.5)], model=model)
        stack.itself = stack  # only the garbage collector ends it, somewhere
        del stack

    assert together(dense, stacks, stacks, shared, collected) == []
    gc.collect()
    assert left_on(model) == NOTHING
    assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, expected)


def test_two_stacks_of_one_model_in_two_threads(model, switching):
    ids = tiny.tokens(1, 100)

    def texts():
        stack = KVStack([Quant(4), Evict(0.5)], sinks=2, window=8)
        logits = [model(ids[:, :90], past_key_values=stack).logits[:, -1]]
        return torch.stack(
            logits + [model(ids[:, i : i + 1], past_key_values=stack).logits[:, -1] for i in range(90, 100)]
        )

    expected = texts()

    def same():
        for _ in range(5):
            assert torch.equal(texts(), expected)

    assert together(same, same, same) == []
    gc.collect()
    assert left_on(model) == NOTHING


def test_a_stack_unbound_while_its_forward_runs_says_so(model):
    ids = tiny.tokens(1, 60)
    expected = model(ids, past_key_values=DynamicCache()).logits
    for layer, inside in itertools.product((0, 2), ("q_proj", "o_proj")):
        stack = KVStack([Quant(4)], model=model)
        module = getattr(model.model.layers[layer].self_attn, inside)

        def meanwhile(*_, unbind=stack.unbind):
            assert together(unbind) == []

        handle = module.register_forward_pre_hook(meanwhile)
        with pytest.raises(UseError, match="bound to a LlamaForCausalLM"):
            model(ids, past_key_values=stack)
        handle.remove()
        assert left_on(model) == NOTHING
        assert running() is None
        assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, expected)
        with pytest.raises(UseError):
            model(ids, past_key_values=stack)


def test_an_interrupt_in_one_thread_leaves_the_others_alone(model, switching):
    ids = tiny.tokens(1, 20)
    interrupted = threading.local()

    def stop(*_):
        if getattr(interrupted, "here", False):
            raise KeyboardInterrupt

    handle = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(stop)
    kept = [KVStack([Evict(0.5)], model=model)]
    model(ids, past_key_values=kept[0])
    expected = model(ids, past_key_values=copy.deepcopy(kept[0])).logits

    def steps():
        for _ in range(20):
            assert torch.equal(model(ids, past_key_values=copy.deepcopy(kept[0])).logits, expected)

    def stopped():
        interrupted.here = True
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=KVStack([Quant(4)]))
        assert running() is None

    assert together(steps, stopped, stopped) == []
    handle.remove()
    kept.clear()
    gc.collect()
    assert left_on(model) == NOTHING


# ---- torch collects hooks, then calls them one by one: what may happen in between


def hooks_of(model):
    """Hooks as torch has collected them when another thread comes between."""
    modules = [*model.modules()]
    before = [(module, hook) for module in modules for hook in module._forward_pre_hooks.values()]
    return before + [
        (module, hook) for module in modules for hook in nn.modules.module._global_forward_pre_hooks.values()
    ]


@pytest.mark.parametrize("bound", [True, False])
def test_a_hook_that_is_called_after_it_was_removed_does_nothing(model, bound):
    stack = KVStack([Third()], model=model if bound else None)
    model(tiny.tokens(1, 9))
    collected = hooks_of(model)
    assert collected
    del stack
    gc.collect()
    for module, hook in collected:
        assert hook(module, ()) is None
    assert left_on(model) == NOTHING


def test_no_look_up_fails_or_changes_while_a_stack_comes_and_goes(model, switching):
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def look_up():
        for _ in range(20 * FORWARDS):
            assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is original

    def stacks():
        model(tiny.tokens(1, 3), past_key_values=KVStack([Quant(4)]))

    assert together(look_up, stacks) == []


def test_models_that_share_modules(model):
    """Both orders of ending: the inner model's stack first, and the outer one's."""
    for first in (0, 1):
        stacks = [KVStack([Quant(4)], model=inner) for inner in (model, model.model)]
        del stacks[first]
        model.model(tiny.tokens(1, 9), past_key_values=stacks[0]) if first == 0 else None
        stacks.clear()
        gc.collect()
        assert left_on(model) == NOTHING


# ---- interrupts between any two lines


def interrupted_at(step, work):
    """Run `work`, and raise KeyboardInterrupt at the `step`th line of kvstack/model that it reaches: where
    that was."""
    count, reached = itertools.count(), []

    def trace(frame, event, arg):
        code = frame.f_code
        # Python itself drops an interrupt that falls into a finalizer, and what that had to do
        if f"{os.sep}kvstack{os.sep}model{os.sep}" not in code.co_filename or code.co_name == "soon":
            return None
        if event == "line" and next(count) == step:
            reached.append(f"{code.co_qualname}, line {frame.f_lineno}")
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            work()
    finally:
        sys.settrace(None)
    return reached


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_of_the_hooks_leaves_nothing(model):
    ids = tiny.tokens(1, 6)
    expected = model(ids, past_key_values=DynamicCache()).logits

    def work():
        model(ids, past_key_values=KVStack([Quant(4)]))

    gc.collect()
    gc.freeze()  # what was there before need not be looked at again and again
    for step in itertools.count(step=37):
        reached = interrupted_at(step, work)
        gc.collect()
        assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, expected)
        assert left_on(model) == NOTHING, reached
        if not reached:
            break
    gc.unfreeze()
    assert step > 300


def test_a_model_at_rest_beside_stacks_that_come_and_go(model, switching):
    def resting():
        for _ in range(FORWARDS):
            with at_rest(model):
                pass

    def bound():
        KVStack([Quant(4)], model=model)

    def collected():
        stack = KVStack([Evict(0.5)], model=model)
        stack.itself = stack
        del stack
        gc.collect()

    assert together(resting, bound, collected) == []
    gc.collect()
    assert left_on(model) == NOTHING
