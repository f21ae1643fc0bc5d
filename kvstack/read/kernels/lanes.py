"""Vectors of 8 numbers, for what loops over single numbers are not reliably made into.

LLVM cuts them to what a processor has: one register with AVX, two with NEON or SSE.

    product     C (rows, 16) += A (rows, K) @ B (K, 16)    the sums stay in registers, every number of B is read once
                                                            for up to 5 rows
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from ...encode.bits import MOST, PLANES

__all__ = [
    "LANES",
    "add",
    "at_least",
    "exponential",
    "fill",
    "gains_of",
    "load",
    "product",
    "product_of",
    "store",
    "turn_tile",
    "unpack_columns",
    "unpack_rows",
    "unpack_token",
]

LANES = 8
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_BYTES, _LONG = ir.VectorType(ir.IntType(8), LANES), ir.IntType(64)
_FUSED = ("contract",)
"""A product and a sum may be one operation."""


class _Lanes(types.Type):
    pass


class _Numbers(_Lanes):
    def __init__(self) -> None:
        super().__init__(name="8 floats")


class _Integers(_Lanes):
    def __init__(self) -> None:
        super().__init__(name="8 words")


numbers, integers = _Numbers(), _Integers()


@register_model(_Numbers)
class _NumbersModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


@register_model(_Integers)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _WORDS)


_floats, _bytes = types.CPointer(types.float32), types.CPointer(types.uint8)


def _at(builder, pointer, index, kind):
    return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())


def _filled(builder, x, kind):
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), x, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_WORDS, [0] * LANES))


def _operation(returned, taken, generate):
    """An intrinsic of one to three arguments."""

    def run(context, builder, signature, arguments):
        made = generate(builder, *arguments)
        return context.get_dummy_value() if returned is types.none else made

    if len(taken) == 1:

        @intrinsic
        def one(typing_context, x):
            return returned(*taken), run

        return one
    if len(taken) == 2:

        @intrinsic
        def two(typing_context, x, y):
            return returned(*taken), run

        return two

    @intrinsic
    def three(typing_context, x, y, z):
        return returned(*taken), run

    return three


# ---- memory: pointer, index

load = _operation(numbers, (_floats, types.int64), lambda b, p, i: b.load(_at(b, p, i, _FLOATS), align=4))
store = _operation(
    types.none, (_floats, types.int64, numbers), lambda b, p, i, x: b.store(x, _at(b, p, i, _FLOATS), align=4)
)

# ---- arithmetic

fill = _operation(numbers, (types.float32,), lambda b, x: _filled(b, x, _FLOATS))
fill_words = _operation(integers, (types.uint32,), lambda b, x: _filled(b, x, _WORDS))
add = _operation(numbers, (numbers, numbers), lambda b, x, y: b.fadd(x, y, flags=_FUSED))
multiply = _operation(numbers, (numbers, numbers), lambda b, x, y: b.fmul(x, y, flags=_FUSED))
multiply_add = _operation(
    numbers, (numbers, numbers, numbers), lambda b, x, y, z: b.fadd(b.fmul(x, y, flags=_FUSED), z, flags=_FUSED)
)
at_least = _operation(
    numbers,
    (numbers, types.float32),
    lambda b, x, y: b.select(b.fcmp_ordered(">", x, _filled(b, y, _FLOATS)), x, _filled(b, y, _FLOATS)),
)
to_words = _operation(integers, (numbers,), lambda b, x: b.fptosi(x, _WORDS))  # towards zero
as_floats = _operation(numbers, (integers,), lambda b, x: b.bitcast(x, _FLOATS))  # the same bits
sum_words = _operation(integers, (integers, integers), lambda b, x, y: b.add(x, y))
to_floats = _operation(numbers, (integers,), lambda b, x: b.sitofp(x, _FLOATS))
shift_right = _operation(integers, (integers, integers), lambda b, x, y: b.lshr(x, y))
shift_left = _operation(integers, (integers, integers), lambda b, x, y: b.shl(x, y))
masked = _operation(integers, (integers, integers), lambda b, x, y: b.and_(x, y))


@njit
def exponential(x):
    """Of numbers from -80 to 0: 2 ** whole times a polynomial of the rest, to the seventh digit."""
    twos = multiply(x, fill(types.float32(1.4426950408889634)))
    whole = to_words(add(twos, fill(types.float32(-0.5))))
    rest = multiply(
        add(twos, multiply(to_floats(whole), fill(types.float32(-1)))), fill(types.float32(0.6931471805599453))
    )
    made = fill(types.float32(1 / 720))
    for term in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        made = multiply_add(made, rest, fill(types.float32(term)))
    return multiply(
        made, as_floats(shift_left(sum_words(whole, fill_words(types.uint32(127))), fill_words(types.uint32(23))))
    )


# ---- codes of 8 tokens


def _turned(builder, rows):
    """8 vectors of 8 numbers, on their sides."""
    undefined = ir.Constant(_FLOATS, ir.Undefined)

    def merged(x, y, places):
        return builder.shuffle_vector(x, y, ir.Constant(_WORDS, places))

    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = [merged(rows[i], rows[i + 1], places) for i in range(0, LANES, 2) for places in (low, high)]
    first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    fours = [merged(pairs[i + j], pairs[i + j + 2], half) for i in (0, 4) for j in (0, 1) for half in (first, second)]
    front, back = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    turned = [merged(fours[i], fours[i + 4], half) for half in (front, back) for i in range(4)]
    return [merged(x, undefined, list(range(LANES))) for x in turned]


def _unpack(bits, sideways):
    """Codes of one run of channels of a unit of 8 tokens -> gain * (code - middle), 8 channels at once."""

    def generate(context, builder, signature, arguments):
        codes, at, channels, count, gains, out, to, stride = arguments

        def filled_word(x):
            return ir.Constant(_WORDS, [x] * LANES)

        scales, bases = [], []
        for token in range(LANES):
            gain = builder.load(builder.gep(gains, [_LONG(token)]))
            scales.append(_filled(builder, gain, _FLOATS))
            middle = ir.Constant(ir.FloatType(), -((1 << bits) - 1) / 2)
            bases.append(_filled(builder, builder.fmul(gain, middle), _FLOATS))
        with cgutils.for_range_slice(builder, _LONG(0), count, _LONG(LANES), _LONG) as (channel, _):
            rows, row = {}, builder.add(at, channel)
            for plane in PLANES[bits]:
                for number in range(plane):
                    loaded = builder.load(_at(builder, codes, row, _BYTES), align=1)
                    rows[plane, number] = builder.zext(loaded, _WORDS)
                    row = builder.add(row, channels)
            made = []
            for token in range(LANES):
                code, offset = None, 0
                for plane in PLANES[bits]:
                    part = builder.lshr(rows[plane, token % plane], filled_word(token // plane * plane))
                    part = builder.shl(builder.and_(part, filled_word((1 << plane) - 1)), filled_word(offset))
                    code = part if code is None else builder.or_(code, part)
                    offset += plane
                number = builder.fmul(builder.sitofp(code, _FLOATS), scales[token], flags=_FUSED)
                made.append(builder.fadd(number, bases[token], flags=_FUSED))
            for i, x in enumerate(_turned(builder, made) if sideways else made):
                if sideways:
                    place = builder.add(to, builder.mul(builder.add(channel, _LONG(i)), stride))
                else:
                    place = builder.add(builder.add(to, channel), builder.mul(stride, _LONG(i)))
                builder.store(x, _at(builder, out, place, _FLOATS), align=4)
        return context.get_dummy_value()

    @intrinsic
    def run(typing_context, codes, at, channels, count, gains, out, to, stride):
        long = types.int64
        return types.none(_bytes, long, long, long, _floats, _floats, long, long), generate

    return run


def _unpack_one(bits):
    """Codes of one of the 8 tokens of a unit -> steps * gain * (code - middle), all channels of a run."""

    def generate(context, builder, signature, arguments):
        codes, at, channels, token, gain, steps, first, out, to = arguments
        scale = _filled(builder, gain, _FLOATS)
        middle = ir.Constant(ir.FloatType(), -((1 << bits) - 1) / 2)
        base = _filled(builder, builder.fmul(gain, middle), _FLOATS)
        rows, begin = [], 0
        for plane in PLANES[bits]:
            number = builder.and_(token, _LONG(plane - 1))  # its row of the plane, whose width is a power of two
            row = builder.add(at, builder.mul(builder.add(number, _LONG(begin)), channels))
            place = builder.trunc(builder.sub(token, number), ir.IntType(32))
            rows.append((plane, begin, row, _filled(builder, place, _WORDS)))
            begin += plane
        with cgutils.for_range_slice(builder, _LONG(0), channels, _LONG(LANES), _LONG) as (channel, _):
            code = None
            for plane, offset, row, place in rows:
                loaded = builder.load(_at(builder, codes, builder.add(row, channel), _BYTES), align=1)
                part = builder.lshr(builder.zext(loaded, _WORDS), place)
                part = builder.and_(part, ir.Constant(_WORDS, [(1 << plane) - 1] * LANES))
                part = builder.shl(part, ir.Constant(_WORDS, [offset] * LANES))
                code = part if code is None else builder.or_(code, part)
            number = builder.fmul(builder.sitofp(code, _FLOATS), scale, flags=_FUSED)
            number = builder.fadd(number, base, flags=_FUSED)
            step = builder.load(_at(builder, steps, builder.add(first, channel), _FLOATS), align=4)
            place = _at(builder, out, builder.add(to, channel), _FLOATS)
            builder.store(builder.fmul(number, step, flags=_FUSED), place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def run(typing_context, codes, at, channels, token, gain, steps, first, out, to):
        long = types.int64
        return types.none(_bytes, long, long, long, types.float32, _floats, long, _floats, long), generate

    return run


def _by_bits(made):
    """One function of those for 1 to 12 bits."""
    one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve = made

    @njit
    def unpack(bits, *given):
        if bits == 1:
            one(*given)
        elif bits == 2:
            two(*given)
        elif bits == 3:
            three(*given)
        elif bits == 4:
            four(*given)
        elif bits == 5:
            five(*given)
        elif bits == 6:
            six(*given)
        elif bits == 7:
            seven(*given)
        elif bits == 8:
            eight(*given)
        elif bits == 9:
            nine(*given)
        elif bits == 10:
            ten(*given)
        elif bits == 11:
            eleven(*given)
        else:
            twelve(*given)

    return unpack


@intrinsic
def _gain_places(typing_context):
    """The places of 8 tokens' codes in a word: the 2 bytes of one channel in a plane of 2 bits."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(_WORDS, [8 * (token % 2) + token // 2 * 2 for token in range(LANES)])

    return integers(), generate


