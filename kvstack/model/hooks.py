"""The one file that knows attention modules: how a stack learns whose cache it is, and what its attention does.

transformers hands a cache nothing but keys, values and a layer index. So, once a stack is bound, each attention
module of its model carries two hooks. They do nothing unless the cache in the call is a `KVStack`; then, for
the length of that one call, the attention function that the modelling file looks up is ours. It passes the
queries on to the stack and answers from the store where a plain call would need a dense copy.

Nothing of this exists before a stack is made, and nothing is left when the last stack of a model is gone.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BindError, UseError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from ..cache import KVStack

__all__ = ["Call", "arm", "attention_modules", "expands", "gives_queries", "install", "running"]

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


@dataclass
class Call:
    """One running call of an attention module whose cache is a stack."""

    stack: KVStack
    module: nn.Module
    layer: int
    implementation: str
    mask: Any
    hidden: Tensor | None
    shares: bool  # the layer reads another's keys and values, and its own are not needed
    asked: Sequence[int] = ()  # rows and tokens that a resting projection was asked for


class _Running(threading.local):
    call: Call | None = None


_running = _Running()


def running() -> Call | None:
    """The attention call this thread is in, where its cache is a stack."""
    return _running.call


# ---- attention modules


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> the innermost module of that layer that takes a cache."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and any(name in _parameters(module) for name in CACHE_ARGUMENTS):
            found[layer] = module  # modules() goes from the outside in
    return found


def _interface(module: nn.Module) -> Any:
    """The registry of attention functions that this module's file looks into, or None."""
    return getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)


def gives_queries(module: nn.Module) -> bool:
    """Whether this module calls its attention through transformers' interface."""
    return _interface(module) is not None


def expands(module: nn.Module) -> bool:
    """Whether this module caches latents and makes keys and values of them after reading (DeepSeek V2 and V3)."""
    return hasattr(module, "expand_kv")


def implementation(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


# ---- standing in for the attention function during one call


@dataclass
class _Swap:
    original: Callable[..., Any]
    had_local: bool
    users: int


_swaps: dict[tuple[int, str], _Swap] = {}
_lock = threading.Lock()


def _swap_in(interface: Any, name: str, module: nn.Module) -> None:
    with _lock:
        swap = _swaps.get((id(interface), name))
        if swap is None:
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            original = interface.get_interface(name, eager)
            swap = _swaps[id(interface), name] = _Swap(original, name in interface._local_mapping, 0)
            interface[name] = _stand_in(swap.original)
        swap.users += 1


def _swap_out(interface: Any, name: str) -> None:
    with _lock:
        swap = _swaps[id(interface), name]
        swap.users -= 1
        if swap.users == 0:
            del _swaps[id(interface), name]
            if swap.had_local:
                interface[name] = swap.original
            else:
                del interface[name]


def _stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        call = running()
        if call is None or call.module is not module:  # another thread's model
            return original(module, query, key, value, attention_mask, *args, **kwargs)

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Any, **changes: Any) -> Any:
            return original(module, q, k, v, mask, *args, **(kwargs | changes))

        return call.stack._attention(call, query, key, value, attention_mask, kwargs, plain)

    return attention


# ---- hooks on one model, shared by all stacks bound to it


class _ModelHooks:
    def __init__(self, model: PreTrainedModel) -> None:
        self.users = 0
        self.handles: list[RemovableHandle] = []
        self.resting: set[int] = set()
        for module in attention_modules(model).values():
            names = list(_parameters(module))
            self.handles.append(module.register_forward_pre_hook(_entering(names), with_kwargs=True))
            # always_call: an exception in attention must not leave our function in transformers' registry
            self.handles.append(module.register_forward_hook(_leaving, always_call=True))

    def rest(self, modules: Mapping[int, nn.Module]) -> None:
        """Let these layers compute no keys and values in a call that reads another layer's."""
        for layer in modules.keys() - self.resting:
            self.resting.add(layer)
            found = [getattr(modules[layer], name, None) for name in ("k_proj", "v_proj")]
            projections = [projection for projection in found if isinstance(projection, nn.Linear)]
            if len(projections) == len(found):
                for projection in projections:
                    self.handles.append(projection.register_forward_pre_hook(_resting))
                    self.handles.append(projection.register_forward_hook(_rested))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


_hooked: weakref.WeakKeyDictionary[nn.Module, _ModelHooks] = weakref.WeakKeyDictionary()
_binding = threading.RLock()  # a stack may end, and release, while the same thread installs another


def install(stack: KVStack, model: PreTrainedModel) -> weakref.finalize[Any, Any]:
    """Put the hooks on `model` (once for all its stacks). Calling what is returned takes them off again; the end
    of the stack does so too."""
    with _binding:
        hooks = _hooked.get(model)
        if hooks is None:
            hooks = _hooked[model] = _ModelHooks(model)
        hooks.users += 1
        hooks.rest({layer: stack._modules[layer] for layer in stack._shares})
        return weakref.finalize(stack, _release, weakref.ref(model))


def _release(reference: weakref.ref[PreTrainedModel]) -> None:
    with _binding:
        model = reference()
        hooks = _hooked.get(model) if model is not None else None
        if model is None or hooks is None:
            return
        hooks.users -= 1
        if hooks.users == 0:
            hooks.remove()
            del _hooked[model]


