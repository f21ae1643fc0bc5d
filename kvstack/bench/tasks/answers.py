"""Questions in the columns of kvpress' evaluation, and how its datasets are scored.

    context, question, answer_prefix, answer, max_new_tokens       and task, where the dataset has several

A file is Parquet or JSON lines. All other columns are kept: some metrics need them, and so do the predictions.

Facts from https://github.com/NVIDIA/kvpress/tree/main/evaluation. Left out: loogle and infinitebench, whose metrics
need models and packages of their own; zero_scrolls, which has no metric; needle_in_haystack, whose needles kvpress
writes into texts itself (`kvstack bench needles` does so too).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

from ...errors import KVStackError
from .jsonl import entries
from .longbench import DATASETS as LONGBENCH
from .sample import Question
from .scoring import score as longbench_score

__all__ = ["DATASETS", "Asked", "Dataset", "answer_files"]

COLUMNS = ("context", "question", "answer_prefix", "max_new_tokens")
CONTROL = re.compile(r"[\x00-\x1f]")
WHAT = "A file of questions has the columns context, question, answer_prefix, answer and max_new_tokens."


@dataclass(frozen=True)
class Asked:
    """One row of a file.

    Attributes:
        answers: one or several.
        row: all its columns.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    new_tokens: int
    task: str
    row: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Dataset:
    """The scoring of a dataset of kvpress.

    Attributes:
        score: of one generated text, from 0 to 1.
        metrics: the content of kvpress' metrics.json, from all rows and the texts generated for them.
    """

    score: Callable[[str, Asked], float]
    metrics: Callable[[Sequence[Asked], Sequence[str]], Any]


def answer_files(path: Path, samples: int | None = None) -> tuple[list[Asked], int]:
    """The first `samples` rows of a file, all if None, and how many there are.

    Raises:
        KVStackError: it is not such a file, or a package that reads it is missing.
    """
    if path.suffix == ".parquet":
        rows = _parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        rows = list(entries(path, COLUMNS, None, WHAT))
    else:
        raise KVStackError(f"{path} is neither Parquet nor JSON lines. Name a .parquet or a .jsonl file.")
    if not rows:
        raise KVStackError(f"{path} has no rows. {WHAT}")
    return [_asked(path, number, row) for number, row in enumerate(rows[:samples])], len(rows)


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise KVStackError("Parquet files are read by the package pyarrow. Run: pip install pyarrow") from error
    try:
        rows: list[dict[str, Any]] = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise KVStackError(f"{path} cannot be read as Parquet: {reason}") from error
    return rows


def _asked(path: Path, number: int, row: Mapping[str, Any]) -> Asked:
    missing = [name for name in COLUMNS if name not in row]
    given = row.get("answer", row.get("answers"))
    if missing or given is None:
        raise KVStackError(f"{path}, row {number}: the column {', '.join(missing) or 'answer'} is missing. {WHAT}")
    answers = tuple(map(str, given)) if isinstance(given, list | tuple) else (str(given),)
    new_tokens = row["max_new_tokens"]
    if not answers or isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise KVStackError(
            f"{path}, row {number}: answer is {given!r} and max_new_tokens is {new_tokens!r}. "
            "Give at least one answer, and a number of tokens of 1 or more."
        )
    context, question, prefix = (str(row[name] or "") for name in ("context", "question", "answer_prefix"))
    return Asked(context, question, prefix, answers, new_tokens, str(row.get("task") or ""), row)


# ---- scores of one text


def _found(text: str, asked: Asked) -> list[bool]:
    plain = CONTROL.sub("", text.strip()).strip().lower()
    return [answer.lower() in plain for answer in asked.answers]


def _any(text: str, asked: Asked) -> float:
    return float(any(_found(text, asked)))


def _exact(text: str, asked: Asked) -> float:
    return float(any(text.strip() == answer.strip() for answer in asked.answers))


def _ruler(text: str, asked: Asked) -> float:
    """Of questions and answers one of the answers counts, of other tasks the share that is found."""
    return _any(text, asked) if asked.task.split("_")[0] == "qa" else mean(_found(text, asked))


