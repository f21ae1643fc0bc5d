"""Reading a text with transformers' own cache, while somebody hears what every attention call is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BindError
from ..model.attention import device_of
from ..model.hooks import Call, install

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Heard", "Read", "listening"]


@dataclass(frozen=True)
class Heard:
    """The inputs of attention in one layer.

    Attributes:
        queries: (1, H*G, Q, D), after rotary embedding.
        keys, values: (1, H, T, D) of all tokens so far; the queries are those of the newest Q.
        scaling: the factor attention multiplies q @ k with.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float


Hear = Callable[[int, Heard], None]
Read = Callable[[Sequence[Tensor], Hear], None]
"""`read(texts, hear)` feeds texts (1, T), one after the other, to one new cache; `hear(layer, heard)` is told of every
attention call of the last one."""


class _Listener:
    """Answers as if it were not there (a `Listener` of the hooks)."""

    def __init__(self, name: str, layers: Sequence[int]) -> None:
        self.name, self.layers = name, frozenset(layers)
        self.hear: Hear | None = None
        self.cache: Any = None

    def reads_another(self, layer: int) -> bool:
        return False

    def enter(self, call: Call) -> Any:
        return call.mask

    def attention(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Mapping[str, Any], plain: Any
    ) -> Any:
        if self.hear is not None and call.layer in self.layers:
            self._check(call.layer, query, key)
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            self.hear(call.layer, Heard(query, key, value, scaling))
        return plain(query, key, value, mask)

    def _check(self, layer: int, query: Tensor, key: Tensor) -> None:
        cached: Tensor = self.cache.layers[layer].keys
        if key.shape != cached.shape or not torch.equal(key, cached) or query.shape[1] % key.shape[1]:
            raise BindError(
                f"layer {layer} of {self.name} does not attend to the keys it caches, so no score can be fitted to its "
                'attention. Use a score that is not fitted, such as "keydiff", and budgets="equal".'
            )

    def leave(self, call: Call) -> None:
        """There is nothing to do."""


@contextmanager
def listening(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[Read]:
    """While this lasts, texts can be read with `model` and its attention in `layers` be heard."""
    from transformers import DynamicCache

    listener = _Listener(type(model).__name__, layers)
    remove = install(listener, model, {})

    def read(texts: Sequence[Tensor], hear: Hear) -> None:
        cache: Any = DynamicCache(config=model.config)
        cache.attention_listener, listener.cache = listener, cache
        for number, ids in enumerate(texts, 1):
            listener.hear = hear if number == len(texts) else None
            model.base_model(ids.to(device_of(model)), past_key_values=cache, use_cache=True)

    try:
        yield read
    finally:
        listener.cache = None
        remove()