@njit
def gains_of(gains, run, count):
    """Gains of the 8 tokens of a unit for one of `count` runs: 2 ** ((code - 1) / 2), codes of 2 bits."""
    word = types.uint32(gains[run]) | types.uint32(gains[count + run]) << types.uint32(8)
    codes = masked(shift_right(fill_words(word), _gain_places()), fill_words(types.uint32(3)))
    one, root = fill_words(types.uint32(1)), types.float32(0.7071067811865476)
    low = multiply_add(to_floats(masked(codes, one)), fill(types.float32(1) - root), fill(root))
    return multiply_add(to_floats(shift_right(codes, one)), low, low)


unpack_rows = _by_bits([_unpack(bits, sideways=False) for bits in range(1, MOST + 1)])
"""Codes of `count` channels (in whole vectors) of a run of `channels`, from byte `at` on, and the `gains` of 8 tokens
-> rows of tokens, out[to + stride * token + channel]."""
unpack_columns = _by_bits([_unpack(bits, sideways=True) for bits in range(1, MOST + 1)])
"""The same, rows of channels: out[to + stride * channel + token]."""
unpack_token = _by_bits([_unpack_one(bits) for bits in range(1, MOST + 1)])
"""All channels of a run of one token, times `steps` from number `first` on -> out[to + channel]; some more are written
behind them."""


