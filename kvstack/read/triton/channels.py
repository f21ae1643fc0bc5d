"""Kernels for codes of channels (encode/channel_codes.py), whose widths differ from run to run.

    bits of a channel     8 4 2 1        12 = 8 + 4: a plane of width 8, and behind it one of width 4
    plane of width w      w rows of bytes, one byte for each channel of the run; the planes before it have
                          `begin` = bits without their last ones, up to w, rows, and as many bits of the code
    token i of 8          row begin + i % w,  bits (i // w) * w and on

Every channel has a row of a table that says where its run begins, so the same kernel reads all runs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, MOST, block, on, pieces

if TYPE_CHECKING:
    from ...encode.channel_codes import ChannelCodes

__all__ = ["Latent", "mix", "project", "scores"]

TOKENS, CHANNELS = 64, 32
"""Of a tile."""
KEYS = 32
"""Tokens of a tile whose keys are rebuilt: more do not fit into registers."""


# ---- what kernels know about a latent


class Tables(NamedTuple):
    """The channels of an encoder, and behind them some that are zero, up to whole tiles.

    Attributes:
        channels: (4, R') int32: the first byte of the channel, how many its run has, the run's number, and bits.
        steps: (R',) float32.
        planes: (tiles,) int32: widths of the planes that channels of a tile have, added up.
        runs: their number.
    """

    channels: Tensor
    steps: Tensor
    planes: Tensor
    runs: int


@functools.lru_cache(maxsize=256)
def tables(encoder: ChannelCodes) -> Tables:
    rows: list[tuple[int, int, int, int]] = []
    byte = 0
    for number, (bits, count) in enumerate(encoder.runs):
        rows += [(byte + i, count, number, bits) for i in range(count)]
        byte += bits * count
    behind = -len(rows) % CHANNELS
    rows += [(0, 0, 0, 0)] * behind
    planes = [
        functools.reduce(int.__or__, (row[3] for row in rows[at : at + CHANNELS]))
        for at in range(0, len(rows), CHANNELS)
    ]
    device = encoder.energy.device
    steps = torch.nn.functional.pad(encoder.steps.float(), (0, behind))
    channels = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    whole = torch.tensor(planes, dtype=torch.int32)
    return Tables(channels.to(device), steps, whole.to(device), len(encoder.runs))


class Latent(NamedTuple):
    """Codes (B, 1, T/8, bytes) and gains (B, 1, T/8, 2 * runs), the units from one row to the next, and the tables of
    their encoder."""

    codes: Tensor
    gains: Tensor
    apart: int
    known: Tables

    @property
    def tokens(self) -> int:
        return 8 * self.codes.shape[2]

    @property
    def padded(self) -> int:
        """Channels in whole tiles."""
        return len(self.known.steps)

    @property
    def numbers(self) -> tuple[Tensor | int, ...]:
        """As kernels are given them."""
        known = self.known
        return (
            self.codes, self.gains, known.channels, known.steps, known.planes, known.runs, self.codes.shape[3],
            self.tokens, self.apart, self.padded,
        )  # fmt: skip


@triton.jit
def _plane(codes, first, count, bits, i, there, W: tl.constexpr):
    """The part of codes that a plane of width W holds, in the channels that have one."""
    begin = bits - bits % (2 * W)
    byte = tl.load(codes + first + (begin + i % W) * count, mask=there & ((bits & W) != 0), other=0).to(tl.int32)
    return ((byte >> (i // W * W)) & (2**W - 1)) << begin


@triton.jit
def _decoded(codes, gains, channels, steps, planes, runs, unit, tokens, apart, padded, row, t, r0, R: tl.constexpr):
    """Latents (len(t), R) of the tokens `t` of one row, in R channels from `r0` on. What is behind the tokens comes
    back as some finite number."""
    r, i = r0 + tl.arange(0, R), (t % 8)[:, None]
    there = (t < tokens)[:, None]
    start = tl.load(channels + r)[None, :]
    count = tl.load(channels + padded + r)[None, :]
    run = tl.load(channels + 2 * padded + r)[None, :]
    bits = tl.load(channels + 3 * padded + r)[None, :]
    at = row * apart + (t // 8)[:, None]  # the unit, of all rows
    widths = tl.load(planes + r0 // R)
    code = tl.full((t.shape[0], R), 0, tl.int32)
    for turn in tl.static_range(4):
        if widths & (8 >> turn):  # the same for all threads
            code += _plane(codes, at * unit + start, count, bits, i, there, 8 >> turn)
    gain = tl.load(gains + (at * 2 + i % 2) * runs + run, mask=there, other=0).to(tl.int32)
    gain = tl.exp2((((gain >> (i // 2 * 2)) & 3) - 1).to(tl.float32) * 0.5)  # GAINS of the encoder
    middle = ((1 << bits) - 1).to(tl.float32) * 0.5
    return (code.to(tl.float32) - middle) * gain * tl.load(steps + r)[None, :]


# ---- scores


@triton.jit
def _scores(
    query, axes, mean, every, angles, places, out,
    codes, gains, channels, steps, planes, runs, unit, tokens, apart, padded,
    count, rank, heads, queries, width, pairs, axes_row, axes_channel, axes_head, angles_row, held,
    PLACES: tl.constexpr, MEAN: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, G: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Scores of T of `count` tokens for the queries of one kv head: keys are rebuilt and rotated in registers. P is for
    the channels that turn in pairs, S for those that do not turn; 0: there are none."""
    at = tl.program_id(1).to(tl.int64)
    row, head = at // heads, at % heads
    n, g, p = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, G), tl.arange(0, P)
    t = n
    if PLACES:
        t = tl.load(places + at * count + n, mask=n < count, other=tokens).to(tl.int32)
    first = tl.load(every + p, mask=p < pairs, other=0)
    second = tl.load(every + pairs + p, mask=p < pairs, other=0)
    one, other = tl.full((T, P), 0.0, tl.float32), tl.full((T, P), 0.0, tl.float32)
    if S > 0:
        s = tl.arange(0, S)
        stills = width - 2 * pairs
        still = tl.load(every + 2 * pairs + s, mask=s < stills, other=0)
        kept = tl.full((T, S), 0.0, tl.float32)
    mine = axes + row * axes_row + head * axes_head
    for r0 in range(0, padded, R):
        z = _decoded(codes, gains, channels, steps, planes, runs, unit, tokens, apart, padded, row, t, r0, R)
        r = (r0 + tl.arange(0, R))[:, None]
        turning = (r < rank) & (p < pairs)[None, :]
        axis = tl.load(mine + r * axes_channel + first[None, :], mask=turning, other=0.0).to(tl.float32)
        one = tl.dot(z, axis, one, input_precision="tf32x3")
        axis = tl.load(mine + r * axes_channel + second[None, :], mask=turning, other=0.0).to(tl.float32)
        other = tl.dot(z, axis, other, input_precision="tf32x3")
        if S > 0:
            staying = (r < rank) & (s < stills)[None, :]
            axis = tl.load(mine + r * axes_channel + still[None, :], mask=staying, other=0.0).to(tl.float32)
            kept = tl.dot(z, axis, kept, input_precision="tf32x3")
    if MEAN:
        one += tl.load(mean + head * width + first, mask=p < pairs, other=0.0).to(tl.float32)[None, :]
        other += tl.load(mean + head * width + second, mask=p < pairs, other=0.0).to(tl.float32)[None, :]
        if S > 0:
            kept += tl.load(mean + head * width + still, mask=s < stills, other=0.0).to(tl.float32)[None, :]
    known = (t < tokens)[:, None] & (p < pairs)[None, :]
    place = angles + row * angles_row + p[None, :] * tokens + t[:, None]
    cos = tl.load(place, mask=known, other=0.0)
    sin = tl.load(place + pairs * tokens, mask=known, other=0.0)
    asked = query + (at * queries + g[None, :]) * width
    here = (g < queries)[None, :] & (p < pairs)[:, None]
    found = tl.dot(
        cos * one - sin * other, tl.load(asked + first[:, None], mask=here, other=0.0), input_precision="tf32x3"
    )
    found = tl.dot(
        sin * one + cos * other, tl.load(asked + second[:, None], mask=here, other=0.0), found, input_precision="tf32x3"
    )
    if S > 0:
        here = (g < queries)[None, :] & (s < stills)[:, None]
        found = tl.dot(kept, tl.load(asked + still[:, None], mask=here, other=0.0), found, input_precision="tf32x3")
    tl.store(
        out + (at * queries + g[None, :]) * held + n[:, None],
        found,
        mask=(n < count)[:, None] & (g < queries)[None, :],
    )


def scores(
    query: Tensor,
    latent: Latent,
    axes: Tensor,
    mean: Tensor | None,
    every: Tensor,
    angles: Tensor,
    places: Tensor | None,
    out: Tensor,
) -> None:
    """Write scores of the tokens at `places` (B, H, n), or of all, into the first ones of `out` (B, H, G, n or more).

    Args:
        query: (B, H, G, D).
        axes: (B or 1, R, H, D).
        mean: (H, D).
        every: (D,) the channels of a head: first ones of pairs, second ones, and those that do not turn.
        angles: (B or 1, 2 P, T) cosines, then sines.
    """
    (b, h, g, d), pairs = query.shape, angles.shape[1] // 2
    axes = axes if axes.stride(3) == 1 else axes.contiguous()
    mean = mean if mean is None else mean.contiguous()
    stills, count = d - 2 * pairs, latent.tokens if places is None else places.shape[2]
    with on(query):
        _scores[(-(-count // KEYS), b * h)](
            query.contiguous(), axes, axes if mean is None else mean, every, angles.contiguous(),
            every if places is None else places.contiguous(), out, *latent.numbers, count, axes.shape[1], h,
            g, d, pairs, axes.stride(0) if axes.shape[0] > 1 else 0, axes.stride(1), axes.stride(2),
            angles.shape[1] * angles.shape[2] if angles.shape[0] > 1 else 0, out.shape[3],
            PLACES=places is not None, MEAN=mean is not None,
            T=KEYS, R=CHANNELS, G=block(g), P=block(pairs), S=block(stills) if stills else 0,
            num_warps=8, **FUSED,
        )  # fmt: skip


# ---- products with latents


@triton.jit
def _project(
    vectors, out,
    codes, gains, channels, steps, planes, runs, unit, tokens, apart, padded,
    rank, heads, queries, blocks, size, held,
    T: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The products of T tokens of one block with G vectors of it, of all heads."""
    row, mine = tl.program_id(2).to(tl.int64), tl.program_id(0) * T // size
    t, g = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * G + tl.arange(0, G)
    vector_at = (((row * heads + g // queries) * blocks + mine) * queries + g % queries) * rank
    found = tl.full((T, G), 0.0, tl.float32)
    for r0 in range(0, rank, R):
        z = _decoded(codes, gains, channels, steps, planes, runs, unit, tokens, apart, padded, row, t, r0, R)
        r = (r0 + tl.arange(0, R))[:, None]
        inside = (r < rank) & (g < heads * queries)[None, :]
        vector = tl.load(vectors + vector_at[None, :] + r, mask=inside, other=0.0)
        found = tl.dot(z, vector, found, input_precision="tf32x3")
    tl.store(
        out + (row * heads * queries + g[None, :]) * held + t[:, None],
        found,
        mask=(t < tokens)[:, None] & (g < heads * queries)[None, :],
    )


@triton.jit
def _mix(
    weights, out,
    codes, gains, channels, steps, planes, runs, unit, tokens, apart, padded,
    tiles, queries, held,
    T: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The weighted sums, for G queries, of R channels over `tiles` times T tokens."""
    at, piece = tl.program_id(2).to(tl.int64), tl.program_id(0)
    parts, r0 = tl.num_programs(0), tl.program_id(1) * R
    groups = (queries + G - 1) // G
    row, g = at // groups, (at % groups) * G + tl.arange(0, G)
    total = tl.full((G, R), 0.0, tl.float32)
    for tile in range(piece * tiles, (piece + 1) * tiles):
        t = tile * T + tl.arange(0, T)
        z = _decoded(codes, gains, channels, steps, planes, runs, unit, tokens, apart, padded, row, t, r0, R)
        weight = tl.load(
            weights + (row * queries + g[:, None]) * held + t[None, :],
            mask=(g < queries)[:, None] & (t < tokens)[None, :],
            other=0.0,
        )
        total = tl.dot(weight, z, total, input_precision="tf32x3")
    r = r0 + tl.arange(0, R)
    tl.store(
        out + ((row * parts + piece) * queries + g[:, None]) * padded + r[None, :], total, mask=(g < queries)[:, None]
    )


def project(vectors: Tensor, latent: Latent, size: int) -> Tensor:
    """The leading r channels of all tokens times `vectors` (B, H, blocks, G, r) of their blocks: (B, H, G, T). A block
    has `size` tokens, a multiple of 16."""
    b, h, blocks, g, rank = vectors.shape
    out = torch.empty(b, h, g, latent.tokens, device=vectors.device)
    tile, columns = min(TOKENS, size & -size), min(block(h * g), MOST)
    with on(vectors):
        _project[(-(-latent.tokens // tile), -(-h * g // columns), b)](
            vectors.contiguous(), out, *latent.numbers, rank, h, g, blocks, size, latent.tokens,
            T=tile, R=CHANNELS, G=columns, **FUSED,
        )  # fmt: skip
    return out


def mix(weights: Tensor, latent: Latent, rank: int) -> Tensor:
    """`weights` (B, H, G, T or more) times the latents of T tokens: (B, H, G, R)."""
    b, h, g, held = weights.shape
    size, tiles = min(block(h * g), MOST), -(-latent.tokens // TOKENS)
    groups, columns = -(-h * g // size), latent.padded // CHANNELS
    each = -(-tiles // pieces(tiles, b * groups * columns, weights.device))
    parts = -(-tiles // each)
    out = torch.empty(b, parts, h, g, latent.padded, device=weights.device)
    with on(weights):
        _mix[(parts, columns, b * groups)](
            weights.contiguous(), out, *latent.numbers, each, h * g, held, T=TOKENS, R=CHANNELS, G=size, **FUSED
        )
    return out.sum(1)[..., :rank]
