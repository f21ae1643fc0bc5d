"""Readers of KIVI's codes: scales go into the query or the weights, so codes only have to become numbers on the way."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..packed import Packed
from ..workspace import Workspace
from . import compiled
from .sizes import parts
from .triton.launch import LARGEST, MOST

if TYPE_CHECKING:
    from ..encode.kivi import Kivi
    from ..stage import Reader

__all__ = ["CompiledCodes", "KernelCodes", "TritonCodes", "fastest"]

IN_ONE_PLANE = (2, 4, 8)
"""Bits that Triton's kernels know."""


def fastest(codec: Kivi, device: torch.device) -> Reader:
    """The fastest reader that was seen to be right on a device."""
    if device.type == "cpu" and _agrees(codec.bits, codec.group):
        return CompiledCodes(codec)
    if device.type == "cuda" and _agrees_on(device, codec.bits, codec.group, 3 * codec.group, 3):
        return TritonCodes(codec)
    return codec


@functools.cache
def _agrees(bits: int, group: int) -> bool:
    from ..encode.kivi import Kivi

    codec, draw = Kivi(bits, group), torch.Generator().manual_seed(0)
    width = 3 * group  # no power of two
    x, query = (torch.randn(2, 2, n, width, generator=draw) for n in (3 * group, 3))
    weights = torch.rand(2, 2, 3, 3 * group, generator=draw)

    def pairs() -> Iterator[tuple[Tensor, ...]]:
        keys, values, work = codec.encode(x, "keys"), codec.encode(x, "values"), Workspace()
        readers = codec, CompiledCodes(codec)
        yield tuple(each.dot(query, keys, "keys", work) for each in readers)
        yield tuple(each.mix(weights, values, "values", work) for each in readers)

    return compiled.agree(pairs)


@functools.cache
def _agrees_on(device: torch.device, bits: int, group: int, width: int, queries: int) -> bool:
    """Return True if Triton's kernels agree on a device with plain torch on the processor. For each size of heads: it
    has kernels of its own, which may be too large for this device."""
    from ..encode.kivi import Kivi

    if bits not in IN_ONE_PLANE:
        return False
    codec, draw, work = Kivi(bits, group), torch.Generator().manual_seed(0), Workspace()
    tokens = 5 * group
    x, query = (torch.randn(2, 2, n, width, generator=draw) for n in (tokens, queries))
    weights = torch.rand(2, 2, queries, tokens, generator=draw)

    def pairs() -> Iterator[tuple[Tensor, ...]]:
        reader = TritonCodes(codec)
        keys, values = (codec.encode(x, role) for role in ("keys", "values"))
        on_device = [packed.mapped(lambda part: part.to(device)) for packed in (keys, values)]
        yield codec.dot(query, keys, "keys", work), reader._dot(query.to(device), on_device[0], work, None).cpu()
        yield (
            codec.mix(weights, values, "values", work),
            reader._mix(weights.to(device), on_device[1], work, None).cpu(),
        )

    return compiled.agree(pairs, "triton")


