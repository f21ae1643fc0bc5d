"""The loops that `compiled.py` runs. Importing this compiles them, or reads them from numba's cache.

Every kernel is handed one array of whole numbers, first the number of its tasks, then addresses and sizes, and runs in
all threads at once: each takes its share of the tasks. Addresses are read as pointers, since indices of numba's arrays
may be negative and loops over them are not vectorized. `scratch` is memory for each thread.

    codes of one unit: for every plane (encode/bits.py) its rows, of D bytes each
        2 bits, 32 tokens    row r (of 8)  ->  tokens r, r + 8, r + 16, r + 24
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

from . import openmp
from .sizes import STEP, TILE

__all__ = ["channels_at", "channels_dot", "channels_mix", "kivi_dot", "kivi_mix"]

# sums may be reordered, so that they run in vectors; NaN and infinity keep their meaning
FAST = {"reassoc", "contract", "nsz", "arcp"}
SIGNATURE = types.void(types.CPointer(types.int64))

for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    llvm.add_symbol(_name, openmp.address(_name))
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())


def _pointer(kind):
    @intrinsic
    def at(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return at


floats, bytes_, halves, longs = (_pointer(kind) for kind in (types.float32, types.uint8, types.uint16, types.int64))


@intrinsic
def half(typing_context, bits):
    """The number that these 16 bits are as a half."""

    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


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


# ---- KIVI's codes: a scale for each channel of a unit, or for each token and group of channels


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def kivi_dot(numbers):
    """Products of queries (heads, G, D) with keys (heads, units * tokens, D), then with raw ones (heads, raw of room,
    D): (heads, G, units * tokens + raw). A task is a part of the units of a head; the last part has the raw keys, too.

    tasks, parts, queries, codes, scale, low, out, scratch, G, D, units, bits, tokens, raw keys, raw, room
    """
    tasks, parts = numbers[0], numbers[1]
    queries, codes, scale, low = floats(numbers[2]), bytes_(numbers[3]), halves(numbers[4]), halves(numbers[5])
    out = floats(numbers[6])
    asked, width, units, bits, tokens = numbers[8], numbers[9], numbers[10], numbers[11], numbers[12]
    keys, raw, room = floats(numbers[13]), numbers[14], numbers[15]
    mine, every = thread_number(), thread_count()
    rows = floats(numbers[7] + 4 * (tokens + 1) * width * mine)
    scaled = floats(numbers[7] + 4 * (tokens + 1) * width * mine + 4 * tokens * width)
    size, sealed = tokens * bits // 8 * width, units * tokens
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        head, part = task // parts, task % parts
        for unit in range(units * part // parts, units * (part + 1) // parts):
            here = head * units + unit
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
def kivi_mix(numbers):
    """Weighted sums, weights (heads, G, units * tokens + raw), of values (heads, units * tokens, D), then of raw ones
    (heads, raw of room, D), one for each part of the units: (heads, parts, G, D).

    tasks, parts, weights, codes, scale, low, out, scratch, G, D, units, bits, tokens, groups of channels, raw values,
    raw, room
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
    values, raw, room = floats(numbers[14]), numbers[15], numbers[16]
    mine, every = thread_number(), thread_count()
    rows = floats(numbers[7] + 4 * tokens * width * mine)
    size, each, sealed = tokens * bits // 8 * width, width // groups, units * tokens
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        head, part = task // parts, task % parts
        first = task * asked * width
        for i in range(asked * width):
            out[first + i] = types.float32(0)
        for unit in range(units * part // parts, units * (part + 1) // parts):
            unpack(codes, (head * units + unit) * size, bits, tokens, width, rows)
            scale_values(rows, scale, low, (head * sealed + unit * tokens) * groups, tokens, groups, each)
            for g in range(asked):
                at = (head * asked + g) * (sealed + raw) + unit * tokens
                add_all(out, first + g * width, weights, at, rows, 0, tokens, width)
        if part == parts - 1:
            for g in range(asked):
                at = (head * asked + g) * (sealed + raw) + sealed
                add_all(out, first + g * width, weights, at, values, head * room * width, raw, width)


# ---- codes of channels (encode/channel_codes.py): runs of channels of equal width, with a gain for each token and run


@njit(fastmath=FAST)
def unpack_run(codes, at, bits, channels, token, factor, count, out, to):
    """`count` channels of a run, of one token of its unit: factor * (code - middle)."""
    base, first = -factor * types.float32(((1 << bits) - 1) * 0.5), True
    for plane in (8, 4, 2, 1):
        if not bits & plane:
            continue
        mask, row, shift = (1 << plane) - 1, at + token % plane * channels, token // plane * plane
        if first:
            for i in range(count):
                out[to + i] = base + factor * types.float32((types.int32(codes[row + i]) >> shift) & mask)
        else:
            for i in range(count):
                out[to + i] += factor * types.float32((types.int32(codes[row + i]) >> shift) & mask)
        at += plane * channels
        factor, first = factor * types.float32(mask + 1), False


@njit(fastmath=FAST)
def unpack_token(codes, gains, runs, count, token, end, out, to, whole):
    """The first `end` channels of one token of a unit, in steps of their runs; returns how many there are.

    runs: bits and channels of every run. gains: two rows of bytes, four tokens in each of them. With `whole`, loops go
    in whole steps, and read and write as many numbers too many; the next run writes them again.
    """
    at = filled = 0
    for run in range(count):
        bits, channels = runs[2 * run], runs[2 * run + 1]
        wanted = min(channels, end - filled)
        if wanted <= 0:
            break
        gain = gain_of(gains[(token % 2) * count + run] >> (token // 2 * 2))
        taken = (wanted + STEP - 1) // STEP * STEP if whole else wanted
        unpack_run(codes, at, bits, channels, token, gain, taken, out, to + filled)
        filled += wanted
        at += bits * channels
    return filled


@njit(fastmath=FAST)
def unpack_channels(codes, gains, runs, count, end, out, stride, whole):
    """The first `end` channels of the 8 tokens of one unit, rows of `stride` numbers, zero behind the last channel."""
    for token in range(8):
        filled = unpack_token(codes, gains, runs, count, token, end, out, token * stride, whole)
        for i in range(filled, end):
            out[token * stride + i] = types.float32(0)


@njit(fastmath=FAST)
def gain_of(code):
    """GAINS[code], of the lowest two bits."""
    if code & 2:
        return types.float32(2.0) if code & 1 else types.float32(1.4142135623730951)
    return types.float32(1.0) if code & 1 else types.float32(0.7071067811865476)


@njit(fastmath=FAST)
def dot_four(x, at, rows, row, stride, width, out, to):
    """out[to : to + 4] = 4 rows, `stride` numbers apart, @ x[at : at + width]."""
    a = b = c = d = types.float32(0)
    for i in range(width):
        number = x[at + i]
        a += number * rows[row + i]
        b += number * rows[row + stride + i]
        c += number * rows[row + 2 * stride + i]
        d += number * rows[row + 3 * stride + i]
    out[to], out[to + 1], out[to + 2], out[to + 3] = a, b, c, d


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def channels_dot(numbers):
    """Products of vectors (rows, blocks, heads, leading), those of its block for each token, with the leading channels:
    (rows, heads, units * 8). `leading` is whole tiles.

    tasks, parts, vectors, codes, gains, out, scratch, runs, count of runs, heads, leading, units, units a block,
    blocks, bytes of codes and of gains in a unit
    """
    tasks, parts = numbers[0], numbers[1]
    vectors, codes, gains, out = floats(numbers[2]), numbers[3], numbers[4], floats(numbers[5])
    runs, count, heads, leading = longs(numbers[7]), numbers[8], numbers[9], numbers[10]
    units, block, blocks, size, gain_size = numbers[11], numbers[12], numbers[13], numbers[14], numbers[15]
    mine, every = thread_number(), thread_count()
    stride = leading + STEP
    rows = floats(numbers[6] + 4 * 8 * stride * mine)
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        row, part = task // parts, task % parts
        for unit in range(units * part // parts, units * (part + 1) // parts):
            here = row * units + unit
            whole = (tasks // parts * units - here - 1) * size >= STEP  # so much may be read behind this unit
            unit_codes, unit_gains = bytes_(codes + here * size), bytes_(gains + here * gain_size)
            unpack_channels(unit_codes, unit_gains, runs, count, leading, rows, stride, whole)
            for head in range(heads):
                u = ((row * blocks + unit // block) * heads + head) * leading
                to = (row * heads + head) * units * 8 + unit * 8
                dot_four(vectors, u, rows, 0, stride, leading, out, to)
                dot_four(vectors, u, rows, 4 * stride, stride, leading, out, to + 4)


@njit(fastmath=FAST)
def largest(weights, at):
    """Of 8 weights."""
    most = weights[at]
    for t in range(1, 8):
        most = max(most, weights[at + t])
    return most


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def channels_mix(numbers):
    """Weighted sums, weights (rows, heads, units * 8), of all channels: (rows, parts, heads, channels), whole tiles.
    Units whose weights are all below 1 / (tokens * shares) are left out; shares = 0: none.

    tasks, parts, weights, codes, gains, out, scratch, runs, count of runs, heads, channels, units, bytes of codes and
    of gains in a unit, shares
    """
    tasks, parts = numbers[0], numbers[1]
    weights, codes, gains, out = floats(numbers[2]), numbers[3], numbers[4], floats(numbers[5])
    runs, count, heads, channels = longs(numbers[7]), numbers[8], numbers[9], numbers[10]
    units, size, gain_size = numbers[11], numbers[12], numbers[13]
    least = types.float32(1.0) / types.float32(max(1, units * 8 * numbers[14])) if numbers[14] else types.float32(0)
    mine, every = thread_number(), thread_count()
    stride = channels + STEP
    rows = floats(numbers[6] + 4 * 8 * stride * mine)
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        row, part = task // parts, task % parts
        first = task * heads * channels
        for i in range(heads * channels):
            out[first + i] = types.float32(0)
        for unit in range(units * part // parts, units * (part + 1) // parts):
            here = row * units + unit
            whole = (tasks // parts * units - here - 1) * size >= STEP  # so much may be read behind this unit
            unit_codes, unit_gains = bytes_(codes + here * size), bytes_(gains + here * gain_size)
            unpack_channels(unit_codes, unit_gains, runs, count, channels, rows, stride, whole)
            for begin in range(0, channels, TILE):  # a tile of the rows stays near for all heads
                for head in range(heads):
                    at = (row * heads + head) * units * 8 + unit * 8
                    if largest(weights, at) >= least:
                        add_tile(out, first + head * channels + begin, weights, at, rows, begin, stride, TILE)


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def channels_at(numbers):
    """All channels of the tokens at places (rows, n): (rows, n, channels). A task is a token.

    tasks, n, places, codes, gains, out, runs, count of runs, channels, units, bytes of codes and of gains in a unit
    """
    tasks, n, places = numbers[0], numbers[1], longs(numbers[2])
    runs, count, channels = longs(numbers[6]), numbers[7], numbers[8]
    units, size, gain_size = numbers[9], numbers[10], numbers[11]
    mine, every = thread_number(), thread_count()
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        here, token = task // n * units + places[task] // 8, places[task] % 8
        codes, gains = bytes_(numbers[3] + here * size), bytes_(numbers[4] + here * gain_size)
        out = floats(numbers[5] + 4 * task * channels)
        unpack_token(codes, gains, runs, count, token, channels, out, 0, False)
