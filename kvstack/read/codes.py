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

if TYPE_CHECKING:
    from ..encode.kivi import Kivi
    from ..stage import Reader

__all__ = ["CompiledCodes", "fastest"]


def fastest(codec: Kivi, device: torch.device) -> Reader:
    """The fastest reader that was seen to be right on a device."""
    if device.type == "cpu" and _agrees(codec.bits, codec.group):
        return CompiledCodes(codec)
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


class CompiledCodes:
    """Reads codes with compiled kernels. What these do not know (float32 scales, float64 queries), the codec reads."""

    reads_with = "numba"

    def __init__(self, codec: Kivi) -> None:
        self.codec = codec

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace, raw: Tensor | None = None) -> Tensor:
        """`query` (B, H, G, D) times the transposed packed keys, and then times `raw` ones: (B, H, G, T)."""
        if not self._reads(query, packed, raw):
            found = self.codec.dot(query, packed, role, work)
            return found if raw is None else with_raw(found, query, raw)
        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        b, h, g, d = query.shape
        units, tokens = codes.shape[2], self.codec.group
        pieces, loose = parts(b * h, units), 0 if raw is None else raw.shape[2]
        out = torch.empty(b, h, g, packed.tokens + loose)
        scratch = work.get("rows", (torch.get_num_threads(), (tokens + 1) * d), torch.float32, query.device)
        compiled.kernel("kivi.dot")(
            b * h * pieces, pieces, query.contiguous(), codes, scale, low, out, scratch, g, d, units,
            self.codec.bits, tokens, *((0, 0, 0) if raw is None else compiled.side_by_side(raw)),
        )  # fmt: skip
        return out

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace, raw: Tensor | None = None) -> Tensor:
        """`weights` (B, H, G, T) times the packed values and then `raw` ones: (B, H, G, D)."""
        if not self._reads(weights, packed, raw) or role != "values":
            sealed, loose = weights.tensor_split([packed.tokens], dim=-1)
            found = self.codec.mix(sealed, packed, role, work)
            return found if raw is None else found + torch.matmul(loose, raw.to(loose.dtype))
        codes, scale, low = (packed.parts[name] for name in ("codes", "scale", "low"))
        (b, h, g, _), d = weights.shape, packed.width
        units, tokens = codes.shape[2], self.codec.group
        pieces = parts(b * h, units)
        out = torch.empty(b, h, pieces, g, d)
        scratch = work.get("rows", (torch.get_num_threads(), tokens * d), torch.float32, weights.device)
        compiled.kernel("kivi.mix")(
            b * h * pieces, pieces, weights.contiguous(), codes, scale, low, out, scratch, g, d, units,
            self.codec.bits, tokens, scale.shape[3], *((0, 0, 0) if raw is None else compiled.side_by_side(raw)),
        )  # fmt: skip
        return out[:, :, 0] if pieces == 1 else out.sum(2)

    def _reads(self, x: Tensor, packed: Packed, raw: Tensor | None) -> bool:
        if x.dtype != torch.float32 or packed.parts["scale"].dtype != torch.float16:
            return False
        return all(part.device.type == "cpu" and part.is_contiguous() for part in packed.parts.values())


def with_raw(scores: Tensor, query: Tensor, raw: Tensor) -> Tensor:
    """`scores` (B, H, G, T), followed by those of `raw` keys."""
    loose = torch.matmul(query, raw.to(query.dtype).transpose(-1, -2))
    return torch.cat([scores, loose.to(scores.dtype)], dim=-1)
