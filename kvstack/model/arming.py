"""Finding the model whose cache a stack is: it is told by the first forward that gets the stack."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from ..errors import BindError, UseError
from .as_python import prepare
from .attention import layer_of, parameters, takes_cache
from .changes import Handles, changes
from .hooks import replaced
from .keeping import leaves_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["arm"]


class Waiting(Protocol):
    """A cache that waits for its model."""

    def bind_met(self, model: PreTrainedModel, /) -> Any: ...

    def check_given(self, given: Mapping[str, Any], /) -> None: ...

    def begin_forward(self, given: Mapping[str, Any], /) -> Mapping[str, Any]: ...

    def end_binding(self) -> None: ...


def _check_left_out(waiting: Waiting, model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Refuse a model that was called without the stack that generate, which has marked it as its user's, was given."""
    longest = leaves_out(model, given) if getattr(waiting, "_is_user_defined", False) else None
    if longest is not None:
        raise UseError(
            f"{type(model).__name__} leaves out the cache that generate was given, {waiting!r}, where a text begins "
            f"with more than {longest} tokens. Bind it before: KVStack([...], model=model)."
        )


def arm(stack: Waiting) -> Callable[[], None]:
    """Bind `stack` to the model in whose forward it first appears. Returns what disarms it.

    torch's hook for all modules has no keyword arguments, so it puts a probe with keyword arguments on every
    transformers model it meets and on their layers (a model that is already running starts calling its own new
    hooks only with its next forward, but its layers' ones at once). The model is told by the cache it was given:
    another model may well run first.
    """
    from transformers import PreTrainedModel

    prepare()
    handles, behind = Handles(), Handles()  # another thread may take off the first ones later, at any time
    reference = weakref.ref(stack, lambda _: changes.soon(behind.remove))
    # module -> the outermost model seen so far that it is part of
    roots: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PreTrainedModel]] = weakref.WeakKeyDictionary()
    disarmed = threading.Event()

    def take_off() -> None:
        disarmed.set()
        handles.remove()
        roots.clear()

    def disarm() -> None:
        changes.soon(take_off)  # at once, or by the thread that makes a change now

    def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        root = roots.get(module)
        waiting, model = reference(), root() if root is not None else None
        if waiting is None or model is None or kwargs is None:
            return None
        for value in (*args, *kwargs.values()):
            if value is waiting:
                given = dict(zip(parameters(module), args, strict=False)) | kwargs
                config = model.config.get_text_config(decoder=True)
                if not isinstance(module, PreTrainedModel) and getattr(config, "use_cache", None) is False:
                    given.pop("use_cache", None)  # a layer is told the model's default, which nobody has asked for
                waiting.check_given(given)
                waiting.bind_met(model)
                behind.after_with_keywords(module, ended)
                changed = waiting.begin_forward(given)
                names = list(parameters(module))
                # what is changed was used before a layer is called
                for name in changed.keys() & set(names) if isinstance(module, PreTrainedModel) else ():
                    args, kwargs = replaced(names, args, kwargs, name, changed[name])
                return args, kwargs
            if getattr(value, "self_attention_cache", None) is waiting:
                raise BindError(
                    f"{waiting!r} sits in an EncoderDecoderCache: kvstack compresses decoder-only models. "
                    "Use transformers' own cache for encoder-decoder models."
                )
        if isinstance(module, PreTrainedModel):
            _check_left_out(waiting, model, dict(zip(parameters(module), args, strict=False)) | kwargs)
        return None

    def ended(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        waiting, given = reference(), rest[0] if len(rest) > 1 else {}
        if waiting is None or any(value is waiting for value in (*args, *given.values())):
            if waiting is not None:
                waiting.end_binding()
            changes.soon(behind.remove)

    def meet(module: nn.Module, args: Any) -> None:
        changes.catch_up()
        module = getattr(module, "_orig_mod", module)  # of torch.compile: it calls the model without this hook
        if not isinstance(module, PreTrainedModel) or module in roots:
            return
        # a model that was not met yet is outside of all that were: what it holds is part of it
        inside = [inner for inner in module.modules() if _may_take_cache(inner)]

        def watch() -> None:
            for inner in () if disarmed.is_set() else inside:
                if inner not in roots:
                    handles.before_with_keywords(inner, probe)
                roots[inner] = weakref.ref(module)

        changes.make(watch)

    weakref.finalize(stack, changes.soon, take_off)
    changes.make(lambda: handles.before_all(meet))
    return disarm


def _may_take_cache(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) or layer_of(module) is not None or takes_cache(module)