def _entering(names: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        stack = _cache_in(given)
        if stack is None:
            return
        layer = module.layer_idx
        assert isinstance(layer, int)
        how, mask, hidden = implementation(module), given.get("attention_mask"), given.get("hidden_states")
        _running.call = call = Call(stack, module, layer, how, mask, hidden, layer in stack._shares)
        try:
            stack._enter(call)
        except BaseException:
            # the module's own hook is not called for a call that never began
            _running.call = None
            raise
        interface = _interface(module)
        if interface is not None:
            _swap_in(interface, call.implementation, module)

    return hook


def _leaving(module: nn.Module, args: Any, output: Any) -> None:
    call = running()
    if call is None or call.module is not module:
        return
    _running.call = None
    interface = _interface(module)
    if interface is not None:
        _swap_out(interface, call.implementation)
    if output is not None:  # None: the call failed, and what it wrote must not be settled
        call.stack._leave(call)


def _resting(projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Project no token at all, where keys and values would only be thrown away."""
    call = running()
    if call is None or not call.shares or not args:
        return None
    call.asked = args[0].shape[:-1]
    return (args[0][..., :0, :], *args[1:])


def _rested(projection: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    call = running()
    if call is None or not call.asked:
        return None
    asked, call.asked = call.asked, ()
    return output.new_zeros((*asked, output.shape[-1]))  # real memory: some models clamp it in place


def _cache_in(given: dict[str, Any]) -> KVStack | None:
    from ..cache import KVStack

    for name in CACHE_ARGUMENTS:
        if isinstance(given.get(name), KVStack):
            return given[name]
    return None


# ---- finding the model


def arm(stack: KVStack) -> Callable[[], None]:
    """Bind `stack` to the model in whose forward it first appears. Returns what disarms it.

    torch's hook for all modules has no keyword arguments, so it puts a probe with keyword arguments on every
    transformers model it meets and on their layers (a model that is already running starts calling its own new
    hooks only with its next forward, but its layers' ones at once). The model is told by the cache it was given:
    another model may well run first.
    """
    from transformers import PreTrainedModel

    reference = weakref.ref(stack)
    handles: list[RemovableHandle] = []
    probed: set[int] = set()

    def disarm() -> None:
        while handles:
            handles.pop().remove()
        probed.clear()

    def probe(root: weakref.ref[PreTrainedModel]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            waiting, model = reference(), root()
            if waiting is None or model is None:
                return
            for value in (*args, *kwargs.values()):
                if value is waiting:
                    waiting.bind(model)
                    return
                if getattr(value, "self_attention_cache", None) is waiting:
                    raise BindError(
                        f"{waiting!r} sits in an EncoderDecoderCache: kvstack compresses decoder-only models. "
                        "Use transformers' own cache for encoder-decoder models."
                    )

        return hook

    def meet(module: nn.Module, args: Any) -> None:
        if not isinstance(module, PreTrainedModel) or id(module) in probed:
            return
        root = weakref.ref(module)
        for inner in module.modules():
            takes_cache = isinstance(inner, PreTrainedModel) or isinstance(getattr(inner, "layer_idx", None), int)
            takes_cache = takes_cache or any(name in _parameters(inner) for name in CACHE_ARGUMENTS)
            if takes_cache and id(inner) not in probed:
                probed.add(id(inner))
                handles.append(inner.register_forward_pre_hook(probe(root), with_kwargs=True))

    handles.append(nn.modules.module.register_module_forward_pre_hook(meet))
    weakref.finalize(stack, disarm)
    return disarm


# ---- masks


def new_tokens(mask: Any, length: int) -> Tensor | None:
    """Which of the `length` new tokens are real, (B, length) bool, read from the mask that attention was given;
    None where all are, or where the mask cannot tell."""
    if not isinstance(mask, Tensor):
        if mask is None:
            return None
        raise UseError(
            f"the attention mask is a {type(mask).__name__}, which does not tell padding. "
            "Use attn_implementation='sdpa', 'eager' or a flash attention with a KVStack."
        )
    if mask.dim() == 2:  # flash attention: (B, all tokens)
        real = mask[:, -length:].bool()
    else:  # (B, 1, queries, tokens): the newest query sees all real tokens
        row = mask[:, 0, -1, -length:]
        real = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
    return None if bool(real.all()) else real


def causal_mask(name: str, new: int, held: int, like: Tensor) -> Tensor | None:
    """The mask `name` needs for the newest `new` of `held` unpadded tokens, (1, 1, new, held) or None."""
    if new == 1 or "flash" in name or (name == "sdpa" and new == held):
        return None
    queries = torch.arange(held - new, held, device=like.device)
    visible = torch.arange(held, device=like.device)[None] <= queries[:, None]
    if name == "sdpa":
        return visible[None, None]
    if name == "eager":
        hidden = torch.finfo(like.dtype).min
        return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill(~visible, hidden)[
            None, None
        ]
    raise UseError(
        f"padded batches need a mask of a form kvstack can make, and attn_implementation={name!r} has another. "
        "Use 'sdpa' or 'eager'."
    )