@intrinsic
def turn_tile(typing_context, rows, at, stride, scale, out, to, out_stride):
    """8 rows of 8 numbers -> 8 rows of the 8 columns, times `scale` (8 lanes)."""

    def generate(context, builder, signature, arguments):
        rows, at, stride, scale, out, to, out_stride = arguments
        loaded = [
            builder.load(_at(builder, rows, builder.add(at, builder.mul(stride, _LONG(i))), _FLOATS), align=4)
            for i in range(LANES)
        ]
        for i, x in enumerate(_turned(builder, loaded)):
            place = builder.add(to, builder.mul(out_stride, _LONG(i)))
            builder.store(builder.fmul(x, scale, flags=_FUSED), _at(builder, out, place, _FLOATS), align=4)
        return context.get_dummy_value()

    long = types.int64
    return types.none(_floats, long, long, numbers, _floats, long, long), generate


# ---- products


def _product(rows, chosen=False):
    """C (rows, 16) += A (rows, K) @ B (K, 16), the sums in registers. `chosen`: some rows of B, by their numbers."""

    def generate(context, builder, signature, arguments):
        into, c, c_stride, left, a, a_stride, right, b, b_stride, *which, count = arguments
        sums = {}
        for row in range(rows):
            for part in range(2):
                place = builder.add(c, builder.add(builder.mul(c_stride, _LONG(row)), _LONG(part * LANES)))
                kept = cgutils.alloca_once(builder, _FLOATS)
                builder.store(builder.load(_at(builder, into, place, _FLOATS), align=4), kept)
                sums[row, part] = kept, place
        with cgutils.for_range(builder, count) as loop:
            number = builder.load(builder.gep(which[0], [loop.index])) if chosen else loop.index
            at = builder.add(b, builder.mul(number, b_stride))
            pair = [
                builder.load(_at(builder, right, builder.add(at, _LONG(part * LANES)), _FLOATS), align=4)
                for part in range(2)
            ]
            for row in range(rows):
                place = builder.add(builder.add(a, builder.mul(a_stride, _LONG(row))), loop.index)
                x = _filled(builder, builder.load(builder.gep(left, [place])), _FLOATS)
                for part in range(2):
                    kept, _ = sums[row, part]
                    more = builder.fmul(x, pair[part], flags=_FUSED)
                    builder.store(builder.fadd(more, builder.load(kept), flags=_FUSED), kept)
        for kept, place in sums.values():
            builder.store(builder.load(kept), _at(builder, into, place, _FLOATS), align=4)
        return context.get_dummy_value()

    long, longs = types.int64, types.CPointer(types.int64)
    taken = (_floats, long, long, _floats, long, long, _floats, long, long)
    if chosen:

        @intrinsic
        def run_chosen(typing_context, into, c, c_stride, left, a, a_stride, right, b, b_stride, which, count):
            return types.none(*taken, longs, long), generate

        return run_chosen

    @intrinsic
    def run(typing_context, into, c, c_stride, left, a, a_stride, right, b, b_stride, count):
        return types.none(*taken, long), generate

    return run


