"""Finding the causal model that an inner model is part of: only that one predicts tokens."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["with_head"]


def with_head(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model in memory that holds `model` and predicts tokens with it; `model` itself where it predicts, None where
    there is none.

    A module does not know what it is part of, so all objects in memory are looked at: a second or less, once.
    """
    from transformers import PreTrainedModel

    if model.get_output_embeddings() is not None:
        return model
    for found in gc.get_objects():
        # its type alone: other objects may do anything when they are asked for their class
        if not issubclass(type(found), PreTrainedModel) or found is model or found.get_output_embeddings() is None:
            continue
        if any(inner is model for inner in found.modules()):
            return found
    return None
