"""Sizes that kernels are launched with."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["FUSED", "LARGEST", "MOST", "block", "on", "pieces"]

LEAST = 16
"""The smallest side of a tile that tensor cores multiply."""
LARGEST, MOST = 256, 64
"""Channels of a head, and queries of a kv head, beyond which a tile no longer fits into registers."""
FUSED = {"enable_fp_fusion": True}
"""An option of every kernel. Older versions of triton have it by default; newer ones warn if it is missing."""
ON_PROCESSOR = 4
"""Programs that an interpreted kernel is cut into, so that tests see several."""


def block(size: int) -> int:
    """The side of a tile that holds `size` numbers: a power of two."""
    return max(LEAST, 1 << (size - 1).bit_length())


def pieces(tiles: int, others: int, device: torch.device) -> int:
    """Into how many pieces `tiles` of tokens are cut, so that with `others` programs for each piece every
    multiprocessor has something to do."""
    return max(1, min(tiles, -(-_programs(device) // others)))


def on(x: Tensor) -> AbstractContextManager[object]:
    """Launch kernels on the device of `x`: triton would take the current one."""
    return torch.cuda.device_of(x)


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return ON_PROCESSOR
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
