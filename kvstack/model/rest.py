"""Running a model on text of our own without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["at_rest"]


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients for weights, and gradients possible whatever the caller has switched off. What
    modules remember of the last text they read (`rope_deltas` of Qwen-VL, tables that grow with the text) is put
    back: the model may be in the middle of `generate`."""
    training = model.training
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    remembered = [(module, _plain(vars(module)), dict(module._buffers)) for module in model.modules()]
    model.eval()
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for module, plain, buffers in remembered:
            for name in _plain(vars(module)).keys() - plain.keys():
                del vars(module)[name]
            vars(module).update(plain)
            module._buffers.clear()
            module._buffers.update(buffers)
        model.train(training)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes that are neither torch's own bookkeeping nor functions that others have put in a method's place."""
    return {name: x for name, x in attributes.items() if not name.startswith("_") and not callable(x)}
