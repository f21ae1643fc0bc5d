"""Checking that the text of a generation goes on from what its cache has read.

`generate` skips as many ids as its cache has read, whatever these ids are. So a cache that has read another text gives
a wrong answer without an error, and one that has read more than there is fails inside of transformers. A cache that
has a `check_text` is shown the whole text before anything is computed.
"""

from __future__ import annotations

import functools
import types
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CheckedPrefill"]

PREFILL = "_prefill"
"""The method in which a generation has its cache and the ids of all rows (beams, several answers), but no result."""


class CheckedPrefill:
    """Watches the first step of every generation with a model: on the model itself, until `remove`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)
        self.prefill: Any = None
        inside = getattr(type(model), PREFILL, None)
        if inside is None or PREFILL in vars(model):
            return

        @functools.wraps(inside)
        def prefill(
            self: Any, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **more: Any
        ) -> Any:
            check = getattr(model_kwargs.get("past_key_values"), "check_text", None)
            if check is not None:
                first = args[0] if args else more.get("is_first_iteration", True)
                text = _whole_text(input_ids, generation_config, model_kwargs, first)
                if text is not None:
                    check(text)
            return inside(self, input_ids, generation_config, model_kwargs, *args, **more)

        # a method, so that a copy of the model gets one of its own
        self.prefill = vars(model)[PREFILL] = types.MethodType(prefill, model)

    def remove(self) -> None:
        model = self.model()
        if model is not None and self.prefill is not None and vars(model).get(PREFILL) is self.prefill:
            del vars(model)[PREFILL]


def _whole_text(ids: Any, config: Any, given: Any, first: bool) -> Tensor | None:
    """The ids (rows, n) or embeddings (rows, n, size) that generate takes for the whole text, what the cache has read
    included; None where it takes them for new ones."""
    embeddings = given.get("inputs_embeds")
    if embeddings is not None and first:
        return embeddings if isinstance(embeddings, Tensor) else None
    mask = given.get("attention_mask")
    length = mask.shape[1] if isinstance(mask, Tensor) else getattr(config, "_mask_length", -1)
    return ids if isinstance(ids, Tensor) and length == ids.shape[1] else None
