"""Hooks on attention modules: how a stack learns what its model's attention does.

transformers hands a cache nothing but keys, values and a layer index. So, once a stack is bound, each attention
module of its model carries two hooks. They do nothing unless the cache in the call has an `attention_listener`; then,
for the length of that one call, the attention function that the modelling file looks up is ours. It passes the
queries on to the listener, which answers where a plain call would need a dense copy.

Nothing of this exists before a stack is made, and nothing is left when the last stack of a model is gone.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from .attention import CACHE_ARGUMENTS, attention_modules, implementation, interface, parameters
from .rope import tables_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from .rotation import RotaryCall, Tables

__all__ = ["Call", "Listener", "ModelHooks", "Told", "install", "running", "told"]


class Listener(Protocol):
    """Whom the hooks talk to."""

    def reads_another(self, layer: int) -> bool:
        """Whether a layer reads another's keys and values, so that its own are not needed."""

    def enter(self, call: Call) -> Any:
        """An attention module begins. What is returned takes the place of its mask."""

    def attention(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Mapping[str, Any], plain: Any
    ) -> Any:
        """Stand in for the attention function; `plain(query, key, value, mask, **changes)` is the model's own."""

    def leave(self, call: Call) -> None:
        """An attention module has ended, without an error."""


@dataclass
class Call:
    """One running call of an attention module whose cache has a listener."""

    listener: Listener
    module: nn.Module
    layer: int
    implementation: str
    mask: Any
    hidden: Tensor | None
    shares: bool  # the layer reads another's keys and values, and its own are not needed
    tables: Tables = ()  # the rotary tables the module was given
    positions: Tensor | None = None  # and positions, where it was given any
    swapped: bool = False  # our function stands in for the model's
    asked: Sequence[int] = ()  # rows and tokens that a resting projection was asked for


class _Running(threading.local):
    call: Call | None = None


_running = _Running()


@dataclass(frozen=True)
class Told:
    """The last call of a rotary module in this thread.

    Attributes:
        positions: what it was given, (B or 1, T) or (axes, B or 1, T).
        tables: what it made of them, as long as that is in use.
    """

    positions: Tensor
    tables: tuple[weakref.ref[Tensor], ...]

    def made(self, tables: Tables) -> bool:
        """Whether these very tables came from this call."""
        return len(tables) == len(self.tables) and all(mine() is x for mine, x in zip(self.tables, tables, strict=True))


class _Rotary(threading.local):
    def __init__(self) -> None:
        # rotary module -> its other arguments -> its last call with them
        self.told: weakref.WeakKeyDictionary[nn.Module, dict[Any, Told]] = weakref.WeakKeyDictionary()


_rotary = _Rotary()


def told(rotary: RotaryCall) -> Told | None:
    """The last call of this kind in this thread."""
    return _rotary.told.get(rotary.module, {}).get(_kind(rotary.extra))


def _kind(extra: Mapping[str, Any]) -> Any:
    return tuple(sorted((name, str(x)) for name, x in extra.items()))


