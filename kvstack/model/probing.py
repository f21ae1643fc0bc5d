"""Running a model to see what it caches, without changing it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..types import KV
from .attention import device_of
from .changes import Handles, changes
from .layers import LayerGroups
from .rest import at_rest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SINKS", "at_rest", "cached_keys", "cached_layers", "cached_shapes", "observe", "token_shapes"]

SINKS = 4
"""First tokens of a text, which are unlike all others and stay raw in any stack."""

SOME = 8
"""Tokens that tell heads apart: one alone may be padding, whose embedding is zero."""


def observe(model: PreTrainedModel, groups: LayerGroups, ids: Tensor) -> dict[int, KV]:
    """Un-rotated keys, values and hidden states of every full-attention layer, on `ids` (1, T), without
    the first tokens."""
    from transformers import DynamicCache

    hidden: dict[int, Tensor] = {}

    def listen(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if kwargs is None or threading.get_ident() != mine:  # somebody else uses the model meanwhile
                return
            hidden[layer] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()

        return hook

    handles, mine = Handles(), threading.get_ident()
    with at_rest(model):

        def watch() -> None:
            for i in groups.full:
                handles.before_with_keywords(groups.modules[i], listen(i))

        changes.make(watch)
        cache = DynamicCache(config=model.config)
        try:
            model.base_model(ids.to(device_of(model)), past_key_values=cache, use_cache=True)
        finally:
            changes.make(handles.remove)
    observed = {}
    for i in groups.full:
        layer: Any = cache.layers[i]
        keys = groups.unrotated(i, layer.keys)
        observed[i] = KV(keys[:, :, SINKS:], layer.values[:, :, SINKS:], hidden[i][:, None, SINKS:])
    return observed


def cached_layers(model: PreTrainedModel, tokens: int = 1) -> list[Any]:
    """The layers of transformers' own cache after the first `tokens` of its vocabulary were run through the model: what
    each of them holds."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with at_rest(model):
        ids = torch.arange(tokens, device=device_of(model))[None]
        model.base_model(ids, past_key_values=cache, use_cache=True)
    return cast(list[Any], cache.layers)


def cached_keys(model: PreTrainedModel, full: Sequence[int]) -> dict[int, Tensor]:
    """Layer of `full` -> the keys (1, H, T, D) that it caches of some tokens."""
    layers = cached_layers(model, SOME) if full else []
    return {i: layers[i].keys for i in full}


_shapes: weakref.WeakKeyDictionary[Any, dict[int, tuple[int, int, int]]] = weakref.WeakKeyDictionary()


def token_shapes(model: PreTrainedModel) -> dict[int, tuple[int, int, int]]:
    """Full-attention layer -> (H, D of keys, D of values) of what it caches; seen by running one token through the
    model."""
    if model not in _shapes:
        layers = cached_layers(model)
        _shapes[model] = {
            i: (layers[i].keys.shape[1], layers[i].keys.shape[3], layers[i].values.shape[3])
            for i in LayerGroups(model, 1).full
        }
    return _shapes[model]


def cached_shapes(model: PreTrainedModel) -> dict[int, str]:
    """Full-attention layer -> the shape of what it caches, in words."""
    return {
        i: f"{heads} heads of {keys} + {values} numbers" for i, (heads, keys, values) in token_shapes(model).items()
    }
