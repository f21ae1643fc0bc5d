"""Samples that RULER's own generator has written."""

from __future__ import annotations

from pathlib import Path

from ...errors import KVStackError
from .jsonl import entries
from .recipe import NEW_TOKENS
from .sample import Question, Sample

__all__ = ["ruler_files"]

QUESTIONS = ("\nWhat", "\nQuestion")
"""The beginnings of the question of a RULER task."""


def ruler_files(folder: Path, context: int, task: str, samples: int) -> list[Sample]:
    """The first `samples` of `folder/CONTEXT/TASK.jsonl`: `input`, `outputs`, and `answer_prefix` where there is one.

    The question begins at the last line with "What" or "Question". A sample with one output has a depth: the
    place of that output in the text, its first one.
    """
    kind = task.partition("_")[0]
    if kind not in NEW_TOKENS:
        raise KVStackError(f"{task!r}: of RULER's tasks, those that begin with {', '.join(NEW_TOKENS)} can be scored.")
    path = folder / str(context) / f"{task}.jsonl"
    read = []
    for index, entry in enumerate(
        entries(path, ("input", "outputs"), samples, "RULER's samples are files CONTEXT/TASK.jsonl, with these fields.")
    ):
        prompt, answers = entry["input"] + entry.get("answer_prefix", ""), tuple(entry["outputs"])
        cut = max(prompt.rfind(mark) for mark in QUESTIONS)
        if cut < 0:
            raise KVStackError(f"{path}: no question in sample {index}. It begins with one of {QUESTIONS}.")
        text = prompt[:cut]
        question = Question(prompt[cut:], answers, NEW_TOKENS[kind], "share")
        read.append(Sample(task, text, (question,), _depth(text, answers), entry.get("index", index), seed=None))
    return read


def _depth(text: str, answers: tuple[str, ...]) -> float | None:
    if len(answers) != 1 or (place := text.find(answers[0])) < 0:
        return None
    return place / len(text)
