"""Hooks on attention modules: how a stack learns what its model's attention does.

transformers hands a cache nothing but keys, values and a layer index. So, once a stack is bound, each attention
module of its model carries two hooks. They do nothing unless the cache in the call has an `attention_listener`; then,
for the length of that one call and in its thread, the attention function that the modelling file looks up is ours. It
passes the queries on to the listener, which answers where a plain call would need a dense copy.

Nothing of this exists before a stack is made, and nothing is left when the last stack of a model is deleted.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from .as_python import as_python, prepare
from .attention import CACHE_ARGUMENTS, attention_modules, decoder_of, implementation, interface, layer_of, parameters
from .changes import Handles, changes
from .continuing import CheckedPrefill
from .keeping import KeptStack
from .rope import tables_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .rotation import RotaryCall, Tables

__all__ = ["Call", "Listener", "ModelHooks", "Told", "install", "replaced", "running", "told"]


class Listener(Protocol):
    """Whom the hooks talk to."""

    def reads_another(self, layer: int) -> bool:
        """Return True if a layer reads another's keys and values, so that its own are not needed."""

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
    replaced: Any = None  # the mask in whose place the listener put another one
    asked: Sequence[int] = ()  # rows and tokens that a resting projection was asked for


class _Running(threading.local):
    call: Call | None = None


_running = _Running()


@dataclass(frozen=True)
class Told:
    """The last call of a rotary module in this thread.

    Attributes:
        positions: its argument, (B or 1, T) or (axes, B or 1, T).
        tables: its result, as long as that is in use.
    """

    positions: Tensor
    tables: tuple[weakref.ref[Tensor], ...]

    def made(self, tables: Tables) -> bool:
        """Return True if these very tables came from this call."""
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
    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if len(rest) < 2:  # removed meanwhile
            return
        kwargs, output = rest
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


class _StandIn:
    """The object that the modelling file finds instead of its attention function."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    @as_python
    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call, original = running(), self.original
        if call is None or call.module is not module:
            return original(module, query, key, value, attention_mask, *args, **kwargs)

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Any, **changes: Any) -> Any:
            return original(module, q, k, v, mask, *args, **(kwargs | changes))

        return call.listener.attention(call, query, key, value, attention_mask, kwargs, plain)


def _watching(kind: Any) -> Any:
    """A registry of the class `kind` whose look-ups give a stand-in to a call of ours, and to nobody else. Nothing in
    it is changed: another thread may be looking up the same name."""

    class Watching(kind):
        def __getitem__(self, name: str) -> Any:
            return self._for_call(name, super().__getitem__(name))

        def get_interface(self, attn_implementation: str, default: Callable[..., Any]) -> Any:
            return self._for_call(attn_implementation, super().get_interface(attn_implementation, default))

        def _for_call(self, name: str | None, found: Any) -> Any:
            call = running()
            ours = call is not None and interface(call.module) is self and call.implementation == (name or "eager")
            return _StandIn(found) if ours and not isinstance(found, _StandIn) else found

    return Watching


class _Watch:
    """A registry whose look-ups are watched while any model that uses it has hooks."""

    def __init__(self, registry: Any) -> None:
        self.registry, self.kind = registry, type(registry)
        self.watching = _watching(self.kind)
        self.users: set[ModelHooks] = set()

    def start(self) -> None:
        self.registry.__class__ = self.watching  # at once for all threads

    def end(self) -> None:
        if type(self.registry) is self.watching:
            self.registry.__class__ = self.kind


_watches: dict[int, _Watch] = {}


# ---- hooks on one model, shared by all stacks bound to it


class ModelHooks:
    """Everything that stacks put on one model. Whoever makes or changes it holds `changes`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)
        self.users: set[object] = set()
        self.handles = Handles()
        self.guards: list[_Guard] = []
        self.kept: list[KeptStack | CheckedPrefill] = []
        self.resting: set[int] = set()
        self.ends = False
        self.told: set[nn.Module] = set()
        self.registries: list[Any] = []

    def put(self, model: PreTrainedModel) -> None:
        self._guard(_Guard.of(model, _Guard.TELLS))
        for module in attention_modules(model).values():
            self._watch(interface(module))
            self.handles.before_with_keywords(module, _entering(list(parameters(module))))
            # always: an exception in attention must not leave a call that seems to run
            self.handles.after(module, _leaving, always=True)
            self._guard(_Guard.of(module))

    def _guard(self, guard: _Guard) -> None:
        if guard not in self.guards:
            self.guards.append(guard)
        guard.stand(self)

    def _watch(self, registry: Any) -> None:
        if registry is None or any(registry is known for known in self.registries):
            return
        self.registries.append(registry)
        watch = _watches.get(id(registry)) or _watches.setdefault(id(registry), _Watch(registry))
        watch.users.add(self)
        watch.start()

    def keep(self, model: PreTrainedModel) -> None:
        """Let generation with `model`, this one with its head, go on with a stack that it would put aside, and show a
        stack its text; let a stack hear of it where something behind the decoder fails, such as the head."""
        decoder = self.model()
        for module in _around(decoder, model) if decoder is not None else ():
            self._guard(_Guard.of(module, _Guard.WATCHES))
        kept, checked = KeptStack(model), CheckedPrefill(model)
        if kept.prepare is not None:
            self.kept.append(kept)
        if checked.prefill is not None:
            self.kept.append(checked)

    def rest(self, modules: Mapping[int, nn.Module]) -> None:
        """Let these layers compute no keys and values in a call that reads another layer's."""
        for layer in modules.keys() - self.resting:
            self.resting.add(layer)
            projected = [getattr(modules[layer], name, None) for name in ("k_proj", "v_proj")]
            projections = [projection for projection in projected if isinstance(projection, nn.Linear)]
            if len(projections) == len(projected):
                for projection in projections:
                    self.handles.after(projection, _rested)
                    self.handles.before(projection, _resting)

    def end(self, model: PreTrainedModel) -> None:
        """Let a cache hear of the end of a forward in which it was bound: guards stand from the next one on."""
        if not self.ends:
            self.ends = True
            self.handles.after_with_keywords(model, _ending(list(parameters(model))))

    def tell(self, rotary: Iterable[nn.Module]) -> None:
        """Let these modules tell which positions they are given."""
        for module in set(rotary) - self.told:
            self.told.add(module)
            self.handles.after_with_keywords(module, _telling(list(parameters(module))))

    def remove(self) -> None:
        self.handles.remove()
        for guard in self.guards:
            guard.remove(self)
        for kept in self.kept:
            kept.remove()
        for registry in self.registries:
            watch = _watches.get(id(registry))
            if watch is not None:
                watch.users.discard(self)
                if not watch.users:
                    watch.end()
                    del _watches[id(registry)]


