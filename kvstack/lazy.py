"""The result of `update` if attention is answered from the store: tensors that are decoded when somebody looks.

To our own attention a `Lazy` tensor only says whose keys or values are wanted. To everybody else it is what it seems:
any operation on it decodes once and goes on with an ordinary tensor. Models look when they reuse the keys of an earlier
layer, expand cached latents, or make a mask out of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .errors import UseError

__all__ = ["Lazy", "refusing_gradient"]

# what is known without decoding
_KNOWN = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn")
}
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.__len__}


class Lazy(Tensor):
    """A tensor of `shape` like `like` that `decode` makes when it is first looked at."""

    _decode: Callable[[], Tensor]
    _decoded: Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, decode: Callable[[], Tensor]) -> Self:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made._decode, made._decoded = decode, None
        return made

    # only so that type checkers see the arguments
    def __init__(self, shape: tuple[int, ...], like: Tensor, decode: Callable[[], Tensor]) -> None: ...

    @property
    def decoded(self) -> Tensor:
        """The ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._decoded is None:
                self._decoded = self._decode()
            return self._decoded

    def is_decoded_as(self, x: Tensor) -> bool:
        """Return True if `x` is the tensor that this one was decoded to."""
        return vars(self)["_decoded"] is x

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # above autograd, so that gradients flow through what was decoded
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Lazy, lambda lazy: lazy.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Lazy, lambda lazy: lazy.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, message: str) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UseError(ctx.message)


def refusing_gradient(x: Tensor, message: str) -> Tensor:
    """`x`, through which no gradient can be asked for: `message` says why."""
    refusing: Tensor = _Refusing.apply(x.detach(), torch.zeros((), requires_grad=True), message)  # type: ignore[no-untyped-call]
    return refusing
