"""Codes of channels (encode/channel_codes.py), read in place.

a unit, 8 tokens    for every run of channels of equal bits, 1 to 12, for every plane (encode/bits.py) its rows of bytes
gains of a unit     2 rows of bytes, one for each run, the gains of 4 tokens in each

face     vectors of each block, from queries turned back to its middle
dot      rough scores: vectors of each block times the leading channels, tokens in lanes
choose   raw scores, and the tokens that matter
rescore  keys of these tokens, rebuilt, rotated and scored, channels in lanes
mix      weighted sums of all tokens, channels in lanes
finish   values of these sums
"""

from __future__ import annotations

import math

from numba import cfunc, njit, types

from ...abilities import FINE
from ..sizes import CHUNK, NUMBERS, ONE, PAIR, SLACK, TILE
from .kivi import FAST, dot_row
from .lanes import (
    LANES,
    add,
    at_least,
    exponential,
    fill,
    gains_of,
    load,
    product,
    product_of,
    store,
    turn_tile,
    unpack_columns,
    unpack_rows,
    unpack_token,
)
from .memory import SIGNATURE, as_floats, bytes_, floats, longs, thread_count, thread_number

__all__ = ["choose", "dot", "face", "finish", "join", "mix", "rescore"]


@njit
def readable(address, unit, units, size, copy):
    """The codes of a unit, with bytes behind them that may be read: of the last units, a copy."""
    codes = bytes_(address + unit * size)
    if (units - unit - 1) * size >= SLACK:
        return codes
    for i in range(size):
        copy[i] = codes[i]
    return copy


# ---- axes


@njit
def axes_of(given, row, kv_head, rank, width, out):
    """The axes of a kv head, rank rows of `width` numbers, and how far apart these are: where they lie, or unpacked
    into `out`. `given`: axes, numbers from one channel and from one row to the next; and where they are codes, fine
    parts (channels, ...) as far apart, of how many channels, scales (rank, kv heads), from one channel to the next,
    units (kv heads, width)."""
    stride, units = given[1], given[7]
    if units == 0:
        return floats(given[0] + 4 * (row * given[2] + kv_head * width)), stride
    scales, unit, unpacked = floats(given[5]), floats(units + 4 * kv_head * width), floats(out)
    for r in range(rank):
        scale, begin, at = scales[r * given[6] + kv_head], r * width, kv_head * width + r * stride
        codes = bytes_(given[0] + at)
        if r < given[4]:
            fine = bytes_(given[3] + at)
            for d in range(width):
                rest = types.float32(types.int8(fine[d])) * types.float32(1 / FINE)
                unpacked[begin + d] = (types.float32(types.int8(codes[d])) + rest) * scale * unit[d]
        else:
            for d in range(width):
                unpacked[begin + d] = types.float32(types.int8(codes[d])) * scale * unit[d]
    return unpacked, width


# ---- queries


@njit
def numbers_of(numbers, at):
    """Those from number `at` on."""
    return (
        numbers[at],
        numbers[at + 1],
        numbers[at + 2],
        numbers[at + 3],
        numbers[at + 4],
        numbers[at + 5],
        numbers[at + 6],
        numbers[at + 7],
    )


@njit
def on_its_side(axes, stride, steps, leading, width, out, room):
    """axes (leading, width), rows `stride` numbers apart, times steps -> out (width, room), zero behind `leading`."""
    whole, wide = leading // LANES * LANES, width // LANES * LANES
    for r in range(0, whole, LANES):
        scale = load(steps, r)
        for c in range(0, wide, LANES):
            turn_tile(axes, r * stride + c, stride, scale, out, c * room + r, room)
        for c in range(wide, width):
            for i in range(r, r + LANES):
                out[c * room + i] = axes[i * stride + c] * steps[i]
    for r in range(whole, leading):
        for c in range(width):
            out[c * room + r] = axes[r * stride + c] * steps[r]
    for c in range(width):
        for r in range(leading, room):
            out[c * room + r] = types.float32(0)


@njit
def turn_back(queries, query, width, channels, pairs, still, cos, sin, at, out, to):
    """A query as the un-rotated keys of a block meet it: the first channels of all pairs, the second ones, the rest."""
    for p in range(pairs):
        x, y = queries[query * width + channels[p]], queries[query * width + channels[pairs + p]]
        out[to + p] = cos[at + p] * x + sin[at + p] * y
        out[to + pairs + p] = cos[at + p] * y - sin[at + p] * x
    for c in range(2 * pairs, 2 * pairs + still):
        out[to + c] = queries[query * width + channels[c]]