def _telling(names: Sequence[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        positions, tables = given.get("position_ids"), tables_of({"position_embeddings": output})
        if isinstance(positions, Tensor) and tables:
            extra = {name: x for name, x in given.items() if name not in (names[0], "position_ids")}
            calls = _rotary.told.setdefault(module, {})
            calls[_kind(extra)] = Told(positions, tuple(map(weakref.ref, tables)))

    return hook


def running() -> Call | None:
    """The attention call this thread is in, where its cache has a listener."""
    return _running.call


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

        return call.listener.attention(call, query, key, value, attention_mask, kwargs, plain)

    return attention


# ---- hooks on one model, shared by all stacks bound to it


class ModelHooks:
    def __init__(self, model: PreTrainedModel) -> None:
        self.users = 0
        self.handles: list[RemovableHandle] = []
        self.guards: list[_Guard] = []
        self.resting: set[int] = set()
        self.told: set[nn.Module] = set()
        for module in attention_modules(model).values():
            names = list(parameters(module))
            self.handles.append(module.register_forward_pre_hook(_entering(names), with_kwargs=True))
            # always_call: an exception in attention must not leave our function in transformers' registry
            self.handles.append(module.register_forward_hook(_leaving, always_call=True))
            self.guards.append(_Guard(module))

    def rest(self, modules: Mapping[int, nn.Module]) -> None:
        """Let these layers compute no keys and values in a call that reads another layer's."""
        for layer in modules.keys() - self.resting:
            self.resting.add(layer)
            projected = [getattr(modules[layer], name, None) for name in ("k_proj", "v_proj")]
            projections = [projection for projection in projected if isinstance(projection, nn.Linear)]
            if len(projections) == len(projected):
                for projection in projections:
                    self.handles.append(projection.register_forward_pre_hook(_resting))
                    self.handles.append(projection.register_forward_hook(_rested))

    def tell(self, rotary: Iterable[nn.Module]) -> None:
        """Let these modules tell which positions they are given."""
        for module in set(rotary) - self.told:
            self.told.add(module)
            self.handles.append(module.register_forward_hook(_telling(list(parameters(module))), with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for guard in self.guards:
            guard.remove()


class _Guard:
    """torch calls no hook when a forward ends by KeyboardInterrupt or SystemExit: so the forward itself is watched."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.before = vars(module).get("forward")  # others wrap forwards too
        inside = type(module).forward if self.before is None else None

        @functools.wraps(module.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            try:
                return inside(self, *args, **kwargs) if inside is not None else before(*args, **kwargs)
            except BaseException as error:
                if not isinstance(error, Exception):
                    _abandon()
                raise

        before: Any = self.before
        # a method, so that a copy of the module gets one of its own
        self.forward = vars(module)["forward"] = types.MethodType(forward, module)

    def remove(self) -> None:
        module = self.module()
        if module is None or vars(module).get("forward") is not self.forward:
            return  # wrapped by others meanwhile: it stays, and does nothing any more
        if self.before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = self.before


def _abandon() -> None:
    """Forget the attention call this thread was in."""
    call = running()
    if call is None:
        return
    _running.call = None
    registry = interface(call.module)
    if registry is not None and call.swapped:
        call.swapped = False
        _swap_out(registry, call.implementation)


_hooked: weakref.WeakKeyDictionary[nn.Module, ModelHooks] = weakref.WeakKeyDictionary()
_binding = threading.RLock()  # a stack may end, and release, while the same thread installs another


def install(
    owner: object, model: PreTrainedModel, resting: Mapping[int, nn.Module], rotary: Iterable[nn.Module] = ()
) -> weakref.finalize[Any, Any]:
    """Put the hooks on `model` (once for all its stacks). Calling what is returned takes them off again; the end
    of `owner` does so too. The layers `resting` need no keys and values of their own; the modules `rotary` tell the
    positions they are given."""
    with _binding:
        hooks = _hooked.get(model)
        if hooks is None:
            hooks = _hooked[model] = ModelHooks(model)
        hooks.users += 1
        hooks.rest(resting)
        hooks.tell(rotary)
        return weakref.finalize(owner, _release, weakref.ref(model))


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


def _entering(names: list[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _abandon()  # attention modules do not nest: a call that is still running here was interrupted
        given = dict(zip(names, args, strict=False)) | kwargs
        listener = _listener_in(given)
        if listener is None:
            return None
        layer = module.layer_idx
        assert isinstance(layer, int)
        how, mask, hidden = implementation(module), given.get("attention_mask"), given.get("hidden_states")
        shares = listener.reads_another(layer)
        call = Call(listener, module, layer, how, mask, hidden, shares, tables_of(given), given.get("position_ids"))
        _running.call = call
        try:
            mask = listener.enter(call)
        except BaseException:
            # the module's own hook is not called for a call that never began
            _running.call = None
            raise
        registry = interface(module)
        if registry is not None:
            _swap_in(registry, call.implementation, module)
            call.swapped = True
        if mask is call.mask:
            return None
        call.mask = mask
        return _replaced(names, args, kwargs, "attention_mask", mask)

    return hook


def _replaced(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another `value` for one of them."""
    at = names.index(name) if name in names else len(args)
    if at < len(args):
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, kwargs | {name: value}


def _leaving(module: nn.Module, args: Any, output: Any) -> None:
    call = running()
    if call is None or call.module is not module:
        return
    _abandon()
    if output is not None:  # None: the call failed, and what it wrote must not be settled
        call.listener.leave(call)


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


def _listener_in(given: Mapping[str, Any]) -> Listener | None:
    """Who wants to hear of this call: what its cache names as `attention_listener`."""
    for name in CACHE_ARGUMENTS:
        listener: Listener | None = getattr(given.get(name), "attention_listener", None)
        if listener is not None:
            return listener
    return None
