"""torch's own OpenMP threads, for kernels: threads of a second library would wait for those of torch, which keep their
cores busy for a while after each operator.

What is private here is looked for once. Where it is not found, kernels run in the caller's thread alone.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

__all__ = ["address", "library"]

MAPS = Path("/proc/self/maps")
"""The files that this process has loaded."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, where it has the entry points of GNU's."""
    try:
        paths = {line.split()[-1] for line in MAPS.read_text().splitlines() if "omp" in line.rpartition("/")[2]}
    except OSError:  # no Linux
        return None
    for path in sorted(paths):
        try:
            found = ctypes.CDLL(path)
            _ = found.GOMP_parallel, found.omp_get_thread_num, found.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        return found
    return None


def address(name: str) -> int:
    """Of OpenMP's function `name`, or of one that knows a single thread."""
    known = library()
    function = getattr(known, name) if known is not None else _alone()[name]
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def _alone() -> dict[str, ctypes._FuncPointer]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int)
    return {"omp_get_thread_num": kind(lambda: 0), "omp_get_num_threads": kind(lambda: 1)}