def _longbench(text: str, asked: Asked) -> float:
    known = LONGBENCH.get(asked.task.removesuffix("_e").removesuffix("-e"))
    if known is None:
        raise KVStackError(
            f"task={asked.task!r} is not an English data set of LongBench. Use one of {', '.join(LONGBENCH)}."
        )
    classes = tuple(asked.row.get("all_classes") or ())
    question = Question("", asked.answers, asked.new_tokens, known.metric, classes, known.one_line)
    return longbench_score(known.metric, text.lstrip(), question)


def _choice(text: str, asked: Asked) -> float:
    plain = text.replace("*", "")
    return float(any(f"The correct answer is {x}" in plain for a in asked.answers for x in (a, f"({a})")))


def _boxed_last(text: str, asked: Asked) -> float:
    return float(text.rpartition("boxed{")[2].split("}")[0] == asked.answers[0])


def _boxed_first(text: str, asked: Asked) -> float:
    _, boxed, rest = text.partition("boxed{")
    return float(bool(boxed) and rest.split("boxed{")[0].split("}")[0] == asked.answers[0])


# ---- metrics of a dataset


def _by(asked: Sequence[Asked], scores: Sequence[float], column: str | None = None) -> dict[str, float]:
    """Mean scores by task, or by another column, sorted."""
    names = [one.task if column is None else str(one.row.get(column)) for one in asked]
    return {
        name: mean(score for mine, score in zip(names, scores, strict=True) if mine == name)
        for name in sorted(set(names))
    }


def _matches(score: Callable[[str, Asked], float], name: str) -> Callable[[Sequence[Asked], Sequence[str]], Any]:
    def metrics(asked: Sequence[Asked], texts: Sequence[str]) -> Any:
        scores = [score(text, one) for one, text in zip(asked, texts, strict=True)]
        return {task: {name: round(100 * value, 2)} for task, value in _by(asked, scores).items()}

    return metrics


def _of_longbench(asked: Sequence[Asked], texts: Sequence[str]) -> Any:
    scores = [_longbench(text, one) for one, text in zip(asked, texts, strict=True)]
    return round(100 * mean(scores), 2)


def _of_longbench_e(asked: Sequence[Asked], texts: Sequence[str]) -> Any:
    scores = [_longbench(text, one) for one, text in zip(asked, texts, strict=True)]
    parts: dict[str, list[float]] = {"0-4k": [], "4-8k": [], "8k+": []}
    for one, score in zip(asked, scores, strict=True):
        length = int(one.row.get("length") or 0)
        parts["0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"].append(score)
    return {name: round(100 * mean(part), 2) if part else None for name, part in parts.items()}


def _of_longbench_v2(asked: Sequence[Asked], texts: Sequence[str]) -> Any:
    scores = [_choice(text, one) for one, text in zip(asked, texts, strict=True)]
    return {"average": mean(scores), **_by(asked, scores, "difficulty"), **_by(asked, scores, "length")}


def _of_boxes(score: Callable[[str, Asked], float]) -> Callable[[Sequence[Asked], Sequence[str]], Any]:
    def metrics(asked: Sequence[Asked], texts: Sequence[str]) -> Any:
        correct = int(sum(score(text, one) for one, text in zip(asked, texts, strict=True)))
        answered = sum("boxed{" in text for text in texts)
        return {"correct": correct, "answered": answered, "accuracy": correct / len(asked), "total": len(asked)}

    return metrics


DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "match": Dataset(_any, _matches(_any, "string_match")),
        "exact": Dataset(_exact, _matches(_exact, "exact_match")),
        "ruler": Dataset(_ruler, _matches(_ruler, "string_match")),
        "longbench": Dataset(_longbench, _of_longbench),
        "longbench-e": Dataset(_longbench, _of_longbench_e),
        "longbench-v2": Dataset(_choice, _of_longbench_v2),
        "aime25": Dataset(_boxed_last, _of_boxes(_boxed_last)),
        "math500": Dataset(_boxed_first, _of_boxes(_boxed_first)),
    }
)
"""Datasets by kvpress' names, and two that are none of its: `match` finds an answer anywhere in the text, `exact` wants
nothing else."""
