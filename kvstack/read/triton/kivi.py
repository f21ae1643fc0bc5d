"""Kernels for KIVI's codes of 2, 4 and 8 bits, whose codes lie in one plane.

    bytes (B, H, units, rows, D)      rows = group * bits / 8;  row j of a head is row j % rows of unit j // rows;
                                      from one head to the next are `apart` units or, in kernels, rows
    codes of row j                    (byte >> place * bits) & (2^bits - 1)
    their token                       unit * group + place * rows + j % rows

Tiles are rows of bytes, so every byte is loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, block, on, pieces

__all__ = ["dot", "mix"]

ROWS, CHANNELS = 64, 32
"""Of a tile."""


@triton.jit
def _decoded(codes, scale, low, at, scales, inside, BITS: tl.constexpr, place: tl.constexpr):
    """Numbers of the codes at one place of the bytes, whose scales are at `scales`."""
    packed = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    step = tl.load(scale + scales, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(low + scales, mask=inside, other=0.0).to(tl.float32)
    return ((packed >> (place * BITS)) & (2**BITS - 1)).to(tl.float32) * step + least


@triton.jit
def _dot(
    query, codes, scale, low, out, rows, apart, queries, width, held,
    BITS: tl.constexpr, GROUP: tl.constexpr, J: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens in J rows of bytes of one head."""
    EACH: tl.constexpr = GROUP * BITS // 8
    head = tl.program_id(1).to(tl.int64)
    j, g = tl.program_id(0) * J + tl.arange(0, J), tl.arange(0, G)
    unit = head * (apart // EACH) + j[:, None] // EACH
    for place in tl.static_range(8 // BITS):
        found = tl.full((J, G), 0.0, tl.float32)
        for first in range(0, width, D):
            d = first + tl.arange(0, D)
            asked = tl.load(
                query + (head * queries + g[None, :]) * width + d[:, None],
                mask=(g[None, :] < queries) & (d[:, None] < width),
                other=0.0,
            )  # (D, G)
            at, scales = (head * apart + j[:, None]) * width + d[None, :], unit * width + d[None, :]
            inside = (j[:, None] < rows) & (d[None, :] < width)
            keys = _decoded(codes, scale, low, at, scales, inside, BITS, place)
            found = tl.dot(keys, asked, found, input_precision="tf32x3")
        token = j // EACH * GROUP + place * EACH + j % EACH
        tl.store(
            out + (head * queries + g[None, :]) * held + token[:, None],
            found,
            mask=(g[None, :] < queries) & (j[:, None] < rows),
        )


@triton.jit
def _mix(
    weights, codes, scale, low, out, rows, apart, tiles, queries, width, scales, held,
    BITS: tl.constexpr, GROUP: tl.constexpr, J: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The weighted sums of D channels of the values in `tiles` times J rows of bytes of one head."""
    EACH: tl.constexpr = GROUP * BITS // 8
    head, piece = tl.program_id(1).to(tl.int64), tl.program_id(0)
    g, d = tl.arange(0, G), tl.program_id(2) * D + tl.arange(0, D)
    tokens, share = apart // EACH * GROUP, width // scales
    total = tl.full((G, D), 0.0, tl.float32)
    for tile in range(piece * tiles, (piece + 1) * tiles):
        j = tile * J + tl.arange(0, J)
        inside = (j[:, None] < rows) & (d[None, :] < width)
        for place in tl.static_range(8 // BITS):
            token = j // EACH * GROUP + place * EACH + j % EACH
            known = (head * tokens + token[:, None]) * scales + d[None, :] // share
            at = (head * apart + j[:, None]) * width + d[None, :]
            values = _decoded(codes, scale, low, at, known, inside, BITS, place)
            weight = tl.load(
                weights + (head * queries + g[:, None]) * held + token[None, :],
                mask=(g[:, None] < queries) & (j[None, :] < rows),
                other=0.0,
            )
            total = tl.dot(weight, values, total, input_precision="tf32x3")
    at = ((head * tl.num_programs(0) + piece) * queries + g[:, None]) * width + d[None, :]
    tl.store(out + at, total, mask=(g[:, None] < queries) & (d[None, :] < width))


def dot(
    query: Tensor, codes: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, apart: int, loose: int
) -> Tensor:
    """`query` (B, H, G, D) times keys: (B, H, G, T + loose), the scores of `loose` tokens not yet written."""
    b, h, g, d = query.shape
    rows = codes.shape[2] * codes.shape[3]
    out = torch.empty(b, h, g, codes.shape[2] * group + loose, device=query.device)
    with on(query):
        _dot[(-(-rows // ROWS), b * h)](
            query.contiguous(), codes, scale, low, out, rows, apart * codes.shape[3], g, d, out.shape[3],
            BITS=bits, GROUP=group, J=ROWS, G=block(g), D=min(block(d), CHANNELS), **FUSED,
        )  # fmt: skip
    return out


def mix(weights: Tensor, codes: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, apart: int) -> Tensor:
    """`weights` (B, H, G, T or more) times T values: (B, H, G, D)."""
    (b, h, g, held), d = weights.shape, codes.shape[4]
    rows, channels = codes.shape[2] * codes.shape[3], min(block(d), CHANNELS)
    tiles, columns = -(-rows // ROWS), -(-d // channels)
    each = -(-tiles // pieces(tiles, b * h * columns, weights.device))
    parts = -(-tiles // each)
    out = torch.empty(b, h, parts, g, d, device=weights.device)
    with on(weights):
        _mix[(parts, b * h, columns)](
            weights.contiguous(), codes, scale, low, out, rows, apart * codes.shape[3], each, g, d, scale.shape[3],
            held, BITS=bits, GROUP=group, J=ROWS, G=block(g), D=channels, **FUSED,
        )  # fmt: skip
    return out.sum(2)
