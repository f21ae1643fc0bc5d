"""Encoders: one tensor in fewer bytes."""

from .quant import Quant

__all__ = ["Quant"]
