"""The raw part of the store: uncompressed tokens in a buffer that grows ahead of them.

`DynamicCache` copies the whole history for each new token (`torch.cat`). Here a new token is written behind the
others and attention gets a view. The buffer grows by an eighth rather than to twice its size: that copies a
token eight times over a cache's life instead of once, which does not show in any timing, and never holds more
than an eighth (or 16 tokens) of memory in reserve.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Buffer"]

RESERVE = 16


class Buffer:
    """Tokens of one layer's keys or values: (B, H, length, D) inside a larger allocation."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self._shared = False  # with another buffer: whoever writes copies first
        self.length = 0

    @property
    def view(self) -> Tensor:
        """(B, H, length, D), valid until the next `append` or `replace`."""
        assert self._data is not None
        return self._data[:, :, : self.length]

    @property
    def width(self) -> int:
        """Channels of a token."""
        assert self._data is not None
        return self._data.shape[-1]

    @property
    def device(self) -> torch.device:
        assert self._data is not None
        return self._data.device

    @property
    def tensors(self) -> list[Tensor]:
        return [] if self._data is None else [self._data]

    def append(self, new: Tensor) -> Tensor:
        """Write `new` (B, H, n, D) behind what is held; returns the view of all."""
        new = new.detach()
        total = self.length + new.shape[2]
        if self._data is None:
            self.replace(new)
            return self.view
        if (dtype := torch.promote_types(new.dtype, self._data.dtype)) != self._data.dtype:
            # under autocast only some forwards are in half precision
            self._data, self._shared = self._data.to(dtype), False
        # a tensor made under inference_mode cannot be written to outside of it
        frozen = self._data.is_inference() and not torch.is_inference_mode_enabled()
        # and a backward pass may still need what attention was given
        frozen |= torch.is_grad_enabled()
        if total > self._data.shape[2] or frozen or self._shared:
            b, h, _, d = self._data.shape
            size = (b, h, total + max(RESERVE, total // 8), d)
            grown = torch.empty(size, dtype=self._data.dtype, device=self._data.device)
            grown[:, :, : self.length] = self.view
            self._data, self._shared = grown, False
        self._data[:, :, self.length : total] = new
        self.length = total
        return self.view

    def replace(self, data: Tensor) -> None:
        """Hold `data` instead. A tensor that owns its storage is adopted; a view of a larger one is copied, or
        the larger one would stay alive."""
        owns = data.untyped_storage().nbytes() == data.numel() * data.element_size()
        self._data, self._shared = data if owns else data.clone(), False
        self.length = data.shape[2]

    def truncate(self, length: int) -> None:
        """Forget the newest tokens; memory goes with them where it is much."""
        self.length = length
        if self._data is not None and self._data.shape[2] > 2 * (length + max(RESERVE, length // 8)):
            self._data, self._shared = self.view.clone(), False

    def fork(self) -> Buffer:
        """The same tokens in the same memory. Whoever is written to first gets memory of its own."""
        other = Buffer()
        other._data, other.length = self._data, self.length
        self._shared = other._shared = self._data is not None
        return other
