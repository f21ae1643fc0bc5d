"""The score of an answer, from 0 to 1: RULER's share of the expected outputs, and LongBench's metrics."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from types import MappingProxyType

from ...errors import KVStackError
from .sample import Question

__all__ = ["METRICS", "score"]

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
COMMENTS = ("`", "#", "//")


def score(metric: str, answer_text: str, question: Question) -> float:
    """Score the text that a model has generated as an answer, from 0 to 1, by a metric in `METRICS`.

    `share` counts how many of the answers stand in the text. All other metrics take the answers for alternatives, and
    the best counts.
    """
    if metric not in METRICS:
        raise KVStackError(f"{metric!r} is not a metric. Use one of {', '.join(METRICS)}.")
    text = answer_text.lstrip("\n").split("\n")[0] if question.one_line else answer_text
    scores = [METRICS[metric](text, answer, question.classes) for answer in question.answers]
    return sum(scores) / len(scores) if metric == "share" else max(scores)


def _stands_in(text: str, answer: str, _: Sequence[str]) -> float:
    return float(answer.lower() in text.lower())


def _f1(text: str, answer: str, _: Sequence[str]) -> float:
    """Of words, in any order, without case, punctuation and articles."""
    given, wanted = _plain_words(text), _plain_words(answer)
    same = sum((Counter(given) & Counter(wanted)).values())
    return 2 * same / (len(given) + len(wanted)) if same else 0.0


def _plain_words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _rouge_l(text: str, answer: str, _: Sequence[str]) -> float:
    """Lin 2004, as the package `rouge` computes it, which LongBench uses."""
    try:
        from rouge import Rouge
    except ImportError as error:
        raise KVStackError("summaries are scored by the package rouge. Run: pip install 'kvstack[bench]'") from error
    try:
        return Rouge(metrics=["rouge-l"]).get_scores(text, answer)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):  # an empty text, or a sentence of a thousand words: 0, as in LongBench
        return 0.0


def _classes(text: str, answer: str, classes: Sequence[str]) -> float:
    """1 for the right label, less when the text names others too; a label that is a part of the right one is none."""
    named = [label for label in classes if label in text and (label == answer or label not in answer)]
    return 1 / len(named) if answer in named else 0.0


def _retrieval(text: str, answer: str, _: Sequence[str]) -> float:
    """Share of the numbers in the text that are the wanted paragraph's."""
    return _count(text, "".join(re.findall(r"Paragraph (\d+)", answer)[:1]), ())


def _count(text: str, answer: str, _: Sequence[str]) -> float:
    """Share of the numbers in the text that are the wanted one."""
    given = re.findall(r"\d+", text)
    return given.count(answer) / len(given) if given else 0.0


def _edit(text: str, answer: str, _: Sequence[str]) -> float:
    """Likeness of the first line that is code, in hundredths, as fuzzywuzzy's `ratio` gives it without its C code."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in COMMENTS)), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: Mapping[str, Callable[[str, str, Sequence[str]], float]] = MappingProxyType(
    {
        "share": _stands_in,
        "f1": _f1,
        "rouge_l": _rouge_l,
        "classes": _classes,
        "retrieval": _retrieval,
        "count": _count,
        "edit": _edit,
    }
)