class KernelCodes:
    """Reads codes with kernels. What these do not know (float32 scales, float64 queries), the codec reads."""

    reads_with: str

    def __init__(self, codec: Kivi) -> None:
        self.codec = codec

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace, raw: Tensor | None = None) -> Tensor:
        """`query` (B, H, G, D) times the transposed packed keys, and then times `raw` ones: (B, H, G, T)."""
        if self._reads(query, packed):
            return self._dot(query, packed, work, raw)
        found = self.codec.dot(query, packed, role, work)
        return found if raw is None else with_raw(found, query, raw)

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace, raw: Tensor | None = None) -> Tensor:
        """`weights` (B, H, G, T) times the packed values and then `raw` ones: (B, H, G, D)."""
        if role == "values" and self._reads(weights, packed):
            return self._mix(weights, packed, work, raw)
        sealed, loose = weights.tensor_split([packed.tokens], dim=-1)
        found = self.codec.mix(sealed, packed, role, work)
        return found if raw is None else found + torch.matmul(loose, raw.to(loose.dtype))

    def _reads(self, x: Tensor, packed: Packed) -> bool:
        if x.dtype != torch.float32 or packed.parts["scale"].dtype != torch.float16:
            return False
        return packed.apart > 0 and all(part.device == x.device for part in packed.parts.values())

    def _dot(self, query: Tensor, packed: Packed, work: Workspace, raw: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _mix(self, weights: Tensor, packed: Packed, work: Workspace, raw: Tensor | None) -> Tensor:
        raise NotImplementedError


class CompiledCodes(KernelCodes):
    """Reads codes with kernels for a processor."""

    reads_with = "numba"

    def _dot(self, query: Tensor, packed: Packed, work: Workspace, raw: Tensor | None) -> Tensor:
        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        b, h, g, d = query.shape
        units, tokens = codes.shape[2], self.codec.group
        pieces, loose = parts(b * h, units), 0 if raw is None else raw.shape[2]
        out = torch.empty(b, h, g, packed.tokens + loose)
        scratch = work.get("rows", (torch.get_num_threads(), (tokens + 1) * d), torch.float32, query.device)
        compiled.kernel("kivi.dot")(
            b * h * pieces, pieces, query.contiguous(), codes, scale, low, out, scratch, g, d, units,
            self.codec.bits, tokens, *((0, 0, 0) if raw is None else compiled.side_by_side(raw)),
            packed.apart // tokens,
        )  # fmt: skip
        return out

    def _mix(self, weights: Tensor, packed: Packed, work: Workspace, raw: Tensor | None) -> Tensor:
        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        (b, h, g, _), d = weights.shape, packed.width
        units, tokens = codes.shape[2], self.codec.group
        pieces = parts(b * h, units)
        out = torch.empty(b, h, pieces, g, d)
        scratch = work.get("rows", (torch.get_num_threads(), tokens * d), torch.float32, weights.device)
        compiled.kernel("kivi.mix")(
            b * h * pieces, pieces, weights.contiguous(), codes, scale, low, out, scratch, g, d, units,
            self.codec.bits, tokens, scale.shape[3], *((0, 0, 0) if raw is None else compiled.side_by_side(raw)),
            packed.apart // tokens,
        )  # fmt: skip
        return out[:, :, 0] if pieces == 1 else out.sum(2)

    def _reads(self, x: Tensor, packed: Packed) -> bool:
        return x.device.type == "cpu" and super()._reads(x, packed)


class TritonCodes(KernelCodes):
    """Reads codes with kernels for a GPU."""

    reads_with = "triton"

    def _dot(self, query: Tensor, packed: Packed, work: Workspace, raw: Tensor | None) -> Tensor:
        from .triton import kivi

        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        bits, group, loose = self.codec.bits, self.codec.group, 0 if raw is None else raw.shape[2]
        out = kivi.dot(query, codes, scale, low, bits, group, packed.apart // group, loose)
        if raw is not None:
            out[..., packed.tokens :] = query @ raw.to(query.dtype).mT
        return out

    def _mix(self, weights: Tensor, packed: Packed, work: Workspace, raw: Tensor | None) -> Tensor:
        from .triton import kivi

        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        bits, group = self.codec.bits, self.codec.group
        out = kivi.mix(weights, codes, scale, low, bits, group, packed.apart // group)
        return out if raw is None else out + weights[..., packed.tokens :] @ raw.to(weights.dtype)

    def _reads(self, x: Tensor, packed: Packed) -> bool:
        fits = packed.width <= LARGEST and x.shape[2] <= MOST
        if not (fits and super()._reads(x, packed)):
            return False
        return _agrees_on(x.device, self.codec.bits, self.codec.group, packed.width, x.shape[2])


def with_raw(scores: Tensor, query: Tensor, raw: Tensor) -> Tensor:
    """`scores` (B, H, G, T), followed by those of `raw` keys."""
    loose = torch.matmul(query, raw.to(query.dtype).transpose(-1, -2))
    return torch.cat([scores, loose.to(scores.dtype)], dim=-1)
