"""Running a model of 16-bit weights in float32, without a copy of its weights.

Processors that have no instructions for halves multiply them many times slower than float32, and backwards a hundred
times. So a large matrix is converted where it is multiplied with, forwards and backwards, and forgotten; small weights
are converted for the time being. Everything between them is then float32 by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.attention import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["in_float32"]

log = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
SMALL = 1 << 22
"""Numbers of a weight that may be converted for the time being: norms, biases, convolutions."""


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Compute what the linear layers, norms and embeddings of `model` compute in float32, if it has 16-bit weights on a
    processor. It is left as it is elsewhere, and where its layers are of other kinds, or do not go together in float32.
    """
    with ExitStack() as ends:
        if device_of(model).type == "cpu" and model.dtype in HALVES and _knows_all(model):
            with ExitStack() as tried:
                _change(model, tried)
                if _runs(model):
                    ends.push(tried.pop_all())
        yield


def _knows_all(model: nn.Module) -> bool:
    """Return True if every large weight is that of a plain linear layer or an embedding, and in memory, and no module
    has another forward than its own."""
    for module in model.modules():
        plain = type(module) is nn.Linear or isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False):
            own = weight.device.type != "cpu" or type(weight.data) is not Tensor or "forward" in vars(module)
            if own or not (plain or weight.numel() <= SMALL):
                log.info(
                    "%s is calibrated in its own type: %s is not plain", type(model).__name__, type(module).__name__
                )
                return False
    return True


def _change(model: nn.Module, ends: ExitStack) -> None:
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in HALVES:
            module.forward = partial(_multiplied, module)  # type: ignore[method-assign]
            ends.callback(vars(module).pop, "forward")
        elif isinstance(module, nn.Embedding) and module.weight.dtype in HALVES:
            ends.callback(module.register_forward_hook(_as_float32).remove)
        else:
            for weight in module.parameters(recurse=False):
                if weight.dtype in HALVES:
                    ends.callback(setattr, weight, "data", weight.data)
                    weight.data = weight.data.float()


def _runs(model: PreTrainedModel) -> bool:
    """Return True if two tokens go through, one after the other."""
    from transformers import DynamicCache

    try:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            for _ in range(2):
                model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    except Exception as error:  # types that do not go together, whoever finds that out
        log.info("%s is calibrated in %s: %s", type(model).__name__, model.dtype, error)
        return False
    return True


def _as_float32(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()


def _multiplied(module: nn.Linear, x: Tensor) -> Tensor:
    """Compute a linear layer in float32."""
    made: Tensor = _Product.apply(x, module.weight.detach())  # type: ignore[no-untyped-call]
    return made if module.bias is None else made + module.bias.detach()


class _Product(torch.autograd.Function):
    """x W^T, with a gradient for x alone; W is converted for each of the two products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient @ ctx.weight.float()).to(ctx.dtype), None
