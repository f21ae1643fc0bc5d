"""The encoder a stack uses where the user named none but a transform's latents must be stored: as they are, or in the
bits that the transform has given each channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..packed import Packed
from ..stage import Encode
from ..types import Channels
from . import channel_codes as waterfill

__all__ = ["Plain"]


@dataclass(frozen=True, repr=False)
class Plain(Encode):
    """Keeps numbers as they are, where no channel has bits of its own."""

    name = "plain"

    def granule(self, width: int, channels: Channels | None = None) -> int:
        return waterfill.GRANULE if channels is not None and channels.bits is not None else 1

    def encode(self, x: Tensor, role: str, channels: Channels | None = None) -> Packed:
        if channels is not None and channels.bits is not None:
            return waterfill.encode(x, channels)
        return Packed({"data": x.contiguous()}, tokens=x.shape[2], width=x.shape[3], dtype=x.dtype)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        if packed.channels is not None:
            return waterfill.decode(packed, out)
        data = packed.parts["data"]
        return data if out is None else out.copy_(data)
