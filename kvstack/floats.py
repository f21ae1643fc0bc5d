"""Floating types that cannot hold every number: a half ends at 65,504, and keys of some models come close.

A product, a norm or a rotation of finite halves may be larger. So they are computed in float32, and come back in one
of two ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fitting", "saturated", "wide"]


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`; numbers that are too large become its largest ones. For what is decoded: the number that was
    encoded did fit."""
    if x.dtype == dtype and dtype != torch.float16:
        return x
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype) if most < torch.finfo(x.dtype).max or x.dtype == dtype else x.to(dtype)


def fitting(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, or in float32 where `dtype` is a half and some number is too large for it. For what is stored:
    nothing else would bring it back."""
    if dtype == torch.float16 and not bool((x.abs() <= torch.finfo(dtype).max).all()):
        return x.float()
    return x.to(dtype)
