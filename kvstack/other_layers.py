"""Layers that transformers caches itself, in a file: what they hold, whatever kind they are of.

A layer is filled from a description only with what the same layer of the bound model holds after one token: the same
names, types and shapes, but for rows and tokens. So a file names no attribute that the layer does not have, and
tensors go where the layer's own are, whatever device they were saved from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from .checks import FLOATS, Tensors, count, entries, items, misfit
from .errors import UseError

__all__ = ["describe_layer", "fill_layer", "forked_layer"]

TOKENS_AXIS = {"keys": 2, "values": 2, "indexer_keys": 1}
"""The axis of a tensor that runs along the tokens, by its name in the layer."""
ROWS_AXIS = {"indexer_position_ids": 1}
"""The axis that runs along the rows of the batch, if it is not the first."""
FREE = ("record_past",)
"""Settings that may differ from those of a new layer."""
COUNTED = ("cumulative_length",)
"""Names of the number of tokens that a layer saw."""


REPLACED = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
"""Layers that replace their tensors when they grow. All others may write to them, as states of linear attention do."""


def forked_layer(layer: Any) -> Any:
    """A layer that holds what a layer of transformers holds, in the same memory where neither writes to it."""
    return copy.copy(layer) if type(layer) in REPLACED else copy.deepcopy(layer)


def describe_layer(layer: Any, put: Callable[[Tensor], Any]) -> dict[str, Any]:
    """All that a layer of transformers holds, in JSON with tensors by name."""
    known = {name: x for name, x in vars(layer).items() if not isinstance(x, (torch.dtype, torch.device))}
    return {name: _described(x, put, f"{type(layer).__name__}.{name}") for name, x in known.items()}


def _described(x: Any, put: Callable[[Tensor], Any], where: str) -> Any:
    if isinstance(x, Tensor):
        return {"tensor": put(x)}
    if isinstance(x, Mapping):
        return {"items": [[key, _described(value, put, where)] for key, value in x.items()]}
    if isinstance(x, (list, tuple)):
        return [_described(value, put, where) for value in x]
    if isinstance(x, (bool, int, float, str, type(None))):
        return x
    raise UseError(f"{where} is a {type(x).__name__}, which cannot be saved: this model's cache stays in memory.")


def fill_layer(
    layer: Any, like: Any, state: Any, tensors: Tensors, rows: int | None = None, seen: int | None = None
) -> None:
    """Hold in a new `layer` what `state` describes.

    Args:
        like: the same layer of the model after one token of one row.
        tensors: those of the file.
        rows, seen: rows of the batch, and tokens the model saw; None where nothing else in the file tells.

    Raises:
        UseError: something is missing, or is not what such a layer holds.
    """
    fresh = dict(vars(layer))
    fed = _tensors_in(state) > _tensors_in(fresh)
    # a layer for another kind of input, such as images, may hold nothing after a token of text
    known_kind = _tensors_in(vars(like)) > _tensors_in(fresh)
    if not fed:
        if rows is not None and known_kind:
            raise misfit(f"a {type(layer).__name__} holds nothing.")
        like = layer
    known = {name: x for name, x in vars(like).items() if not isinstance(x, PLACES)}
    # what a forward does not change may be missing: another version of transformers had other settings
    needed = [name for name, x in known.items() if name not in fresh or not _same(x, fresh[name])]
    described = entries(state, f"a {type(layer).__name__}", needed, known)
    filling = _Filling(layer, described, tensors, rows, seen, exact=known_kind or not fed)
    filled = {name: filling.value(described[name], known[name], fresh.get(name), name) for name in described}
    vars(layer).update({name: x for name, x in vars(like).items() if isinstance(x, PLACES)} | filled)


PLACES = (torch.dtype, torch.device)
"""Types of a layer's entries that the model tells, not the file: the type and the device of its tensors."""


def _tensors_in(x: Any) -> int:
    if isinstance(x, Tensor) or (isinstance(x, dict) and "tensor" in x):
        return 1
    values = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return sum(_tensors_in(value) for value in values)


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and torch.equal(x, y.to(x.device))
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(_same(x[key], y[key]) for key in x)
    return type(x) is type(y) and bool(x == y)


