"""Texts of three kinds that every Python brings along, and windows cut from them."""

from __future__ import annotations

import argparse
import inspect
import random
from pathlib import Path

from ...calibration.texts import docstrings
from ...errors import KVStackError

__all__ = ["documentation", "domains", "prose", "windows"]

WRITERS = ("difflib", "doctest", "statistics", "turtle", "optparse", "decimal", "_pydecimal", "threading", "typing")
"""Modules of the standard library with much prose in their docstrings."""


def domains(folder: Path | None) -> dict[str, str]:
    """Texts by kind; the .txt files of `folder`, where given, take the place of the docstrings."""
    third = {"docstrings": docstrings(WRITERS)} if folder is None else {"texts": _files(folder)}
    return {"documentation": documentation(), "code": inspect.getsource(argparse), **third}


def windows(text: str, count: int, characters: int, seed: int) -> list[str]:
    """`count` pieces that begin at random lines of equal parts of `text`; `characters` follow the last of them."""
    if count > 1 and len(text) < count * characters / 2:
        raise KVStackError(f"{count} windows overlap in a text of {len(text):,} characters. Use fewer: --windows.")
    draw = random.Random(seed)
    span = max(0, len(text) - characters) / count
    starts = [int((part + draw.random()) * span) for part in range(count)]
    return [text[text.find("\n", start) + 1 :] for start in starts]


def documentation() -> str:
    """The reference manual of Python, as `help()` shows it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def prose(folder: Path | None) -> str:
    """Text to hide things in: the .txt files of `folder`, or Python's documentation."""
    return documentation() if folder is None else _files(folder)


def _files(folder: Path) -> str:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise KVStackError(f"{folder} holds no .txt files. Name a folder of plain texts.")
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
