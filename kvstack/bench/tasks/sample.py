"""The parts of a task: samples, questions and texts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Question", "Sample"]


@dataclass(frozen=True)
class Question:
    """A question about a text, and the answers that count as right."""

    text: str
    """Begins with a newline and ends with the first words of the answer; follows the sample's text."""
    answers: tuple[str, ...]
    new_tokens: int
    """Tokens to generate at most."""
    metric: str
    """A name in `scoring.METRICS`."""
    classes: tuple[str, ...] = ()
    """The labels to choose from, where the metric is `classes`."""
    one_line: bool = False
    """True if only the first line of the generated text counts."""


@dataclass(frozen=True)
class Sample:
    """A text, which may be compressed before a question is seen, and questions that are each asked about it alone."""

    task: str
    text: str
    questions: tuple[Question, ...]
    depth: float | None
    """The place of the first question's needle, from 0 (first) to 1 (last); None: there are several, or none."""
    index: int
    seed: int | None
    """The seed of `make`; None for samples from files."""
