"""Scratch memory that one forward reuses for all layers and drops when it ends.

Reading a compressed layer needs somewhere to put the decoded tokens. Allocating that again for each layer costs
more than the arithmetic (fresh pages are zeroed by the system), so layers share one set of buffers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Workspace"]


class Workspace:
    """Named scratch buffers. What `get` returns is uninitialised, and valid until the same name is asked again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # an eighth more, so that a growing text does not reallocate at every token
            buffer = self._buffers[key] = torch.empty(size + size // 8, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def clear(self) -> None:
        self._buffers.clear()

    def tensors(self) -> list[Tensor]:
        return list(self._buffers.values())