class _Filling:
    """One layer that is filled, entry by entry.

    Args:
        exact: True if it is known what such a layer holds.
    """

    def __init__(
        self, layer: Any, state: dict[str, Any], tensors: Tensors, rows: int | None, seen: int | None, exact: bool
    ) -> None:
        self.kind, self.tensors, self.rows, self.seen, self.exact = type(layer).__name__, tensors, rows, seen, exact
        self.window = getattr(layer, "sliding_window", None)
        self.recording = state.get("record_past") is True
        if seen is None and any(type(state.get(name)) is int for name in COUNTED):
            self.seen = next(state[name] for name in COUNTED if type(state.get(name)) is int)

    def value(self, x: Any, like: Any, fresh: Any, name: str) -> Any:
        """Return the value that `x` describes, for a layer that has `like` after a token, and `fresh` before."""
        what = f"{name} of a {self.kind}"
        if isinstance(like, Tensor) or (like is None and not self.exact and isinstance(x, dict)):
            return self._tensor(entries(x, what, ["tensor"], ["device"])["tensor"], like, fresh, name, what)
        if isinstance(like, Mapping):
            listed = items(entries(x, what, ["items"])["items"], what, len(like))
            return {
                self._key(pair, key, what): self.value(pair[1], like[key], _at(fresh, key), name)
                for pair, key in zip(listed, like, strict=True)
            }
        if isinstance(like, list | tuple):
            listed = items(x, what, len(like))
            values = [self.value(*pair, _at(fresh, i), name) for i, pair in enumerate(zip(listed, like, strict=True))]
            return type(like)(values)
        if name in COUNTED and type(like) is int:
            return count(x, what, self.seen or 0, self.seen)
        if type(x) is type(like) and (x == like or name in FREE or (not self.exact and isinstance(x, bool))):
            return x
        raise misfit(f"{what} is not {like!r}.")

    def _key(self, pair: Any, key: Any, what: str) -> Any:
        mine, _ = items(pair, what, 2)
        if type(mine) is not type(key) or mine != key:
            raise misfit(f"{what} has nothing at {key!r}.")
        return key

    def _tensor(self, key: Any, like: Tensor | None, fresh: Any, name: str, what: str) -> Tensor:
        if isinstance(fresh, Tensor) and like is not None and like.shape == fresh.shape:  # a constant
            x = self.tensors.read(key, like.shape, [like.dtype], like.device, what)
            if not torch.equal(x, like):
                raise misfit(f"{what} is not {like}.")
            return like
        if like is None:  # of this kind of input only rank and rows are known
            if TOKENS_AXIS.get(name) is None:
                raise misfit(f"{what} is not known.")
            return self.tensors.read(key, (self.rows, None, None, None), FLOATS, torch.device("cpu"), what)
        # one row and one token of the model, as many of both here as the file has
        shape: list[int | None] = list(like.shape)
        row, token = ROWS_AXIS.get(name, 0), TOKENS_AXIS.get(name)
        shape[row] = self.rows
        free = [token] if token is not None else []
        if token is None and name not in STATES:
            free = [axis for axis, n in enumerate(like.shape) if n == 1 and axis != row]
        if name == "conv_states" and self.recording:
            free = [like.dim() - 1]
        for axis in free:
            shape[axis] = None
        longest = None if self.seen is None else self.seen + max(like.shape)
        x = self.tensors.read(key, shape, [like.dtype], like.device, what, longest)
        self.rows = x.shape[row]
        for axis in free:
            self._check_tokens(x.shape[axis], like.shape[axis], axis == token, what)
        return x

    def _check_tokens(self, tokens: int, least: int, counted: bool, what: str) -> None:
        """As many tokens as the layer must hold of those it has seen."""
        if self.seen is None:
            self.seen = tokens
        most = least + self.seen
        if counted:
            most = least = self.seen
            if self.window is not None and self.window > 1:
                least = min(self.seen, self.window - 1)
                most = self.seen if self.recording else least
            if self.kind not in EXACT:
                least = 0
        if not least <= tokens <= most:
            raise misfit(f"{what} are {tokens} tokens of {self.seen} that were read.")


STATES = ("conv_states", "recurrent_states")
EXACT = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Layers that hold all tokens they saw, or just those of their window."""


def _at(x: Any, key: Any) -> Any:
    try:
        return None if x is None else x[key]
    except LookupError:
        return None
