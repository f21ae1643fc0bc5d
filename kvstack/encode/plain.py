"""The encoder a stack uses where the user named none but a transform's latents must be stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..packed import Packed
from ..stage import Encode
from ..types import Channels

__all__ = ["Plain"]


@dataclass(frozen=True, repr=False)
class Plain(Encode):
    """Keeps numbers as they are."""

    name = "plain"

    def encode(self, x: Tensor, role: str, channels: Channels | None = None) -> Packed:
        return Packed({"data": x.contiguous()}, tokens=x.shape[2], width=x.shape[3], dtype=x.dtype)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        data = packed.parts["data"]
        return data if out is None else out.copy_(data)
