"""Addresses as pointers, and who runs.

Indices of numba's arrays may be negative, and loops over them are not vectorized; pointers know nothing like that.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .. import openmp

__all__ = ["SIGNATURE", "as_floats", "bytes_", "floats", "half", "halves", "longs", "thread_count", "thread_number"]

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


@intrinsic
def as_floats(typing_context, codes):
    """Floats where bytes are."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.CPointer(types.uint8)), generate


floats, bytes_, halves = _pointer(types.float32), _pointer(types.uint8), _pointer(types.uint16)
longs = _pointer(types.int64)


@intrinsic
def half(typing_context, bits):
    """The number that these 16 bits are as a half."""

    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate
