"""The layers of a model: which of them a stack compresses, and these in groups that are stored together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BindError, CalibrationError
from ..turns import Pairs, Turns
from .attention import attention_modules, cross_attention_layers, device_of
from .rope import find_ropes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LayerGroups", "Layers", "find_layers", "group_size"]

GROWING = ("full_attention", "hybrid")
"""transformers' names of layers whose cache grows with the text; a hybrid one holds a state of fixed size as well."""
INDEXED = "indexed_attention"
FIXED = {
    "sliding_attention": "a window of the text",
    "chunked_attention": "a window of the text",
    "hybrid_sliding": "a state and a window of the text",
    "linear_attention": "a state of fixed size",
    "conv": "a state of fixed size",
    "dummy": "nothing",
}
"""The data that layers of other types hold, if it is bounded for every length of the text."""
MOST_LAYERS = 8


@dataclass(frozen=True)
class Layers:
    """The layers of a model, as its cache sees them.

    Attributes:
        types, arguments: the layers that transformers' own cache would make.
        modules: the attention module of each layer that has one of its own.
        full: layers whose keys and values a stack compresses.
        growing: why each other layer whose cache grows with the text is left to transformers.
        fixed: the content of each layer whose cache does not grow.
    """

    types: Sequence[str]
    arguments: Sequence[Mapping[str, Any]]
    modules: Mapping[int, nn.Module]
    full: Sequence[int]
    growing: Mapping[int, str]
    fixed: Mapping[int, str]


def find_layers(model: PreTrainedModel) -> Layers:
    """Sort the layers of `model` by what a stack can do with them."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if len(types) != len(arguments):
        raise BindError(
            f"the config of this {type(model).__name__} has {len(arguments)} layers (num_hidden_layers), and "
            f"layer_types for {len(types)}. Use config.layer_types = config.layer_types[:{len(arguments)}]."
        )
    modules, cross = attention_modules(model), cross_attention_layers(model)
    full, growing, fixed = [], dict[int, str](), dict[int, str]()
    for layer, kind in enumerate(types):
        if kind in FIXED:
            fixed[layer] = FIXED[kind]
        elif kind in GROWING and layer in cross:
            fixed[layer] = "keys and values of something else than the text"
        elif kind in GROWING and layer in modules:
            full.append(layer)
        elif kind in GROWING:
            growing[layer] = "no attention module is theirs alone"
        elif kind == INDEXED:
            growing[layer] = "an indexer with keys of its own chooses their tokens"
        else:
            growing[layer] = f"they are of type {kind}, which kvstack does not know"
    return Layers(types, arguments, modules, full, growing, fixed)


class LayerGroups:
    """The full-attention layers of a model, in groups, on which device they are and how their keys are rotated.

    Args:
        size: layers in a group; None: a divisor of their number near `near`.
        layers: the full-attention layers to group, where some hold nothing; None: all.
        near, most: layers that a group should hold, and may hold at most, without `size` (default 5 and 8).

    Raises:
        CalibrationError: no such layer, or `size` does not divide their number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        size: int | None,
        layers: Sequence[int] | None = None,
        near: float = 5,
        most: int = MOST_LAYERS,
    ) -> None:
        found = find_layers(model)
        self.modules, every = dict(found.modules), found.full
        self.full = every if layers is None else [i for i in every if i in layers]
        if not self.full:
            raise CalibrationError(f"{type(model).__name__} has no full-attention layer to calibrate for.")
        self.size = group_size(len(self.full), near, most) if size is None else size
        if self.size < 1 or len(self.full) % self.size:
            divisors = [n for n in range(1, len(self.full) + 1) if len(self.full) % n == 0]
            left = "" if len(self.full) == len(every) else " that hold keys and values"
            raise CalibrationError(
                f"layers={size}: {type(model).__name__} has {len(self.full)} full-attention layers{left}, which do not "
                f"divide. Use one of {divisors}."
            )
        self.groups = [self.full[i : i + self.size] for i in range(0, len(self.full), self.size)]
        self.devices = {i: device_of(self.modules[i]) for i in self.full}
        self.ropes = find_ropes(model, {i: self.modules[i] for i in self.full})

    @property
    def rotates(self) -> bool:
        """True if any of the layers rotates its keys; those that don't have no rope."""
        return bool(self.rotated)

    @property
    def rotated(self) -> list[int]:
        """The layers that rotate their keys."""
        return [i for i, rope in self.ropes.items() if rope is not None]

    @property
    def refusal(self) -> str:
        """Why the keys of some layer cannot be un-rotated; empty: they can."""
        refused = ((i, rope.refusal) for i, rope in self.ropes.items() if rope is not None and rope.refusal)
        return next((f"layer {i}: {reason}" for i, reason in refused), "")

    def unrotated(self, layer: int, x: Tensor) -> Tensor:
        """Keys or queries `x` (1, heads, T, D) of the first T tokens of a text, without rotary embedding."""
        rope = self.ropes[layer]
        if rope is None:
            return x
        return rope.unrotate(x, rope.marked(torch.arange(x.shape[2], device=x.device)[None, None]))

    def pairs(self, layer: int, width: int) -> Pairs | None:
        """The channels of a layer's heads of `width` that turn together: none where it does not rotate; None where its
        rotation is not one of pairs."""
        rope, device = self.ropes[layer], self.devices[layer]
        if rope is None:
            return Turns.none(1, width, device).pairs
        turns = rope.turns(rope.marked(torch.ones(1, 1, 1, dtype=torch.int32, device=device)), width)
        return None if turns is None else turns.pairs

    def number_of(self, layers: Sequence[int]) -> int:
        """Return the index of the group that is `layers`."""
        return self.groups.index(list(layers))


def group_size(count: int, near: float = 5, most: int = MOST_LAYERS) -> int:
    """Return how many of `count` layers to store together: the divisor nearest to `near`, up to `most` and to 8."""
    return min((n for n in range(1, min(most, MOST_LAYERS) + 1) if count % n == 0), key=lambda n: (abs(n - near), n))
