"""Keeping a stack in a generation where the model's own `prepare_inputs_for_generation` leaves it out.

Phi-3 and its kin switch their rotary embedding when a text grows beyond a certain length. Keys that are cached by then
were rotated the other way, so the model reads the text again, without a cache: transformers then makes a new one, and
the one that `generate` was given is silently out of use. Here it forgets its text, and is given back to the
forward that reads it again.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UseError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeptStack", "leaves_out"]

PREPARE = "prepare_inputs_for_generation"


def _prepares_itself(model: Any) -> bool:
    from transformers import GenerationMixin

    return getattr(type(model), PREPARE, None) not in (None, getattr(GenerationMixin, PREPARE))


def leaves_out(model: PreTrainedModel, given: Mapping[str, Any]) -> int | None:
    """The length beyond which `model` reads a text without the cache it was given, where this forward, called with
    `given`, is such a one; None otherwise."""
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    longest = getattr(model.config.get_text_config(decoder=True), "original_max_position_embeddings", None)
    if not isinstance(longest, int) or ids is None or given.get("past_key_values", model) is not None:
        return None
    return longest if ids.shape[1] > longest and _prepares_itself(model) else None


class KeptStack:
    """Watches what a model that prepares its inputs itself makes of a stack: on the model itself, until `remove`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)
        self.prepare: Any = None
        if not _prepares_itself(model) or PREPARE in vars(model):
            return
        inside = getattr(type(model), PREPARE)

        @functools.wraps(inside)
        def prepare(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            given: Any = kwargs.get("past_key_values")
            inputs = inside(self, input_ids, *args, **kwargs)
            if hasattr(given, "begin_again") and inputs.get("past_key_values") is None:
                _check_whole(type(self).__name__, input_ids, inputs, given, kwargs.get("next_sequence_length"))
                given.begin_again()
                inputs["past_key_values"] = given
            return inputs

        # a method, so that a copy of the model gets one of its own
        self.prepare = vars(model)[PREPARE] = types.MethodType(prepare, model)

    def remove(self) -> None:
        model = self.model()
        if model is not None and self.prepare is not None and vars(model).get(PREPARE) is self.prepare:
            del vars(model)[PREPARE]


def _check_whole(name: str, input_ids: Any, inputs: Mapping[str, Any], given: Any, length: int | None) -> None:
    """Refuse to begin again without the beginning of the text. `length`: how much of `input_ids` is new, as generate
    says it where these are the whole text."""
    fed = next((inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None), input_ids)
    seen = int(given.get_seq_length())
    if (seen and length is None) or fed.shape[1] < input_ids.shape[1]:
        raise UseError(
            f"{name} leaves out its cache where a text crosses the length at which its rotary embedding switches, and "
            f"would read only the newest {fed.shape[1]} tokens again. Start with the whole text and a new stack."
        )
