"""RULER's synthetic tasks at a given length (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from ...errors import KVStackError
from .counting import CommonWords, FrequentWords
from .niah import Needles
from .recipe import Recipe, Task
from .sample import Sample
from .tracking import Tracking

__all__ = ["TASKS", "make"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "niah_single_1": Needles("noise"),
        "niah_single_2": Needles(),
        "niah_single_3": Needles(value="uuid"),
        "niah_multikey_1": Needles(keys=4),
        "niah_multikey_2": Needles("needles"),
        "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
        "niah_multivalue": Needles(values=4),
        "niah_multiquery": Needles(keys=4, asked=4),
        "vt": Tracking(),
        "cwe": CommonWords(),
        "fwe": FrequentWords(),
    }
)
CLOSE = 0.005
"""A sample that leaves less than this share of its length unused is not made longer."""


def make(
    task: str, length: int, number: int, seed: int, count: Callable[[str], int], prose: str, questions: int = 1
) -> list[Sample]:
    """`number` samples of a task, each as long as `length` tokens allow: text, longest question and its new tokens.

    Tokens are what `count` counts, of text and question each by itself. The needle asked for first goes from the start
    of the text in the first sample to its end in the last one, in equal steps; all other places are random. Equal
    arguments give equal samples, and needles do not depend on `length`.

    `prose` is the haystack of the tasks that hide needles in text. With `questions`, so many are asked about one text,
    each for another needle: up to 4 with `niah_multikey_1`, any number with `niah_multikey_2` and `niah_multikey_3`.

    Raises `KVStackError` for an unknown task, for a length that does not hold the needles, the question and the new
    tokens, and for more questions than the task's text can answer.
    """
    chosen = _chosen(task, number, questions)
    samples = []
    for index in range(number):
        depth = index / (number - 1) if number > 1 else 0.5
        recipe = Recipe(f"{task}/{seed}/{index}", length, depth, prose, questions)
        empty = Sample(task, "", (), depth if chosen.one_place else None, index, seed)
        samples.append(_fitted(chosen, recipe, empty, count))
    return samples


def _chosen(task: str, number: int, questions: int) -> Task:
    if task not in TASKS:
        raise KVStackError(f"{task!r} is not a task. Use one of {', '.join(TASKS)}.")
    if number < 1 or questions < 1:
        raise KVStackError(f"{number} samples with {questions} questions each: ask for at least one of both.")
    most = TASKS[task].most
    if most is not None and questions > most:
        more = [name for name, other in TASKS.items() if other.most is None or other.most >= questions]
        raise KVStackError(
            f"{task} can answer {most} question{'s' * (most > 1)} about one text, not {questions}. "
            f"Ask fewer, or use {' or '.join(more)}."
        )
    return TASKS[task]


def _fitted(task: Task, recipe: Recipe, empty: Sample, count: Callable[[str], int]) -> Sample:
    """The sample whose size comes closest to the recipe's length from below."""

    def write(size: int) -> tuple[Sample, int]:
        text, asked = task.write(recipe, size)
        room = max(count(question.text) + question.new_tokens for question in asked)
        return replace(empty, text=text, questions=asked), count(text) + room

    best, tokens = write(0)
    if tokens > recipe.length:
        raise KVStackError(
            f"{empty.task}: {recipe.length} tokens are too few. What must stand in the text, the question and "
            f"the room for the answer take {tokens}. Ask for more."
        )
    low, high = 0, 1
    while (longer := write(high))[1] <= recipe.length:
        (best, tokens), low, high = longer, high, 2 * high
    while high - low > 1 and recipe.length - tokens > CLOSE * recipe.length:
        middle = (low + high) // 2
        longer = write(middle)
        if longer[1] <= recipe.length:
            (best, tokens), low = longer, middle
        else:
            high = middle
    return best
