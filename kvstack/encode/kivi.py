"""KIVI: asymmetric uniform codes, keys per channel and values per token.

Keys have a few channels that are large for every token, so a scale is shared by `group` consecutive tokens of
one channel; values have no such channels, so a scale is shared by `group` channels of one token. Latents are
treated like keys: their channels differ far more than their tokens.

    keys    (B, H, T, D) -> codes (B, H, T/g, g*bits/8, D)   scale, low (B, H, T/g, D)
    values  (B, H, T, D) -> codes (B, H, T/g, g*bits/8, D)   scale, low (B, H, T, D/g)

    code = round((x - low) / scale)          x ~ low + scale * code

Codes of both are packed along the tokens, g tokens at a time, so that unpacking works on long runs of channels.

Every number comes back within half a step of its group. Encoding what was decoded changes nothing, as long as a
half can tell numbers of the group's size apart by less than half a step.

Source: Liu et al. 2024, arXiv 2402.02750, section 3. Differs from the paper: groups that do not vary, and
numbers that a half cannot hold, are guarded; the recent raw window belongs to the stack, not to the codec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UseError
from ..floats import saturated
from ..packed import Packed
from ..workspace import Workspace
from .bits import pack, runs, unpack

__all__ = ["Kivi"]

LARGE = 6e4  # above this a half overflows
SMALL = 8 * torch.finfo(torch.float16).tiny  # steps above this are normal halves
HUGE = torch.finfo(torch.float32).max / 4  # above this a range overflows float32


@dataclass(frozen=True)
class Kivi:
    """The codec behind `Quant(bits, codec="kivi")`; see the module's words for its layout."""

    bits: int
    group: int

    reads_with = "torch"

    def granule(self, width: int, role: str) -> int:
        return self.group

    def group_of(self, width: int) -> int:
        """Channels of a value that share a scale: `group`, or the whole head where heads are smaller."""
        return min(self.group, width)

    def problem(self, width: int) -> str | None:
        if width % self.group_of(width):
            return f"values have {width} channels, which do not divide into groups of {self.group}."
        return None

    def encode(self, x: Tensor, role: str) -> Packed:
        b, h, t, d = x.shape
        if role == "values":
            grouped, dim = x.reshape(b, h, t, d // self.group_of(d), self.group_of(d)), 4
        else:
            grouped, dim = x.reshape(b, h, t // self.group, self.group, d), 3
        grouped = grouped.float()
        least, most = torch.aminmax(grouped, dim=dim, keepdim=True)
        bound = float(torch.maximum(-least, most).amax())  # once: a GPU is waited for
        if not math.isfinite(bound):
            raise UseError(f"{role} hold NaN or infinity. Check the model's dtype (float16 overflows) and its input.")
        levels = 2**self.bits - 1
        # float32 only where a half would overflow, or cannot tell the steps from zero: it doubles what the scales cost
        known = bound == 0 or SMALL * levels < bound < LARGE
        meta = torch.float16 if known else torch.float32
        if bound > HUGE:
            grouped, least, most = grouped.double(), least.double(), most.double()
        low = least.to(meta)
        # never above the least number, so that none lies below its grid
        low = torch.where(low.float() > least, next_below(low), low)
        # a group that does not vary still needs a step above zero
        scale = ((most - low.float()) / levels).clamp_min(torch.finfo(meta).tiny).to(meta)
        codes = ((grouped - low.float()) / scale.float()).round_().clamp_(0, levels).to(torch.uint8)
        parts = {
            "codes": pack(codes.view(b, h, t // self.group, self.group, d), self.bits, 3),
            "scale": scale.squeeze(dim),
            "low": low.squeeze(dim),
        }
        return Packed(parts, tokens=t, width=d, dtype=x.dtype)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        codes, scale, low = packed.parts["codes"], packed.parts["scale"].float(), packed.parts["low"].float()
        b, h, t, d = *codes.shape[:2], packed.tokens, packed.width
        numbers = unpack(codes, self.bits, 3, self.group).float()  # (B, H, T/g, g, D)
        extreme = packed.parts["scale"].dtype == torch.float32
        if extreme and float(scale.amax()) > HUGE / 255:
            numbers = numbers.double()
        dim = 3
        if role == "values":
            numbers, dim = numbers.view(b, h, t, d // self.group_of(d), self.group_of(d)), 4
        numbers = numbers.mul_(scale.unsqueeze(dim)).add_(low.unsqueeze(dim)).view(b, h, t, d)
        dtype = packed.dtype if out is None else out.dtype
        numbers = saturated(numbers, dtype) if extreme else numbers
        return numbers.to(dtype) if out is None else out.copy_(numbers)

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """Scales go into the query, so codes only have to become floats:  q . (low + s*c) = q.low + (q*s).c"""
        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        b, h = codes.shape[:2]
        query = query.float()
        scaled = scale.unsqueeze(3) * query.unsqueeze(2)  # (B, H, T/g, G, D), float32
        products: dict[int, Tensor] = {}  # first token of a run -> (B, H, T/g, G, run)
        for start, piece, shift, width, weight in runs(codes, self.bits, 3, self.group):
            part = torch.matmul(scaled, as_floats(piece, shift, width, work).transpose(-1, -2))
            add_to(products, start, part, weight, piece.shape[3])
        out = torch.cat([products[start] for start in sorted(products)], dim=-1)
        out += torch.matmul(low.float(), query.transpose(-1, -2)).unsqueeze(-1)
        return out.transpose(2, 3).reshape(b, h, query.shape[2], packed.tokens)

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """Scales go into the weights:  p . (low + s*c) = p.low + (p*s).c"""
        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        b, h, g = weights.shape[:3]
        n, groups = self.group_of(packed.width), scale.shape[3]
        weights = weights.float()
        scaled = [weights * scale[..., i].unsqueeze(2) for i in range(groups)]  # (B, H, G, T), float32
        scaled = [x.unflatten(3, (-1, self.group)) for x in scaled]  # (B, H, G, T/g, g)
        out = torch.matmul(weights, low.float()).repeat_interleave(n, -1)  # (B, H, G, D)
        for start, piece, shift, width, weight in runs(codes, self.bits, 3, self.group):
            run = piece.shape[3]
            numbers = as_floats(piece, shift, width, work).flatten(2, 3)  # (B, H, T/g * run, D)
            for i, group in enumerate(scaled):
                mine = group[..., start : start + run].reshape(b, h, g, -1)
                channels = slice(i * n, (i + 1) * n)
                out[..., channels].add_(torch.matmul(mine, numbers[..., channels]), alpha=weight)
        return out


def add_to(found: dict[int, Tensor], start: int, part: Tensor, weight: int, run: int) -> None:
    """Add products of the run that begins at `start`. The first plane makes the runs; those of a later, narrower
    plane (3 bits = 2 + 1) are shorter and lie inside them."""
    if weight == 1:
        found[start] = part
        return
    size = next(iter(found.values())).shape[-1]
    inside = start % size
    found[start - inside][..., inside : inside + run].add_(part, alpha=weight)


def next_below(x: Tensor) -> Tensor:
    """The next smaller half; float32 is returned as it is. (`torch.nextafter` has no halves on every device.)"""
    if x.dtype != torch.float16:
        return x
    bits = x.view(torch.int16)
    below_zero = torch.full_like(bits, -32767)  # the bits of the largest negative half
    return torch.where(x > 0, bits - 1, torch.where(x < 0, bits + 1, below_zero)).view(torch.float16)


def as_floats(piece: Tensor, shift: int, width: int, work: Workspace) -> Tensor:
    """`(piece >> shift) & mask` as float32, in scratch memory."""
    bits = work.get("bits", tuple(piece.shape), torch.uint8, piece.device)
    floats = work.get("floats", tuple(piece.shape), torch.float32, piece.device)
    if shift:
        torch.bitwise_right_shift(piece, shift, out=bits)
        piece = bits
    if shift + width < 8:  # the topmost codes have nothing above them to mask
        torch.bitwise_and(piece, 2**width - 1, out=bits)
        piece = bits
    return floats.copy_(piece)
