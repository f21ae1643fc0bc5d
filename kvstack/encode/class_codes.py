"""The class of each token, in as few bits as there are classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import Packed
from ..stage import Encoder
from .bits import pack, unpack
from .channel_codes import GRANULE

__all__ = ["ClassCodes"]


class ClassCodes(Encoder):
    """Packs numbers below `classes`, (B, 1, T, 1) uint8, 8 tokens together."""

    def __init__(self, classes: int) -> None:
        self.bits = (classes - 1).bit_length()

    @property
    def reads_room(self) -> bool:
        return True

    def granule(self, width: int) -> int:
        return GRANULE

    def encode(self, x: Tensor, role: str) -> Packed:
        codes = pack(x.unflatten(2, (-1, GRANULE)).squeeze(-1), self.bits, 3)
        return Packed({"classes": codes}, tokens=x.shape[2], width=1, dtype=torch.uint8)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        x = unpack(packed.parts["classes"], self.bits, 3, GRANULE).flatten(2).unsqueeze(-1)
        return x if out is None else out.copy_(x)
