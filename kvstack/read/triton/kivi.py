"""Kernels for KIVI's codes of 2, 4 and 8 bits, whose codes lie in one plane.

    bytes (B, H, units, rows, D)      rows = group * bits / 8;  row j of a head is row j % rows of unit j // rows
    codes of row j                    (byte >> place * bits) & (2^bits - 1)
    their token                       unit * group + place * rows + j % rows

Tiles are rows of bytes, so every byte is loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, on, pieces

__all__ = ["dot", "mix"]

NUMBERS = 8192
"""Of a tile: 64 for each thread of four warps."""


@triton.jit
def _dot(
    query, codes, scale, low, out, rows, queries, width, held,
    BITS: tl.constexpr, GROUP: tl.constexpr, J: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens in J rows of bytes of one head."""
    ROWS: tl.constexpr = GROUP * BITS // 8
    head = tl.program_id(1).to(tl.int64)
    j, g, d = tl.program_id(0) * J + tl.arange(0, J), tl.arange(0, G), tl.arange(0, D)
    asked = tl.load(
        query + (head * queries + g[None, :]) * width + d[:, None],
        mask=(g[None, :] < queries) & (d[:, None] < width),
        other=0.0,
    )  # (D, G)
    there = (j[:, None] < rows) & (d[None, :] < width)
    packed = tl.load(codes + (head * rows + j[:, None]) * width + d[None, :], mask=there, other=0).to(tl.int32)
    at = (head * (rows // ROWS) + j[:, None] // ROWS) * width + d[None, :]
    step = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
    least = tl.load(low + at, mask=there, other=0.0).to(tl.float32)
    base = tl.dot(least, asked, input_precision="tf32x3")  # (J, G)
    for place in tl.static_range(8 // BITS):
        numbers = ((packed >> (place * BITS)) & (2**BITS - 1)).to(tl.float32) * step
        found = base + tl.dot(numbers, asked, input_precision="tf32x3")
        token = j // ROWS * GROUP + place * ROWS + j % ROWS
        tl.store(
            out + (head * queries + g[None, :]) * held + token[:, None],
            found,
            mask=(g[None, :] < queries) & (j[:, None] < rows),
        )


@triton.jit
def _mix(
    weights, codes, scale, low, out, rows, tiles, queries, width, scales, held,
    BITS: tl.constexpr, GROUP: tl.constexpr, J: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the values in `tiles` times J rows of bytes of one head."""
    ROWS: tl.constexpr = GROUP * BITS // 8
    head, piece = tl.program_id(1).to(tl.int64), tl.program_id(0)
    g, d = tl.arange(0, G), tl.arange(0, D)
    tokens, share = rows // ROWS * GROUP, width // scales
    total = tl.full((G, D), 0.0, tl.float32)
    for tile in range(piece * tiles, (piece + 1) * tiles):
        j = tile * J + tl.arange(0, J)
        there = (j[:, None] < rows) & (d[None, :] < width)
        packed = tl.load(codes + (head * rows + j[:, None]) * width + d[None, :], mask=there, other=0).to(tl.int32)
        for place in tl.static_range(8 // BITS):
            token = j // ROWS * GROUP + place * ROWS + j % ROWS
            at = (head * tokens + token[:, None]) * scales + d[None, :] // share
            step = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
            least = tl.load(low + at, mask=there, other=0.0).to(tl.float32)
            values = ((packed >> (place * BITS)) & (2**BITS - 1)).to(tl.float32) * step + least
            weight = tl.load(
                weights + (head * queries + g[:, None]) * held + token[None, :],
                mask=(g[:, None] < queries) & (j[None, :] < rows),
                other=0.0,
            )
            total = tl.dot(weight, values, total, input_precision="tf32x3")
    at = ((head * tl.num_programs(0) + piece) * queries + g[:, None]) * width + d[None, :]
    tl.store(out + at, total, mask=(g[:, None] < queries) & (d[None, :] < width))


def dot(query: Tensor, codes: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, loose: int) -> Tensor:
    """`query` (B, H, G, D) times keys: (B, H, G, T + loose), the scores of `loose` tokens not yet written."""
    b, h, g, d = query.shape
    rows = codes.shape[2] * codes.shape[3]
    out = torch.empty(b, h, g, codes.shape[2] * group + loose, device=query.device)
    tile, queries, width = _tile(d), block(g), block(d)
    with on(query):
        _dot[(-(-rows // tile), b * h)](
            query.contiguous(), codes, scale, low, out, rows, g, d, out.shape[3],
            BITS=bits, GROUP=group, J=tile, G=queries, D=width,
        )  # fmt: skip
    return out


def mix(weights: Tensor, codes: Tensor, scale: Tensor, low: Tensor, bits: int, group: int) -> Tensor:
    """`weights` (B, H, G, T or more) times T values: (B, H, G, D)."""
    (b, h, g, held), d = weights.shape, codes.shape[4]
    rows, tile = codes.shape[2] * codes.shape[3], _tile(d)
    tiles = -(-rows // tile)
    each = -(-tiles // pieces(tiles, b * h, weights.device))
    parts = -(-tiles // each)
    out = torch.empty(b, h, parts, g, d, device=weights.device)
    with on(weights):
        _mix[(parts, b * h)](
            weights.contiguous(), codes, scale, low, out, rows, each, g, d, scale.shape[3], held,
            BITS=bits, GROUP=group, J=tile, G=block(g), D=block(d),
        )  # fmt: skip
    return out.sum(2)


def _tile(width: int) -> int:
    """Rows of bytes in a tile."""
    return min(64, NUMBERS // block(width))
