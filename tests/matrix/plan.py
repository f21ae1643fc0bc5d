"""Which cells the matrix has: every mode with what is exact, the usual modes with every stage."""

from __future__ import annotations

from collections.abc import Iterator

from .architectures import attentions
from .modes import MODES
from .stacks import STACKS

__all__ = ["EVERYDAY", "EXACT", "cells"]

EXACT = ("empty", "Evict", "Evict, keydiff", "Quant(8)")
USUAL = ("left padding", "beams")
BOTH = ("plain", "left padding", "documents", "holes")
"""Modes in which the two attentions differ, by their masks."""

EVERYDAY = ("llama", "gemma3", "gemma4_text", "deepseek_v3", "falcon-alibi", "qwen3_5", "qwen2_5_vl")
"""Models whose cells of what is exact are in the usual tests, in every mode."""


def cells(name: str, attention: str) -> Iterator[tuple[str, str]]:
    """Mode and stack of every cell of a model with `attention`: all with the first it has, masks with another."""
    first = attention == attentions(name)[0]
    for stack in STACKS:
        for mode in MODES:
            if mode in ((MODES if stack in EXACT else USUAL) if first else BOTH if stack in EXACT else ()):
                yield mode, stack
