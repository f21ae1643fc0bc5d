"""The encoder that changes nothing: for latents that are stored as they are, and for stacks without an encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..packed import Packed
from ..stage import Encode

__all__ = ["EXACT", "Exact"]


@dataclass(frozen=True, repr=False)
class Exact(Encode):
    """Keeps numbers as they are."""

    name = "exact"

    def encode(self, x: Tensor, role: str) -> Packed:
        return Packed({"data": x.contiguous()}, tokens=x.shape[2], width=x.shape[3], dtype=x.dtype)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        data = packed.parts["data"]
        return data if out is None else out.copy_(data)


EXACT = Exact()