@njit
def make_vectors(queries, head, row, asked, width, turned, rows, room, part, parts, given):
    """The vectors of one kind of blocks, a part of them: `given` are its 8 numbers."""
    out, blocks, channels = floats(given[0]), given[1], longs(given[2])
    pairs, still, cos, sin = given[3], given[4], floats(given[5]), floats(given[6])
    count, first = 2 * pairs + still, head * blocks * asked
    i, last = blocks * part // parts * asked, blocks * (part + 1) // parts * asked
    while i < last:  # as many queries of blocks at once as a product takes
        some = min(5, last - i)
        for j in range(some):
            at = ((row * blocks if given[7] > 1 else 0) + (i + j) // asked) * pairs
            query = head * asked + (i + j) % asked
            turn_back(queries, query, width, channels, pairs, still, cos, sin, at, rows, j * count)
            for r in range(room):
                out[(first + i + j) * room + r] = types.float32(0)
        for begin in range(0, room, PAIR):
            product_of(
                out, (first + i) * room + begin, room, rows, 0, count, turned, begin, room, channels, count, some
            )
        i += some


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def face(numbers):
    """The vectors that score the leading channels, times their steps, for two kinds of blocks: (rows, kv heads, blocks,
    queries, room) each. And what queries make of the mean: (rows, heads, 2 * pairs) with the angles of a token, (rows,
    heads) with channels that do not turn. A task is a part of the blocks of a kv head.

    tasks, parts, queries (rows, kv heads, queries, D), queries of each, D, kv heads, 8 numbers of axes (`axes_of`),
    leading channels, room, steps, scratch, bytes of it, mean (kv heads, D) or 0, pairs and still channels
    (2 * pairs + still,), count of pairs, of still, what they make, what the still make; then for each kind: vectors,
    blocks, channels, pairs, still, cos (rows, blocks, pairs), sin, rows of them
    """
    parts, queries, asked, width, kv_heads = numbers[1], floats(numbers[2]), numbers[3], numbers[4], numbers[5]
    given, leading, room = numbers_of(numbers, 6), numbers[14], numbers[15]
    steps, mean, known = floats(numbers[16]), floats(numbers[19]), longs(numbers[20])
    pairs, still, turning, constant = numbers[21], numbers[22], floats(numbers[23]), floats(numbers[24])
    mine, every = thread_number(), thread_count()
    memory = numbers[17] + numbers[18] * mine
    turned, rows = floats(memory), floats(memory + 4 * ((width + LANES - 1) // LANES * LANES) * room)
    unpacked = memory + 4 * (((width + LANES - 1) // LANES * LANES) * room + 5 * width)
    for task in range(mine, numbers[0], every):
        head, part = task // parts, task % parts
        row, kv_head = head // kv_heads, head % kv_heads
        # the axes of this head, times steps and on their sides
        axes, stride = axes_of(given, row, kv_head, leading, width, unpacked)
        on_its_side(axes, stride, steps, leading, width, turned, room)
        make_vectors(queries, head, row, asked, width, turned, rows, room, part, parts, numbers_of(numbers, 25))
        make_vectors(queries, head, row, asked, width, turned, rows, room, part, parts, numbers_of(numbers, 33))
        if part or not numbers[19]:
            continue
        for query in range(asked):
            at, to = (head * asked + query) * width, (head * asked + query) * 2 * pairs
            base = kv_head * width
            for p in range(pairs):
                x, y = queries[at + known[p]], queries[at + known[pairs + p]]
                a, b = mean[base + known[p]], mean[base + known[pairs + p]]
                turning[to + p] = x * a + y * b
                turning[to + pairs + p] = y * a - x * b
            total = types.float32(0)
            for c in range(2 * pairs, 2 * pairs + still):
                total += queries[at + known[c]] * mean[base + known[c]]
            constant[head * asked + query] = total


# ---- tokens in classes


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def join(numbers):
    """The leading channels of a class of tokens, as numbers, where these tokens are among all: (rows, tokens, leading),
    zeros there before. A task is a unit of a row.

    tasks, out, tokens, leading, places (rows, tokens of the class), steps, codes, gains, runs, count of runs, units,
    bytes of codes and of gains in a unit, units from one row to the next, scratch, bytes of it
    """
    out, tokens, leading, places, steps = (
        floats(numbers[1]),
        numbers[2],
        numbers[3],
        longs(numbers[4]),
        floats(numbers[5]),
    )
    runs, count, units, size, gain_size = longs(numbers[8]), numbers[9], numbers[10], numbers[11], numbers[12]
    apart, mine, every = numbers[13], thread_number(), thread_count()
    all_units = (numbers[0] // units - 1) * apart + units
    memory = numbers[14] + numbers[15] * mine
    tile, gain = floats(memory), floats(memory + 4 * LANES * TILE)
    copy = bytes_(memory + 4 * LANES * (TILE + 1))
    for task in range(numbers[0] * mine // every, numbers[0] * (mine + 1) // every):
        row, unit = task // units, task % units
        here, at, filled = row * apart + unit, 0, 0
        codes = readable(numbers[6], here, all_units, size, copy)
        for run in range(count):
            bits, channels, first = runs[2 * run], runs[2 * run + 1], 0
            wanted = min(channels, leading - filled)
            store(gain, 0, gains_of(bytes_(numbers[7] + here * gain_size), run, count))
            while first < wanted:
                some = min(TILE, wanted - first)
                unpack_rows(bits, codes, at + first, channels, some, gain, tile, 0, TILE)
                for t in range(LANES):
                    token = row * tokens + places[task * LANES + t]
                    to = token * leading + filled + first
                    for c in range(some):
                        out[to + c] = tile[t * TILE + c] * steps[filled + first + c]
                first += some
            filled += wanted
            at += bits * channels


# ---- rough scores


@njit
def columns_of(bits, codes, at, channels, count, gains, out, to, stride):
    """Channels of a run of a unit, as rows, from its codes or from numbers."""
    if bits == NUMBERS:
        for channel in range(0, count, LANES):
            turn_tile(
                as_floats(codes), at + channel, channels, fill(types.float32(1)), out, to + channel * stride, stride
            )
    else:
        unpack_columns(bits, codes, at, channels, count, gains, out, to, stride)


@njit(fastmath=FAST)
def add_vectors(near, far, fast, slow, size, out, to):
    """The sum of two vectors, of which one may not be there (address 0)."""
    for i in range(size):
        out[to + i] = far[i] if slow else types.float32(0)
    if fast:
        for i in range(size):
            out[to + i] += near[i]


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def dot(numbers):
    """Rough scores of all tokens, for each head

        mean vector @ angles of the token + still + (fast vector of its block + slow vector of its block) @ channels

    out (rows, heads, stride): heads are kv heads, each with its queries. A task is a part of the units of a row.

    tasks, parts, out, stride, codes, gains, runs, count of runs, units, bytes of codes and of gains in a unit, scratch,
    bytes of it, kv heads, queries of each, leading channels, room; fast vectors (rows, kv heads, blocks, queries, room)
    or 0, blocks, units in each, the same of slow vectors; mean vectors (rows, heads, angles), still (rows, heads),
    angles (rows, angles, tokens), count of angles, numbers in a row of them, rows of angles, units from one row to the
    next
    """
    tasks, parts, out, stride = numbers[0], numbers[1], floats(numbers[2]), numbers[3]
    runs, count, units = longs(numbers[6]), numbers[7], numbers[8]
    size, gain_size = numbers[9], numbers[10]
    kv_heads, asked, leading, room = numbers[13], numbers[14], numbers[15], numbers[16]
    fast, fast_blocks, fast_units = numbers[17], numbers[18], numbers[19]
    slow, slow_blocks, slow_units = numbers[20], numbers[21], numbers[22]
    means, still, angles, turning, angle_stride = numbers[23], numbers[24], numbers[25], numbers[26], numbers[27]
    heads, mine, every = kv_heads * asked, thread_number(), thread_count()
    memory = numbers[11] + numbers[12] * mine
    apart = numbers[29]
    all_units = (tasks // parts - 1) * apart + units
    tile, sums = floats(memory), floats(memory + 4 * PAIR * (TILE + LANES))
    gain = floats(memory + 4 * PAIR * (TILE + LANES + heads))
    vectors = floats(memory + 4 * PAIR * (TILE + LANES + heads + 1))
    copy = bytes_(memory + 4 * PAIR * (TILE + LANES + heads + 1) + 4 * heads * room)
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        row, part, pairs, known = task // parts, task % parts, (units + 1) // 2, -1
        for pair in range(pairs * part // parts, pairs * (part + 1) // parts):
            for head in range(heads):
                constant = floats(still)[row * heads + head]
                for i in range(PAIR):
                    sums[head * PAIR + i] = constant
            if turning:
                at = row * turning * angle_stride if numbers[28] > 1 else 0
                left, right = floats(means + 4 * row * heads * turning), floats(angles + 4 * at)
                product(sums, 0, PAIR, left, 0, turning, right, pair * PAIR, angle_stride, turning, heads)
            # vectors of this pair of units, the same for all of a block
            if known != row * fast_blocks + pair * 2 // fast_units:
                known = row * fast_blocks + pair * 2 // fast_units
                for kv_head in range(kv_heads):
                    here = row * kv_heads + kv_head
                    near = floats(fast + 4 * (here * fast_blocks + pair * 2 // fast_units) * asked * room)
                    far = floats(slow + 4 * (here * slow_blocks + pair * 2 // slow_units) * asked * room)
                    add_vectors(near, far, fast, slow, asked * room, vectors, kv_head * asked * room)
            # their products with the channels, a tile of them at a time
            at = filled = held = 0
            for run in range(count):
                bits, channels, first = runs[2 * run], runs[2 * run + 1], 0
                wanted = min(channels, leading - filled)
                while first < wanted:
                    some = min(TILE - held, wanted - first)
                    for second in range(2):
                        unit = row * apart + min(2 * pair + second, units - 1)
                        unit_codes = readable(numbers[4], unit, all_units, size, copy)
                        store(gain, 0, gains_of(bytes_(numbers[5] + unit * gain_size), run, count))
                        columns_of(
                            bits, unit_codes, at + first, channels, some, gain, tile, held * PAIR + second * LANES, PAIR
                        )  # fmt: skip
                    first, held = first + some, held + some
                    if held == TILE or filled + first == leading:
                        begin = filled + first - held
                        product(sums, 0, PAIR, vectors, begin, room, tile, 0, PAIR, held, heads)
                        held = 0
                filled += wanted
                if filled == leading:
                    break
                at += bits * channels
            for head in range(heads):
                to = (row * heads + head) * stride + pair * PAIR
                for i in range(min(PAIR, units * LANES - pair * PAIR)):
                    out[to + i] = sums[head * PAIR + i]


# ---- which tokens matter


@njit(fastmath=FAST)
def count_above(x, size, least):
    found = 0
    for i in range(size):
        found += x[i] >= least
    return found


@njit(fastmath=FAST)
def threshold_of(x, size, most):
    """That `most` numbers reach, or fewer where several are equal."""
    low = high = x[0]
    for i in range(size):
        low, high = min(low, x[i]), max(high, x[i])
    if size <= most:
        return low
    for _ in range(32):
        middle = low + (high - low) / 2
        if count_above(x, size, middle) > most:
            low = middle
        else:
            high = middle
    return high


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def choose(numbers):
    """Scores of raw keys, behind those of the `tokens` that are sealed, and the places of the tokens whose share of
    the attention of some query is `least` or more: for each kv head at most `exact` and at least `fewest`, those of the
    largest shares. A task is a kv head. Tokens may be in runs that are read apart: a place counts from the start of
    its run.

    tasks, scores (rows, kv heads, queries, stride), stride, queries of each, tokens, fewest, exact, logarithm of the
    least share in units of 1 / ONE, queries (rows, kv heads, queries, D), D, raw keys, raw, room, runs, the ends of
    runs, places (runs, rows, kv heads, exact), counts (runs, rows, kv heads), scratch, bytes of it
    """
    tasks, scores, stride, asked, tokens = numbers[0], floats(numbers[1]), numbers[2], numbers[3], numbers[4]
    fewest, exact, least, queries = numbers[5], numbers[6], types.float32(numbers[7] / ONE), floats(numbers[8])
    width, keys, raw, room = numbers[9], floats(numbers[10]), numbers[11], numbers[12]
    runs, ends, places, counts = numbers[13], longs(numbers[14]), longs(numbers[15]), longs(numbers[16])
    mine, every = thread_number(), thread_count()
    excess = floats(numbers[17] + numbers[18] * mine)
    for head in range(tasks * mine // every, tasks * (mine + 1) // every):
        for query in range(asked):
            at = (head * asked + query) * stride
            for t in range(raw):
                scores[at + tokens + t] = dot_row(
                    queries, (head * asked + query) * width, keys, (head * room + t) * width, width
                )
            most = scores[at]
            for t in range(1, tokens + raw):
                most = max(most, scores[at + t])
            total, sums, whole = types.float32(0), fill(types.float32(0)), (tokens + raw) // LANES * LANES
            for t in range(0, whole, LANES):
                sums = add(sums, exponential(at_least(add(load(scores, at + t), fill(-most)), -80)))
            store(excess, tokens, sums)
            for i in range(LANES):
                total += excess[tokens + i]
            for t in range(whole, tokens + raw):
                total += math.exp(scores[at + t] - most)
            share = most + math.log(total) + least
            if query == 0:
                for t in range(tokens):
                    excess[t] = scores[at + t] - share
            else:
                for t in range(tokens):
                    excess[t] = max(excess[t], scores[at + t] - share)
        counted = count_above(excess, tokens, types.float32(0))
        threshold = types.float32(0)
        if counted > exact or counted < fewest:
            threshold = threshold_of(excess, tokens, exact if counted > exact else fewest)
        begin, left = 0, exact
        for run in range(runs):
            found, to = 0, (run * tasks + head) * exact
            for t in range(begin, ends[run]):
                if excess[t] >= threshold and found < left:
                    places[to + found] = t - begin
                    found += 1
            counts[run * tasks + head] = found
            begin, left = ends[run], left - found


# ---- exact scores


@njit
def latent_of(codes, gains, runs, count, token, steps, gain_of, out, to):
    """All channels of one token; writes some more behind them. `gain_of`: room for the gains of 8 tokens."""
    at = filled = 0
    for run in range(count):
        bits, channels = runs[2 * run], runs[2 * run + 1]
        store(gain_of, 0, gains_of(gains, run, count))
        unpack_token(bits, codes, at, channels, token, gain_of[token], steps, filled, out, to + filled)
        filled += channels
        at += bits * channels


@njit
def in_columns(axes, stride, rank, width, out):
    """Columns of axes (rank, width), 16 at a time, one such band behind the other: read in place, rows that are
    thousands of bytes apart would push each other out of the caches."""
    for begin in range(0, width // PAIR * PAIR, PAIR):
        for r in range(rank):
            for part in range(0, PAIR, LANES):
                store(out, begin * rank + r * PAIR + part, load(axes, r * stride + begin + part))


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def rescore(numbers):
    """Exact scores of tokens, put over the rough ones: their keys are rebuilt, latents @ axes + mean, and rotated.
    Tokens of a kv head come in groups of 5, and a thread gets as many of them as the others.

    kv heads of all rows, scores (rows, kv heads, queries, stride), stride, codes, gains, runs, count of runs, units,
    bytes of codes and of gains in a unit, scratch, bytes of it, kv heads, queries of each, queries' address, D, places,
    counts, exact, rank, steps, 8 numbers of axes (`axes_of`), mean (kv heads, D) or 0, pairs (2, pairs), count of
    pairs, angles (rows, tokens, 2 * pairs), rows of angles, units from one row to the next
    """
    heads, scores, stride = numbers[0], floats(numbers[1]), numbers[2]
    runs, count, units, size, gain_size = longs(numbers[5]), numbers[6], numbers[7], numbers[8], numbers[9]
    kv_heads, asked, queries, width = numbers[12], numbers[13], floats(numbers[14]), numbers[15]
    places, counts, exact, rank, steps = (
        longs(numbers[16]),
        longs(numbers[17]),
        numbers[18],
        numbers[19],
        floats(numbers[20]),
    )
    given, mean = numbers_of(numbers, 21), floats(numbers[29])
    first, second, turning = longs(numbers[30]), longs(numbers[30] + 8 * numbers[31]), numbers[31]
    apart, tokens = numbers[34], units * LANES
    all_units = (heads // kv_heads - 1) * apart + units
    mine, every = thread_number(), thread_count()
    memory = numbers[10] + numbers[11] * mine
    ranked = rank + SLACK
    latents, keys = floats(memory), floats(memory + 4 * 5 * ranked)
    padded = (width + PAIR - 1) // PAIR * PAIR
    packed = floats(memory + 4 * 5 * (ranked + padded))
    unpacked = memory + 4 * (5 * (ranked + padded) + rank * padded)
    copy = bytes_(unpacked + 4 * rank * width)
    # this thread's groups, of all heads one after the other
    before, total = 0, 0
    for head in range(heads):
        total += (counts[head] + 4) // 5
    begun, ended = total * mine // every, total * (mine + 1) // every
    for head in range(heads):
        row, kv_head, groups = head // kv_heads, head % kv_heads, (counts[head] + 4) // 5
        first_group, last_group = max(begun - before, 0), min(ended - before, groups)
        before += groups
        if first_group >= last_group:
            continue
        axes, channel_stride = axes_of(given, row, kv_head, rank, width, unpacked)
        in_columns(axes, channel_stride, rank, width, packed)
        for group in range(first_group, last_group):
            some, chosen = min(5, counts[head] - 5 * group), head * exact + 5 * group
            for i in range(some):
                unit = row * apart + places[chosen + i] // LANES
                codes = readable(numbers[3], unit, all_units, size, copy)
                gains = bytes_(numbers[4] + unit * gain_size)
                latent_of(codes, gains, runs, count, places[chosen + i] % LANES, steps, keys, latents, i * ranked)
            # rebuild
            for begin in range(0, width // PAIR * PAIR, PAIR):
                for i in range(some):
                    for d in range(PAIR):
                        at = i * padded + begin + d
                        keys[at] = mean[kv_head * width + begin + d] if numbers[29] else types.float32(0)
                product(keys, begin, padded, latents, 0, ranked, packed, begin * rank, PAIR, rank, some)
            for d in range(width // PAIR * PAIR, width):
                for i in range(some):
                    made = mean[kv_head * width + d] if numbers[29] else types.float32(0)
                    for r in range(rank):
                        made += latents[i * ranked + r] * axes[r * channel_stride + d]
                    keys[i * padded + d] = made
            # rotate and score
            for i in range(some):
                token = places[chosen + i]
                at = ((row * tokens if numbers[33] > 1 else 0) + token) * 2 * turning
                angles = floats(numbers[32] + 4 * at)
                for p in range(turning):
                    x, y = keys[i * padded + first[p]], keys[i * padded + second[p]]
                    keys[i * padded + first[p]] = angles[p] * x - angles[turning + p] * y
                    keys[i * padded + second[p]] = angles[turning + p] * x + angles[p] * y
                for query in range(asked):
                    to = (head * asked + query) * stride + token
                    scores[to] = dot_row(queries, (head * asked + query) * width, keys, i * padded, width)


# ---- values


@njit(fastmath=FAST)
def largest(weights, head, heads, stride, at):
    """Of the weights of 8 tokens, for all heads."""
    most = types.float32(0)
    for h in range(heads):
        for t in range(LANES):
            most = max(most, weights[(head + h) * stride + at + t])
    return most


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def mix(numbers):
    """Weighted sums of all tokens, without the steps of the channels: (rows, parts, heads, padded), every run of
    channels padded to whole pairs. Units of weights below `least` are left out.

    tasks, parts, weights (rows, heads, stride), stride, least in units of 1 / ONE, out, codes, gains, runs, count of
    runs, units, bytes of codes and of gains in a unit, scratch, bytes of it, heads, padded, units from one row to the
    next
    """
    tasks, parts, weights, stride, least = (
        numbers[0],
        numbers[1],
        floats(numbers[2]),
        numbers[3],
        types.float32(numbers[4] / ONE),
    )
    out, runs, count, units = floats(numbers[5]), longs(numbers[8]), numbers[9], numbers[10]
    size, gain_size, heads, padded = numbers[11], numbers[12], numbers[15], numbers[16]
    apart = numbers[17]
    all_units = (tasks // parts - 1) * apart + units
    mine, every = thread_number(), thread_count()
    memory = numbers[13] + numbers[14] * mine
    tile, near = floats(memory), floats(memory + 4 * CHUNK * LANES * TILE)
    chosen, gain = (
        longs(memory + 4 * CHUNK * LANES * (TILE + heads)),
        floats(memory + 4 * CHUNK * LANES * (TILE + heads) + 8 * CHUNK),
    )
    copy = bytes_(memory + 4 * CHUNK * LANES * (TILE + heads) + 8 * CHUNK + 4 * LANES)
    for task in range(tasks * mine // every, tasks * (mine + 1) // every):
        row, part = task // parts, task % parts
        first_out = task * heads * padded
        for i in range(heads * padded):
            out[first_out + i] = types.float32(0)
        unit, last = units * part // parts, units * (part + 1) // parts
        while unit < last:
            # the next units that count, and their weights side by side
            some = 0
            while unit < last and some < CHUNK:
                if largest(weights, row * heads, heads, stride, unit * LANES) >= least:
                    chosen[some] = unit
                    for head in range(heads):
                        at = (row * heads + head) * stride + unit * LANES
                        for t in range(LANES):
                            near[(head * CHUNK + some) * LANES + t] = weights[at + t]
                    some += 1
                unit += 1
            if not some:
                break
            at = to = 0
            for run in range(count):
                bits, channels = runs[2 * run], runs[2 * run + 1]
                for first in range(0, channels, TILE):
                    taken = min(TILE, channels - first)
                    wide = (taken + PAIR - 1) // PAIR * PAIR
                    for i in range(some):
                        here = row * apart + chosen[i]
                        codes = readable(numbers[6], here, all_units, size, copy)
                        store(gain, 0, gains_of(bytes_(numbers[7] + here * gain_size), run, count))
                        unpack_rows(bits, codes, at + first, channels, wide, gain, tile, i * LANES * TILE, TILE)
                    for begin in range(0, wide, PAIR):
                        product(
                            out, first_out + to + begin, padded, near, 0, CHUNK * LANES, tile, begin, TILE,
                            some * LANES, heads,
                        )  # fmt: skip
                    to += wide
                at += bits * channels


@cfunc(SIGNATURE, cache=True, fastmath=FAST)
def finish(numbers):
    """Mixed values (rows, kv heads, queries, D) of what `mix` left: sums of its parts, times steps and axes, plus the
    mean as far as weights of sealed tokens go, plus raw values. A task is a kv head.

    tasks, kv heads, queries of each, sums (rows, parts, heads, padded), parts, padded, places of channels, rank, steps,
    8 numbers of axes (`axes_of`), D, mean (kv heads, D) or 0, weights (rows, heads, stride), stride, tokens, raw values
    (rows, kv heads, raw of room, D), raw, room, out, scratch, bytes of it
    """
    kv_heads, asked, sums, parts, padded = numbers[1], numbers[2], floats(numbers[3]), numbers[4], numbers[5]
    places, rank, steps = longs(numbers[6]), numbers[7], floats(numbers[8])
    given, width, mean = numbers_of(numbers, 9), numbers[17], floats(numbers[18])
    weights, stride, tokens = floats(numbers[19]), numbers[20], numbers[21]
    values, raw, room, out = floats(numbers[22]), numbers[23], numbers[24], floats(numbers[25])
    heads, mine, every = kv_heads * asked, thread_number(), thread_count()
    memory = numbers[26] + numbers[27] * mine
    latents, unpacked = floats(memory), memory + 4 * asked * rank
    for head in range(mine, numbers[0], every):
        row, kv_head = head // kv_heads, head % kv_heads
        for query in range(asked):
            number = kv_head * asked + query
            for r in range(rank):
                latents[query * rank + r] = types.float32(0)
            for part in range(parts):
                at = ((row * parts + part) * heads + number) * padded
                for r in range(rank):
                    latents[query * rank + r] += sums[at + places[r]]
            for r in range(rank):
                latents[query * rank + r] *= steps[r]
            total, at, to = types.float32(0), (head * asked + query) * stride, (head * asked + query) * width
            for t in range(tokens):
                total += weights[at + t]
            for d in range(width):
                out[to + d] = total * mean[kv_head * width + d] if numbers[18] else types.float32(0)
            for t in range(raw):
                weight = weights[at + tokens + t]
                for d in range(width):
                    out[to + d] += weight * values[(head * room + t) * width + d]
        axes, channel_stride = axes_of(given, row, kv_head, rank, width, unpacked)
        first = head * asked * width
        for begin in range(0, width // PAIR * PAIR, PAIR):
            product(out, first + begin, width, latents, 0, rank, axes, begin, channel_stride, rank, asked)
        for d in range(width // PAIR * PAIR, width):
            for query in range(asked):
                total = types.float32(0)
                for r in range(rank):
                    total += latents[query * rank + r] * axes[r * channel_stride + d]
                out[first + query * width + d] += total