_one, _two, _three, _four, _five = (_product(rows) for rows in range(1, 6))
_one_of, _two_of, _three_of, _four_of, _five_of = (_product(rows, chosen=True) for rows in range(1, 6))


@njit
def product(into, c, c_stride, left, a, a_stride, right, b, b_stride, count, rows):
    """`into` (rows, 16) += `left` (rows, count) @ `right` (count, 16): each from a place on, rows a stride apart."""
    groups, done = (rows + 4) // 5, 0
    for group in range(groups):
        some = (rows - done + groups - group - 1) // (groups - group)
        to, start = c + done * c_stride, a + done * a_stride
        if some == 5:
            _five(into, to, c_stride, left, start, a_stride, right, b, b_stride, count)
        elif some == 4:
            _four(into, to, c_stride, left, start, a_stride, right, b, b_stride, count)
        elif some == 3:
            _three(into, to, c_stride, left, start, a_stride, right, b, b_stride, count)
        elif some == 2:
            _two(into, to, c_stride, left, start, a_stride, right, b, b_stride, count)
        else:
            _one(into, to, c_stride, left, start, a_stride, right, b, b_stride, count)
        done += some


@njit
def product_of(into, c, c_stride, left, a, a_stride, right, b, b_stride, which, count, rows):
    """The same of at most 5 rows, with `count` rows of `right` by their numbers."""
    if rows == 5:
        _five_of(into, c, c_stride, left, a, a_stride, right, b, b_stride, which, count)
    elif rows == 4:
        _four_of(into, c, c_stride, left, a, a_stride, right, b, b_stride, which, count)
    elif rows == 3:
        _three_of(into, c, c_stride, left, a, a_stride, right, b, b_stride, which, count)
    elif rows == 2:
        _two_of(into, c, c_stride, left, a, a_stride, right, b, b_stride, which, count)
    else:
        _one_of(into, c, c_stride, left, a, a_stride, right, b, b_stride, which, count)
