"""Running a model on text of our own without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["at_rest", "buffers_kept"]


OFFSETS = "rope_deltas"
"""The attribute in which models that see images note how far the positions of their last text ran ahead or behind, row
by row."""


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients for weights, and gradients possible whatever the caller has switched off. The
    model is left as it was."""
    before = [(module, _plain(vars(module)), dict(module._buffers)) for module in model.modules()]
    asked = [(module, name) for module in model.modules() for name, x in _parameters(module) if x.requires_grad]
    model.eval()
    for module, name in asked:
        module._parameters[name].requires_grad_(False)
    for module, attributes, _ in before:
        if attributes.get(OFFSETS) is not None:
            setattr(module, OFFSETS, None)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, name in asked:  # weights that accelerate keeps elsewhere are other objects after each forward
            module._parameters[name].requires_grad_(True)
        for module, attributes, buffers in before:
            vars(module).update(attributes)
            module._buffers.update(buffers)


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Leave these modules as they are: some rotary tables depend on the longest text so far."""
    before = [(module, _plain(vars(module)), dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).update(attributes)
            module._buffers.update(buffers)


def _parameters(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Those that are the module's own."""
    return ((name, x) for name, x in module._parameters.items() if x is not None)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that a forward may leave in a module: its mode, the offset of image positions, the longest
    text so far, which some rotary tables depend on. From a copy: other threads put guards on the module meanwhile."""
    kinds = (bool, int, float, str, Tensor, type(None))
    return {name: value for name, value in dict(attributes).items() if isinstance(value, kinds)}
