"""Adapters (PEFT): which of them decide at this moment what a model computes.

peft puts layers of its own in the place of a model's, in the same modules: `set_adapter`, `disable_adapter` and
`merge_adapter` change what these do while the model stays the same object. Such a layer is told by its
`active_adapters`, as peft and transformers name them, so peft itself is never imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AdapterState",
    "AdapterWatch",
    "adapter_layers",
    "differ_by_row",
    "in_use",
    "in_words",
    "is_merged",
    "unwrapped",
]

AdapterState = tuple[tuple[tuple[str, Any], ...], ...]
"""Of each layer in which adapters are at work: the (name, factor) of each."""
ROWS = "adapter of each row"


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, with the adapters' layers in it; any other model as it is."""
    from transformers import PreTrainedModel

    inner = model
    while not isinstance(inner, PreTrainedModel):
        children = vars(inner).get("_modules", {})
        inside = children.get("base_model", children.get("model"))
        if inside is None:
            return model
        inner = inside
    return inner


class AdapterWatch:
    """Tells which adapters are at work in `model`, cheaply enough for every forward: it looks at names and numbers
    only, and at which modules hold which, so that adapters that come later are seen."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._look()

    def _look(self) -> None:
        modules: list[Any] = list(self._model.modules())
        self._layers = [module for module in modules if _adapts(module)]
        self._children = [(module._modules, list(module._modules.values())) for module in modules if module._modules]

    def state(self) -> AdapterState:
        """Return the adapters at work now. Adapters that are merged into the weights count like active ones: the model
        computes the same."""
        if any(list(now.values()) != then for now, then in self._children):
            self._look()
        return tuple(state for layer in self._layers if (state := in_use(layer)))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer that holds adapters, with its name in the model, from the outside in."""
    return ((name, module) for name, module in model.named_modules(remove_duplicate=False) if _adapts(module))


def _adapts(module: Any) -> bool:
    if not hasattr(type(module), "active_adapters") and "active_adapters" not in module.__dict__:
        return False
    return not callable(module.active_adapters)  # transformers models have a method of this name


def in_use(layer: Any) -> tuple[tuple[str, Any], ...]:
    """(name, factor) of each adapter that changes what `layer` computes, merged ones included."""
    if getattr(layer, "disable_adapters", False):
        return ()
    active = layer.active_adapters
    names = list(getattr(layer, "merged_adapters", None) or ([active] if isinstance(active, str) else active))
    # rows of one batch may ask for an adapter each: peft tells the layers by hooks, and other threads hang theirs
    hooks = list(layer._forward_pre_hooks.values())
    rows = [getattr(hook, "keywords", {}).get("adapter_names") for hook in hooks]
    asked = next((tuple(names) for names in reversed(rows) if names is not None), None)
    if asked is not None:
        names = list(dict.fromkeys(asked))
    factors = getattr(layer, "scaling", None)
    factors = factors if isinstance(factors, dict) else {}
    state = tuple((name, _plain(factors.get(name))) for name in names)
    return state if asked is None else (*state, (ROWS, asked))


def _plain(factor: Any) -> Any:
    return factor if factor is None or isinstance(factor, int | float) else repr(factor)


def is_merged(layer: Any) -> bool:
    """Return True if the weights of `layer` hold its adapters already."""
    return bool(getattr(layer, "merged", False))


def differ_by_row(state: AdapterState) -> bool:
    """Return True if the rows of the batch that is running have an adapter each."""
    return any(name == ROWS for layer in state for name, _ in layer)


def in_words(state: AdapterState) -> str:
    """The adapters of a state, as messages name them."""
    names = dict.fromkeys(name for layer in state for name, _ in layer if name != ROWS)
    return " and ".join(map(repr, names)) or "no adapter"
