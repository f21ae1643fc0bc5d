"""Transforms: layers that are stored together. The contract is `kvstack.stage.Transform`."""

from .commonkv import CommonKV

__all__ = ["CommonKV"]
