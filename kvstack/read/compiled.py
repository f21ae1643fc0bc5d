"""Kernels for a processor: loops over packed codes that torch has no operator for, compiled by numba.

numbers (addresses and sizes)  ->  GOMP_parallel(kernel, numbers, threads)  ->  kernel(numbers), once in each thread
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import sys
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import openmp

__all__ = ["Kernel", "agree", "kernel", "side_by_side"]

log = logging.getLogger(__name__)

CLOSE = 1e-4
"""The largest allowed difference of kernels from the reference, as a share of the largest number."""

Kernel = Callable[..., None]
"""Called with whole numbers; a contiguous tensor stands for its address."""


def agree(pairs: Callable[[], Iterable[tuple[Tensor, ...]]], compiler: str = "numba") -> bool:
    """Return True if kernels work here: numbers of the reference and of the kernels, `pairs`, are equal up to rounding.
    If not, or if the package `compiler` is missing, plain torch does their work, without a message."""
    if importlib.util.find_spec(compiler) is None or sys.byteorder != "little":
        return False
    try:
        return all(float((x - y).abs().max()) <= CLOSE * float(x.abs().max()) for x, y in pairs())
    except Exception as error:  # a compiler that does not fit this Python or this device
        log.debug("kernels cannot be used: %s", error)
        return False


@functools.cache
def kernel(name: str) -> Kernel:
    """The kernel of this name, `file.function` of kernels/, compiled now or read from numba's cache."""
    file, _, function = name.partition(".")
    run = _runner(getattr(importlib.import_module(f"{__package__}.kernels.{file}"), function).address)

    def call(*given: Tensor | int) -> None:
        numbers = array("q", [x if x.__class__ is int else x.data_ptr() for x in given])  # type: ignore[union-attr]
        run(numbers.buffer_info()[0])

    return call


def _runner(address: int) -> Callable[[Any], Any]:
    library = openmp.library()
    if library is None:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    start = library.GOMP_parallel
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return lambda numbers: start(address, numbers, torch.get_num_threads(), 0)


def side_by_side(raw: Tensor) -> tuple[Tensor, int, int]:
    """Raw tokens (B, H, n, D) as kernels read them: float32, the tokens of a head side by side and heads at equal
    distances, as in store/raw.py. The tensor, its tokens, and the tokens from a head to the next."""
    rows, heads, each, one = raw.stride()
    width = raw.shape[3]
    if (
        raw.dtype != torch.float32
        or one != 1
        or each != width
        or (len(raw) > 1 and rows != raw.shape[1] * heads)
        or heads % width
    ):
        raw = raw.float().contiguous()
        heads = raw.stride(1)
    return raw, raw.shape[2], heads // width