class _Guard:
    """The forward of a module, watched: torch calls no hook when it ends by KeyboardInterrupt or SystemExit, nor one
    that another thread has removed meanwhile.

    Args:
        role: what a cache in the call is told. `WATCHES`: that the forward was stopped. `TELLS`: that too, and that it
            begins, before anything is computed, and that it has ended.
    """

    TELLS, WATCHES = "tells", "watches"

    def __init__(self, module: nn.Module, role: str = "") -> None:
        self.module, self.users = weakref.ref(module), set[ModelHooks]()
        self.before = vars(module).get("forward")  # others wrap forwards too
        inside = type(module).forward if self.before is None else None

        @as_python
        def guarded(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given: Mapping[str, Any] = dict(zip(names, args, strict=False)) | kwargs if role else {}
            watched = _watched(given)
            if tells:
                for name, value in _tell(given).items():
                    args, kwargs = replaced(names, args, kwargs, name, value)
            try:
                output = inside(self, *args, **kwargs) if inside is not None else before(*args, **kwargs)
            except BaseException:
                for cache, writes in watched:
                    cache.stop_forward(writes)
                _abandon()
                raise
            _leaving(self if inside is not None else module, args, output)
            if tells:
                _tell_end(given)
            return output

        # without the attributes of what it wraps: those of a compiled forward would lead past this one
        @functools.wraps(module.forward, updated=())
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return guarded(self, args, kwargs)

        before: Any = self.before
        names, tells = list(parameters(module)), role == self.TELLS
        # of a method, the first parameter is taken for the module
        own = inspect.signature(module.forward)
        itself = inspect.Parameter("_module", inspect.Parameter.POSITIONAL_ONLY)
        rest = [own.parameters[name] for name in own.parameters if name not in ("self", itself.name)]
        vars(forward)["__signature__"] = own.replace(parameters=[itself, *rest])
        vars(forward)["guard"] = self
        # a method, so that a copy of the module gets one of its own
        self.forward = types.MethodType(forward, module)

    @classmethod
    def of(cls, module: nn.Module, role: str = "") -> _Guard:
        """The guard that stands before `module`, or a new one."""
        stands = vars(module).get("forward")
        guard = getattr(stands, "guard", None)
        return guard if isinstance(guard, cls) and guard.forward is stands else cls(module, role)

    def stand(self, user: ModelHooks) -> None:
        self.users.add(user)
        module = self.module()
        if module is not None:
            vars(module)["forward"] = self.forward

    def remove(self, user: ModelHooks) -> None:
        self.users.discard(user)
        module = self.module()
        if self.users or module is None or vars(module).get("forward") is not self.forward:
            return  # wrapped by others meanwhile: it stays, and does nothing any more
        if self.before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = self.before


def _around(decoder: nn.Module, whole: nn.Module) -> Iterator[nn.Module]:
    """The models in `whole` that hold the `decoder`."""
    from transformers import PreTrainedModel

    for module in whole.modules():
        if isinstance(module, PreTrainedModel) and module is not decoder and decoder in module.modules():
            yield module


def _watched(given: Mapping[str, Any]) -> Sequence[tuple[Any, int]]:
    """The caches in a call that hear of it if it is stopped, and how often they were written to."""
    caches: list[Any] = [given.get(name) for name in CACHE_ARGUMENTS]
    return [(cache, cache.writes) for cache in caches if hasattr(cache, "stop_forward")]


def _tell(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what takes the place of given arguments."""
    changed: dict[str, Any] = {}
    for name in CACHE_ARGUMENTS:
        begin = getattr(given.get(name), "begin_forward", None)
        if begin is not None:
            changed |= begin(given)
    return changed


def _tell_end(given: Mapping[str, Any]) -> None:
    for name in CACHE_ARGUMENTS:
        end = getattr(given.get(name), "end_forward", None)
        if end is not None:
            end(given)


def _ending(names: Sequence[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if len(rest) > 1:  # otherwise it was removed meanwhile
            _tell_end(dict(zip(names, args, strict=False)) | rest[0])

    return hook


def _abandon() -> None:
    """Forget the attention call this thread was in."""
    _running.call = None


_hooked: weakref.WeakKeyDictionary[nn.Module, ModelHooks] = weakref.WeakKeyDictionary()


def install(
    owner: object,
    model: PreTrainedModel,
    resting: Mapping[int, nn.Module],
    rotary: Iterable[nn.Module] = (),
    ends: bool = False,
) -> Callable[[], Any]:
    """Put the hooks on `model` (once for all its stacks). Calling what is returned takes them off again; the end
    of `owner` does so too. The layers `resting` need no keys and values of their own; the modules `rotary` tell the
    positions they are given. `ends`: the cache also hears of the end of the forward that runs now."""
    prepare()
    user, whole = object(), model
    model = decoder_of(model)  # the same one for stacks that were bound with and without the head
    finalizers: list[Any] = []

    def put_on() -> None:
        hooks = _hooked.get(model) or ModelHooks(model)
        release = functools.partial(_release, hooks, user)
        try:
            if model not in _hooked:
                hooks.put(model)
                _hooked[model] = hooks
            finalizers.append(weakref.finalize(owner, changes.soon, release))
            hooks.users.add(user)
            hooks.keep(whole)
            hooks.rest(resting)
            hooks.tell(rotary)
            if ends:
                hooks.end(model)
        except BaseException:
            release()
            raise

    changes.make(put_on)
    return finalizers[0]


def _release(hooks: ModelHooks, user: object) -> None:
    hooks.users.discard(user)
    if not hooks.users:
        hooks.remove()
        model = hooks.model()
        if model is not None and _hooked.get(model) is hooks:
            del _hooked[model]


def _entering(names: list[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        changes.catch_up()
        _abandon()  # attention modules do not nest: a call that is still running here was interrupted
        if kwargs is None:
            return None
        given = dict(zip(names, args, strict=False)) | kwargs
        listener = _listener_in(given)
        if listener is None:
            return None
        layer = layer_of(module)
        assert layer is not None  # only modules with an index are hooked
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
        if mask is call.mask:
            return None
        call.replaced, call.mask = call.mask, mask
        return replaced(names, args, kwargs, "attention_mask", mask)

    return hook


def replaced(
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
