"""A change of a cache is stopped at any operation of torch, as full memory or Ctrl-C would stop it: the cache is as it
was before, or refuses to go on. It never goes on with other numbers."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvstack import CommonKV, Evict, KVStack, Quant, UseError
from tests import tiny
from tests.stages import Centred, Pairs


class Stopping(TorchFunctionMode):
    """Raises `error` at the operation number `at`."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error, self.count = at, error, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch._C._set_grad_enabled:  # of `no_grad`, which ends when all is done
            self.count += 1
            if self.count == self.left:
                raise self.error("stopped")
        return function(*args, **(kwargs or {}))


def full_first():
    """Behind the last layer with full attention comes another one."""
    kinds = ["full_attention", "sliding_attention"] * 2
    torch.manual_seed(0)
    changes = {"head_dim": 16, "sliding_window": 16, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(**(tiny.SHAPE | changes))).eval()


MODELS = {
    "llama": lambda: tiny.model("llama"),
    "gemma3": lambda: tiny.model("gemma3"),
    "full first": full_first,
    "qwen3_next": lambda: tiny.model("qwen3_next"),
}
STACKS = {
    "none": lambda: [],
    "quant": lambda: [Quant(8)],
    "h2o": lambda: [Evict(0.4, "h2o", layers=1)],
    "snapkv": lambda: [Evict(0.4), Quant(8)],
    "heads": lambda: [Evict(0.4, "keydiff", budgets="heads")],
    "refit": lambda: [Evict(0.4, refit=True), Quant(8)],
    "kvzip": lambda: [Evict(0.4, "kvzip")],
    "pairs": lambda: [Pairs(), Quant(8)],
    "fitted": lambda: [Centred(far=1e-3), Quant(8)],
    "mean": lambda: [CommonKV(0.5, layers=2, basis="weights", merge="mean"), Quant(8)],
}
CHANGES = {
    "crop": lambda model, stack: stack.crop(-30),
    "crop 1": lambda model, stack: stack.crop(-1),
    "reorder": lambda model, stack: stack.reorder_cache(torch.tensor([1, 0])),
    "select": lambda model, stack: stack.batch_select_indices([1, 1]),
    "save": lambda model, stack: stack.save("/dev/null/kvstack/never"),
    "fork": lambda model, stack: stack.fork(),
    "copy": lambda model, stack: copy.deepcopy(stack),
    "read": lambda model, stack: list(stack),
    "forward": lambda model, stack: model(tiny.tokens(2, 3, 7), past_key_values=stack),
}


def goes_on(model, stack):
    """What the next tokens give, which are fed one by one and then together."""
    one = model(tiny.tokens(2, 1, 8), past_key_values=stack).logits
    return torch.cat([one, model(tiny.tokens(2, 40, 9), past_key_values=stack).logits], dim=1)


def changed(model, stack, change):
    try:
        CHANGES[change](model, stack)
    except OSError:  # nothing can be saved there, but all was ready for it
        assert change == "save"


