"""Gradients through models whose forward is not made for them.

States of linear attention are overwritten in place   ->  what the backward pass needs is kept apart
kernels of quantized weights that have no backward    ->  the weights are found out by unit vectors
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["differentiable", "slopes"]

SCALES = (256.0, 1.0, 2.0**-8)
"""Factors on the likelihood, tried in turn: float16 loses small gradients, and has none above 65,504."""
TOLERANCE = 0.05
"""Relative error that products of 4 bits, or in bfloat16, may have."""
OTHERWISE = (
    'Use CommonKV(basis="weights") or stages that are not calibrated, such as Quant, for this model, or load it '
    "without quantization."
)


@contextmanager
def differentiable(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Let gradients flow through a forward of `model` that goes on with `cache`, and through its backward."""
    with ExitStack() as ends:
        if any(hasattr(layer, "update_conv_state") for layer in cache.layers):
            ends.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        for name, module in model.named_modules():
            if not list(module.children()):
                ends.callback(module.register_forward_hook(_Mended(name)).remove)
        yield


def slopes(model: PreTrainedModel, likelihood: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of `likelihood` with regard to each of the `leaves`, float32.

    Raises:
        CalibrationError: there is none, or it is not finite.
    """
    name = type(model).__name__
    if not likelihood.requires_grad:
        raise CalibrationError(f"calibration takes gradients, and none pass through this {name}. {OTHERWISE}")
    for scale in SCALES:
        try:
            found = torch.autograd.grad(likelihood * scale, leaves, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no derivative of a kernel, a tensor that was overwritten
            reason = str(error).splitlines()[0].rstrip(".")
            raise CalibrationError(
                f"calibration takes gradients, and none pass through this {name}: {reason}. {OTHERWISE}"
            ) from error
        if any(x is None for x in found):
            raise CalibrationError(
                f"calibration takes gradients, and none reach the cache of some layers of this {name}. {OTHERWISE}"
            )
        gradients = [x.float() / scale for x in found]
        if all(bool(x.isfinite().all()) for x in gradients):
            return gradients
    raise CalibrationError(
        f"calibration takes gradients, and those of this {name} are not finite in {model.dtype}. Load it in bfloat16 "
        "or float32: a calibration serves all types."
    )


class _Mended:
    """A forward hook: gives an output that gradients end at the gradient of a linear function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = args[0] if args else None
        if not (torch.is_grad_enabled() and isinstance(x, Tensor) and isinstance(output, Tensor) and x.requires_grad):
            return None
        if output.requires_grad or x.shape[:-1] != output.shape[:-1]:
            return None
        mended: Tensor = _Linear.apply(x, output, module, self.name)  # type: ignore[no-untyped-call]
        return mended


class _Linear(torch.autograd.Function):
    """An output as it is; backwards, what the module does to unit vectors tells its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, module: nn.Module, name: str) -> Tensor:
        ctx.module, ctx.name = module, name
        ctx.sample = x.flatten(0, -2)[-8:].detach(), output.flatten(0, -2)[-8:].detach()
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, y = ctx.sample
        units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        bias = ctx.module(torch.zeros_like(x[:1])).float()
        weight = ctx.module(units).float() - bias
        if not float((x.float() @ weight + bias - y).norm()) <= TOLERANCE * float(y.float().norm()):
            raise CalibrationError(f"calibration takes gradients, and {ctx.name} passes none on. {OTHERWISE}")
        return (gradient.float() @ weight.T).to(x.dtype), None, None, None
