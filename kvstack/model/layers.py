"""The layers of a model: their types, and its full-attention layers in groups that are stored together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CalibrationError
from .attention import attention_modules, device_of
from .rope import find_ropes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FULL", "LayerGroups", "group_size", "layer_types"]

FULL = "full_attention"
"""What transformers calls a layer whose cache grows with the text."""
MOST_LAYERS = 8


def layer_types(model: PreTrainedModel) -> tuple[list[str], list[dict[str, Any]]]:
    """What transformers' own cache would make of each layer: its type, and what that is built with."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    return types, arguments


class LayerGroups:
    """The full-attention layers of a model, in groups, on which device they are and how their keys are rotated.

    Args:
        size: layers in a group; None: a divisor of their number near 5.
        layers: the full-attention layers to group, where some hold nothing; None: all.

    Raises:
        CalibrationError: no such layer, or `size` does not divide their number.
    """

    def __init__(self, model: PreTrainedModel, size: int | None, layers: Sequence[int] | None = None) -> None:
        types, _ = layer_types(model)
        self.modules = attention_modules(model)
        every = [i for i, kind in enumerate(types) if kind == FULL and i in self.modules]
        self.full = every if layers is None else [i for i in every if i in layers]
        if not self.full:
            raise CalibrationError(f"{type(model).__name__} has no full-attention layer to calibrate for.")
        self.size = group_size(len(self.full)) if size is None else size
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
        """Whether any of the layers rotates its keys; those that don't have no rope."""
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

    def number_of(self, layers: Sequence[int]) -> int:
        """Which of the groups is `layers`."""
        return self.groups.index(list(layers))


def group_size(count: int) -> int:
    """How many of `count` layers to store together: the divisor nearest to 5, of those up to 8."""
    return min((n for n in range(1, MOST_LAYERS + 1) if count % n == 0), key=lambda n: (abs(n - 5), n))