@torch.no_grad()
def check(model, before, change):
    """Stop a `change` at each of its operations, or at some where these are many."""
    untouched, expected = goes_on(model, before.fork()), None
    counted = Stopping(0, None)
    stack = copy.deepcopy(before)
    try:
        with counted:
            changed(model, stack, change)
    except (UseError, RuntimeError):
        pass  # transformers' own layers cannot be cropped, or what is merged cannot: nothing may have changed
    else:
        expected = goes_on(model, stack)
    step = max(1, counted.count // 12)
    for at in range(1, counted.count + 1, step):
        error = (torch.OutOfMemoryError, KeyboardInterrupt)[at // step % 2]
        for again in (True, False):
            stack, stopping = copy.deepcopy(before), Stopping(at, error)
            try:
                with stopping:
                    CHANGES[change](model, stack)
            except (error, UseError, RuntimeError, OSError):
                pass
            if stopping.count < at:  # what was remembered of the last time took less
                break
            try:
                if again and expected is not None:
                    changed(model, stack, change)
                found = goes_on(model, stack)
            except UseError as refusal:
                assert "did not end" in str(refusal)  # noqa: PT017
                stack.reset()
                continue
            assert torch.equal(found, expected if again and expected is not None else untouched), (at, again)
    if expected is None:
        assert torch.equal(goes_on(model, stack), untouched)


@pytest.mark.filterwarnings("ignore:TypedStorage")  # of the library that writes files, when it is stopped
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stages", STACKS)
def test_a_change_that_is_stopped(stages, change):
    model = tiny.model("llama")
    stack = KVStack(STACKS[stages](), model=model, sinks=2, window=8)
    stack.activate_past_recording()  # what is fed waits for the change
    with torch.no_grad():
        model(tiny.tokens(2, 90), past_key_values=stack)
    check(model, stack, change)


@pytest.mark.parametrize("change", ["crop", "crop 1", "reorder", "select", "forward"])
@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"llama"}))
@pytest.mark.parametrize("stages", ["none", "snapkv"])
def test_layers_of_transformers_change_along(stages, kind, recording, change):
    model = MODELS[kind]()
    stack = KVStack(STACKS[stages](), model=model, sinks=2, window=8)
    if recording:
        stack.activate_past_recording()
    with torch.no_grad():
        model(tiny.tokens(2, 90), past_key_values=stack)
    check(model, stack, change)


@pytest.mark.parametrize("first", [True, False], ids=["bound then", "bound before"])
@pytest.mark.parametrize("stages", ["none", "quant"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_forward_that_is_stopped_behind_its_last_attention(kind, stages, first):
    model, ids = MODELS[kind](), tiny.tokens(1, 60)
    places = [model.model.embed_tokens, *(layer.mlp for layer in model.model.layers), model.model.norm, model.lm_head]
    for number, place in enumerate(places):
        stack = KVStack(STACKS[stages](), window=8)
        if not first:
            model(ids, past_key_values=stack)
        fresh = stack.fork() if not first else KVStack(STACKS[stages](), window=8)

        def stop(*_):
            raise KeyboardInterrupt

        handle = place.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=stack)
        handle.remove()
        if not number:  # nothing was fed
            found = model(ids, past_key_values=stack).logits
            assert torch.equal(found, model(ids, past_key_values=fresh).logits)
            continue
        for go_on in (
            lambda stack=stack: model(ids, past_key_values=stack),
            lambda stack=stack: stack.crop(-1),
            lambda stack=stack: stack.fork(),
            lambda stack=stack: stack.save("never"),
            lambda stack=stack: stack.read(stack.compressed_layers[0]),
            lambda stack=stack: stack.positions(stack.compressed_layers[0]),
        ):
            with pytest.raises(UseError, match=r"the last forward of this cache did not end.* Call reset\(\)"):
                go_on()
        stack.reset()
        found = model(ids, past_key_values=stack).logits
        assert torch.equal(found, model(ids, past_key_values=KVStack(STACKS[stages](), window=8)).logits)


def test_a_cache_without_a_model():
    """Nobody says when its forwards end, but layers that were not fed tell."""
    new = tiny.numbers(0, 1, 2, 40, 16)
    stack = KVStack([Quant(8)], window=8)
    for layer in range(3):
        stack.update(new, new, layer)
    stack.update(new, new, 0)
    with pytest.raises(UseError, match=r"the last forward of this cache did not end"):
        stack.update(new, new, 0)


def test_the_signature_of_a_model_stays():
    import inspect

    model = copy.deepcopy(tiny.model("llama"))
    before = [list(inspect.signature(x.forward).parameters) for x in model.modules()]
    stack = KVStack([Quant(8)], model=model)
    assert [list(inspect.signature(x.forward).parameters) for x in model.modules()] == before
    stack.unbind()
