"""Codes of 1 to 12 bits, truly packed into bytes.

A code is cut into planes whose widths divide a byte (3 bits = 2 + 1, 12 = 8 + 4). Inside a plane of width w, one byte
holds 8/w codes that lie n/(8/w) apart, so that each shift of the bytes yields one contiguous run of codes:

    2 bits, n = 8 codes      byte 0 = c0 | c2<<2 | c4<<4 | c6<<6
                             byte 1 = c1 | c3<<2 | c5<<4 | c7<<6
    bytes >> 0 & 3  ->  c0 c1        bytes >> 2 & 3  ->  c2 c3        ...

n, the number of codes packed together, must be a multiple of 8 (of 8/w for widths that need less).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["MOST", "PLANES", "multiple", "pack", "runs", "unpack"]

MOST = 12
PLANES: dict[int, tuple[int, ...]] = {
    bits: tuple(width for width in (8, 4, 2, 1) if bits & width) for bits in range(1, MOST + 1)
}
"""Widths of the planes of a code: the powers of two that its bits are the sum of."""


def multiple(bits: int) -> int:
    """Return the number of codes of this width that fill whole bytes together."""
    return 8 // min(PLANES[bits])


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes below 2**bits (int16, or uint8 up to 8 bits), n along `dim` -> bytes, n * bits / 8 along `dim`."""
    planes, offset = [], 0
    for width in PLANES[bits]:
        plane = ((codes >> offset) & (2**width - 1)).to(torch.uint8)
        chunks = plane.chunk(8 // width, dim)
        packed = chunks[0].clone()
        for place, chunk in enumerate(chunks[1:], 1):
            packed |= chunk << (place * width)
        planes.append(packed)
        offset += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim)


def runs(packed: Tensor, bits: int, dim: int, n: int) -> Iterator[tuple[int, Tensor, int, int, int]]:
    """The pieces that `packed` is made of, for readers that need no unpacked copy.

    Yields (start, bytes, shift, width, weight): the codes from `start` on, as many as `bytes` has along `dim`,
    contain `weight * ((bytes >> shift) & (2**width - 1))`; a code is the sum over its pieces.
    """
    begin, offset = 0, 0
    for width in PLANES[bits]:
        size = n * width // 8
        piece = packed.narrow(dim, begin, size)
        for place in range(8 // width):
            yield place * size, piece, place * width, width, 2**offset
        begin += size
        offset += width


def unpack(packed: Tensor, bits: int, dim: int, n: int) -> Tensor:
    """The inverse of `pack`: n codes along `dim`, uint8 up to 8 bits and int16 above."""
    shape = list(packed.shape)
    shape[dim] = n
    codes = torch.zeros(shape, dtype=torch.uint8 if bits <= 8 else torch.int16, device=packed.device)
    for start, piece, shift, width, weight in runs(packed, bits, dim, n):
        codes.narrow(dim, start, piece.shape[dim]).add_((piece >> shift) & (2**width - 1), alpha=weight)
    return codes
