"""The full-attention layers of a model, in groups that are stored together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CalibrationError
from . import hooks as hook
from .rope import find_ropes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Grouping", "group_size"]

MOST_LAYERS = 8


class Grouping:
    """The full-attention layers of a model, in groups, on which device they are and how their keys are rotated."""

    def __init__(self, model: PreTrainedModel, layers: int | None) -> None:
        from transformers.cache_utils import get_layer_types_and_kwargs

        types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        self.modules = hook.attention_modules(model)
        self.full = [i for i, kind in enumerate(types) if kind == "full_attention" and i in self.modules]
        if not self.full:
            raise CalibrationError(f"{type(model).__name__} has no full-attention layer to calibrate for.")
        self.size = group_size(len(self.full)) if layers is None else layers
        if self.size < 1 or len(self.full) % self.size:
            divisors = [n for n in range(1, len(self.full) + 1) if len(self.full) % n == 0]
            raise CalibrationError(
                f"layers={layers}: {type(model).__name__} has {len(self.full)} full-attention layers, which do not "
                f"divide. Use one of {divisors}."
            )
        self.groups = [self.full[i : i + self.size] for i in range(0, len(self.full), self.size)]
        self.devices = {i: next(self.modules[i].parameters()).device for i in self.full}
        self.ropes = find_ropes(model, {i: self.modules[i] for i in self.full}, types)
        self.rotates = all(rope is not None for rope in self.ropes.values())
        if not self.rotates:  # all or none: keys of a group are compared with each other
            self.ropes = dict.fromkeys(self.full)


def group_size(count: int) -> int:
    """How many of `count` layers to store together: the divisor nearest to 5, of those up to 8."""
    return min((n for n in range(1, MOST_LAYERS + 1) if count % n == 0), key=lambda n: (abs(n - 5), n))
