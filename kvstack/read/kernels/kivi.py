"""KIVI's codes (encode/kivi.py): a scale for each channel of a unit, or for each token and group of channels.

codes of one unit: for every plane (encode/bits.py) its rows, of D bytes each
    2 bits, 32 tokens    row r (of 8)  ->  tokens r, r + 8, r + 16, r + 24
"""

from __future__ import annotations

from numba import cfunc, njit, types

from ..sizes import TILE
from .memory import SIGNATURE, bytes_, floats, half, halves, thread_count, thread_number

__all__ = ["FAST", "dot", "dot_row", "mix"]

# sums may be reordered, so that they run in vectors; NaN and infinity keep their meaning
FAST = {"reassoc", "contract", "nsz", "arcp"}


@njit(fastmath=FAST)
def unpack(codes, at, bits, tokens, width, out):
    """The codes of one unit, from byte `at` on, as floats (tokens, width)."""
    weight, first = 1, True
    for plane in (8, 4, 2, 1):
        if not bits & plane:
            continue
        size, mask = tokens * plane // 8 * width, (1 << plane) - 1
        for place in range(8 // plane):
            shift, start = place * plane, place * size
            if first:
                for i in range(size):
                    out[start + i] = types.float32((types.int32(codes[at + i]) >> shift) & mask)
            else:
                for i in range(size):
                    out[start + i] += types.float32(((types.int32(codes[at + i]) >> shift) & mask) * weight)
        at += size
        weight, first = weight << plane, False


SMALL = 16
"""TILE for heads of other sizes."""


def _tile(size):
    """The two inner loops, for `size` channels; None: as many as are asked for."""

    @njit(fastmath=FAST)
    def add(out, to, weights, at, rows, row, stride, width):
        """out[to : to + width] += weights[at : at + 8] @ 8 rows, `stride` numbers apart."""
        a, b, c, d = weights[at], weights[at + 1], weights[at + 2], weights[at + 3]
        e, f, g, h = weights[at + 4], weights[at + 5], weights[at + 6], weights[at + 7]
        for i in range(width if size is None else size):
            out[to + i] += (
                a * rows[row + i]
                + b * rows[row + stride + i]
                + c * rows[row + 2 * stride + i]
                + d * rows[row + 3 * stride + i]
                + e * rows[row + 4 * stride + i]
                + f * rows[row + 5 * stride + i]
                + g * rows[row + 6 * stride + i]
                + h * rows[row + 7 * stride + i]
            )

    @njit(fastmath=FAST)
    def dot(x, at, rows, row, width):
        """x[at : at + width] @ rows[row : row + width]."""
        product = types.float32(0)
        for i in range(width if size is None else size):
            product += x[at + i] * rows[row + i]
        return product

    return add, dot


add_tile, dot_tile = _tile(TILE)
add_small, dot_small = _tile(SMALL)
add_rest, dot_rest = _tile(None)


@njit(fastmath=FAST)
def add_rows(out, to, weights, at, rows, row, width):
    """out[to : to + width] += weights[at : at + 8] @ rows (8, width)."""
    begin = 0
    while begin + TILE <= width:
        add_tile(out, to + begin, weights, at, rows, row + begin, width, TILE)
        begin += TILE
    while begin + SMALL <= width:
        add_small(out, to + begin, weights, at, rows, row + begin, width, SMALL)
        begin += SMALL
    if begin < width:
        add_rest(out, to + begin, weights, at, rows, row + begin, width, width - begin)


@njit(fastmath=FAST)
def dot_row(x, at, rows, row, width):
    """x[at : at + width] @ rows[row : row + width]."""
    product = types.float32(0)
    begin = 0
    while begin + TILE <= width:
        product += dot_tile(x, at + begin, rows, row + begin, TILE)
        begin += TILE
    while begin + SMALL <= width:
        product += dot_small(x, at + begin, rows, row + begin, SMALL)
        begin += SMALL
    if begin < width:
        product += dot_rest(x, at + begin, rows, row + begin, width - begin)
    return product


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def dot(numbers):
    """Products of queries (heads, G, D) with keys (heads, units * tokens, D), then with raw ones (heads, raw of room,
    D): (heads, G, units * tokens + raw). A task is a part of the units of a head; the last part has the raw keys, too.

    tasks, parts, queries, codes, scale, low, out, scratch, G, D, units, bits, tokens, raw keys, raw, room, units from
    one head to the next
    """
    tasks, parts = numbers[0], numbers[1]
    queries, codes, scale, low = floats(numbers[2]), bytes_(numbers[3]), halves(numbers[4]), halves(numbers[5])
    out = floats(numbers[6])
    asked, width, units, bits, tokens = numbers[8], numbers[9], numbers[10], numbers[11], numbers[12]
    keys, raw, room, apart = floats(numbers[13]), numbers[14], numbers[15], numbers[16]
    mine, every = thread_number(), thread_count()
    rows = floats(numbers[7] + 4 * (tokens + 1) * width * mine)
    scaled = floats(numbers[7] + 4 * (tokens + 1) * width * mine + 4 * tokens * width)
    size, sealed = tokens * bits // 8 * width, units * tokens
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        head, part = task // parts, task % parts
        for unit in range(units * part // parts, units * (part + 1) // parts):
            here = head * apart + unit
            unpack(codes, here * size, bits, tokens, width, rows)
            for g in range(asked):
                query, base = (head * asked + g) * width, types.float32(0)
                for d in range(width):
                    scaled[d] = queries[query + d] * half(scale[here * width + d])
                    base += queries[query + d] * half(low[here * width + d])
                to = (head * asked + g) * (sealed + raw) + unit * tokens
                for t in range(tokens):
                    out[to + t] = base + dot_row(scaled, 0, rows, t * width, width)
        if part == parts - 1:
            for g in range(asked):
                query, to = (head * asked + g) * width, (head * asked + g) * (sealed + raw) + sealed
                for t in range(raw):
                    out[to + t] = dot_row(queries, query, keys, (head * room + t) * width, width)


@njit(fastmath=FAST)
def scale_values(rows, scale, low, at, tokens, groups, each):
    """Values (tokens, groups * each) in the place of their codes; their scales stand from `at` on."""
    for known in range(tokens * groups):
        step, least = half(scale[at + known]), half(low[at + known])
        for d in range(each):
            rows[known * each + d] = least + step * rows[known * each + d]


@njit(fastmath=FAST)
def add_all(out, to, weights, at, rows, row, count, width):
    """out[to : to + width] += weights[at : at + count] @ rows (count, width)."""
    whole = count // 8 * 8
    for t in range(0, whole, 8):
        add_rows(out, to, weights, at + t, rows, row + t * width, width)
    for t in range(whole, count):
        for d in range(width):
            out[to + d] += weights[at + t] * rows[row + t * width + d]


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def mix(numbers):
    """Weighted sums, weights (heads, G, units * tokens + raw), of values (heads, units * tokens, D), then of raw ones
    (heads, raw of room, D), one for each part of the units: (heads, parts, G, D).

    tasks, parts, weights, codes, scale, low, out, scratch, G, D, units, bits, tokens, groups of channels, raw values,
    raw, room, units from one head to the next
    """
    tasks, parts = numbers[0], numbers[1]
    weights, codes, scale, low = floats(numbers[2]), bytes_(numbers[3]), halves(numbers[4]), halves(numbers[5])
    out = floats(numbers[6])
    asked, width, units, bits, tokens, groups = (
        numbers[8],
        numbers[9],
        numbers[10],
        numbers[11],
        numbers[12],
        numbers[13],
    )
    values, raw, room, apart = floats(numbers[14]), numbers[15], numbers[16], numbers[17]
    mine, every = thread_number(), thread_count()
    rows = floats(numbers[7] + 4 * tokens * width * mine)
    size, each, sealed = tokens * bits // 8 * width, width // groups, units * tokens
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        head, part = task // parts, task % parts
        first = task * asked * width
        for i in range(asked * width):
            out[first + i] = types.float32(0)
        for unit in range(units * part // parts, units * (part + 1) // parts):
            here = head * apart + unit
            unpack(codes, here * size, bits, tokens, width, rows)
            scale_values(rows, scale, low, here * tokens * groups, tokens, groups, each)
            for g in range(asked):
                at = (head * asked + g) * (sealed + raw) + unit * tokens
                add_all(out, first + g * width, weights, at, rows, 0, tokens, width)
        if part == parts - 1:
            for g in range(asked):
                at = (head * asked + g) * (sealed + raw) + sealed
                add_all(out, first + g * width, weights, at, values, head * room * width, raw, width)
