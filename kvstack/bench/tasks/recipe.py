"""The input of a task that writes one sample, and its output."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from .sample import Question

__all__ = ["NEW_TOKENS", "Recipe", "Task"]

NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
"""Room for an answer, as RULER has it, by the first part of a task's name."""


@dataclass(frozen=True)
class Recipe:
    """One sample to write; `source` seeds it."""

    source: str
    length: int
    """Tokens of text, question and answer."""
    depth: float
    prose: str
    questions: int

    def draw(self) -> random.Random:
        """Random numbers from the start: a sample written in another size has the same needles."""
        return random.Random(self.source)


class Task(Protocol):
    @property
    def most(self) -> int | None:
        """The number of questions that can be asked about one text; None: any number."""

    @property
    def one_place(self) -> bool:
        """True if the answer to a question is in one place, so that the sample has a depth."""

    def write(self, recipe: Recipe, size: int) -> tuple[str, tuple[Question, ...]]:
        """Text and questions of a sample; the text grows with `size`."""
