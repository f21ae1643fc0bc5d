"""Which cells the matrix has: every mode with what is exact, the usual modes with every stage."""

from __future__ import annotations

from collections.abc import Iterator

from .modes import MODES
from .stacks import STACKS

__all__ = ["ATTENTIONS", "EVERYDAY", "cells"]

ATTENTIONS = ("sdpa", "eager")
EXACT = ("empty", "Evict", "Evict, keydiff", "Quant(8)")
USUAL = ("plain", "left padding", "beams")
BOTH = ("plain", "left padding", "documents", "holes")
"""Modes in which the two attentions differ, by their masks."""

EVERYDAY = ("llama", "gemma3", "gemma4_text", "deepseek_v3", "falcon-alibi", "qwen3_5", "qwen2_5_vl")
"""Models whose cells of what is exact are in the usual tests, in every mode."""


def cells(attention: str) -> Iterator[tuple[str, str]]:
    """Mode and stack of every cell of a model with `attention`."""
    for stack in STACKS:
        modes = (MODES if stack in EXACT else USUAL) if attention == "sdpa" else BOTH if stack in EXACT else ()
        for mode in modes:
            yield mode, stack
