"""Blockwise codes from bitsandbytes: nf4, fp4 (4 bits) and int8 (8 bits), one absolute maximum per block.

bitsandbytes quantizes a flat tensor in runs of `block` numbers, so the axis that should share a scale is laid
last: tokens for keys and latents, channels for values. Where a head is smaller than a block, a value's block
spans several tokens, which then can only be dropped together.

    keys    (B, H, T, D) -> (B, H, T/g, D, g)          codes (B, H, T/g, D*g*bits/8)   absmax (B, H, T/g, D*g/block)
    values  (B, H, T, D) -> (B, H, T/u, u*D)           codes (B, H, T/u, u*D*bits/8)   absmax (B, H, T/u, u*D/block)

Source: Dettmers et al. 2022 and 2023, arXiv 2110.02861 and 2305.14314. The absolute maxima are stored as
halves (as float32 where they would overflow), which bitsandbytes itself keeps in float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UseError
from ..floats import wide
from ..packed import Packed
from ..workspace import Workspace

__all__ = ["Blockwise"]


@functools.cache
def functional() -> Any:
    # imported on first use: it takes a second, and most stacks do not need it
    import bitsandbytes.functional as module

    return module


@functools.cache
def int8_map(device: torch.device) -> Tensor:
    """The 256 levels of bitsandbytes' dynamic 8-bit type."""
    levels: Tensor = functional().create_dynamic_map()
    return levels.to(device)


def _known(dtype: torch.dtype) -> torch.dtype:
    """The floating type that bitsandbytes is given: it knows none of 64 bits, and its codes are far coarser than 32."""
    return torch.float32 if dtype == torch.float64 else dtype


@dataclass(frozen=True)
class Blockwise:
    """The codec behind `Quant(4, codec="nf4")` and its kin."""

    codec: str  # nf4, fp4 or int8
    group: int  # numbers that share a scale: the block size of bitsandbytes

    @property
    def bits(self) -> int:
        return 8 if self.codec == "int8" else 4

    def granule(self, width: int, role: str) -> int:
        return self.group // math.gcd(self.group, width) if role == "values" else self.group

    def problem(self, width: int) -> str | None:
        return None

    def encode(self, x: Tensor, role: str) -> Packed:
        b, h, t, d = x.shape
        granule = self.granule(d, role)
        units = t // granule
        if role != "values":
            x = x.reshape(b, h, units, granule, d).transpose(-1, -2)
        flat = x.reshape(-1).to(_known(x.dtype)).contiguous()
        if not bool(torch.isfinite(flat).all()):
            raise UseError(f"{role} hold NaN or infinity. Check the model's dtype (float16 overflows) and its input.")
        if self.codec == "int8":
            codes, state = functional().quantize_blockwise(flat, code=int8_map(x.device), blocksize=self.group)
        else:
            codes, state = functional().quantize_4bit(flat, quant_type=self.codec, blocksize=self.group)
        absmax = state.absmax
        half = absmax.half()
        # float32 only where a half would overflow, or lose small numbers
        close = (half.float() - absmax).abs() <= absmax * torch.finfo(half.dtype).eps
        absmax = half if bool(close.all()) else absmax
        parts = {"codes": codes.view(b, h, units, -1), "absmax": absmax.view(b, h, units, -1)}
        return Packed(parts, tokens=t, width=d, dtype=x.dtype)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        codes, absmax = packed.parts["codes"], packed.parts["absmax"]
        b, h, units = codes.shape[:3]
        state = functional().QuantState(
            absmax=absmax.float().reshape(-1).contiguous(),
            shape=torch.Size([b * h * packed.tokens * packed.width]),
            code=int8_map(codes.device) if self.codec == "int8" else None,
            blocksize=self.group,
            quant_type=None if self.codec == "int8" else self.codec,
            dtype=_known(packed.dtype),
        )
        if self.codec == "int8":
            flat = functional().dequantize_blockwise(codes.reshape(-1).contiguous(), state)
        else:
            flat = functional().dequantize_4bit(codes.reshape(-1, 1).contiguous(), state)
        if role != "values":
            flat = flat.view(b, h, units, packed.width, self.group).transpose(-1, -2)
        numbers: Tensor = flat.reshape(b, h, packed.tokens, packed.width)
        return numbers.to(packed.dtype) if out is None else out.copy_(numbers)

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        query = wide(query)
        return torch.matmul(query, self.decode(packed, role).transpose(-1, -2).to(query.dtype))

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        weights = wide(weights)
        return torch.matmul(weights, self.decode(packed, role).to(weights.dtype))
