"""Answers to the questions of a file in kvpress' columns, from every cache, and kvpress' scores of them.

As kvpress' pipeline does it: the context is read once, as the beginning of a user's turn where the model has a chat
template, and compressed before any question is seen. Each question follows in a copy of the cache, with what ends the
turn and `answer_prefix`, and the answer is generated greedily. With `aware` the question is a part of the context.

Unlike kvpress' presses, a stack also compresses what is generated, and its bytes are counted, not claimed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import KVStackError
from .. import terminal
from ..results import Figures, Results
from ..tasks import DATASETS, Asked, answer_files
from . import sizes, variants
from .run import Run, environment
from .subject import Subject, opened, prefill
from .variants import Variant

__all__ = ["STACKS", "Asking", "run"]

STACKS = ("quant:4", "commonkv:0.65+quant:2", "evict:0.2", "kvpress:snapkv,keep=0.2")
SUFFIX = "\n"
"""The text between question and answer, if there is no chat template."""


@dataclass(frozen=True)
class Asking:
    """Questions, and how they are asked.

    Attributes:
        file: a Parquet file or JSON lines.
        dataset: the way to score it, a name in `tasks.DATASETS`.
        samples: the first rows of the file; None: all.
        aware: True if the question is compressed with the context.
        new_tokens: in place of each row's own number.
        context_length: the first tokens of each context that are read; None: all.
    """

    file: Path
    dataset: str = "match"
    samples: int | None = None
    aware: bool = False
    new_tokens: int | None = None
    context_length: int | None = None


def run(run: Run, asking: Asking) -> tuple[Figures, list[Asked], int]:
    """Figures of every cache and row, the rows in their order, and how many the file has.

    Raises:
        KVStackError: the file cannot be read or scored, or a context is longer than the model reads.
    """
    if asking.dataset not in DATASETS:
        raise KVStackError(f"{asking.dataset!r} cannot be scored. Use one of {', '.join(DATASETS)}.")
    rows, whole = answer_files(asking.file, asking.samples)
    for row in rows:  # what cannot be scored is said before hours of answers
        DATASETS[asking.dataset].score("", row)
    with opened(run) as subject:
        asked = [_ids(subject, row, asking) for row in rows]
        _check(subject, asking, rows, asked)
        caches = [c for c in variants.parse(run.stacks) if c.label != variants.NOTHING]
        caches = variants.available(caches, subject.model)
        results = Results("answers", run.out, environment(run, subject.name, subject.identity))
        return _measure(subject, results, asking, rows, asked, caches), rows, whole


def _measure(
    subject: Subject,
    results: Results,
    asking: Asking,
    rows: Sequence[Asked],
    asked: Sequence[tuple[Tensor, Tensor]],
    caches: Sequence[Variant],
) -> Figures:
    keys, failed = list[dict[str, Any]](), set[str]()
    with terminal.steps(f"answers, {asking.dataset}", len(rows) * len(caches)) as progress:
        for cache in caches:
            mine = [_key(cache, asking, number, *ids) for number, ids in enumerate(asked)]
            keys += mine
            for group in _same_context(asked):
                todo = [number for number in group if results.get(**mine[number]) is None]
                progress.skip(len(group) - len(todo))
                if not todo or cache.label in failed:
                    continue
                try:
                    told = list(
                        _answers(subject, cache, [asked[n] for n in todo], [_limit(rows[n], asking) for n in todo])
                    )
                except KVStackError as error:
                    failed.add(cache.label)
                    variants.skipped(cache.label, error)
                    continue
                for number, (text, held) in zip(todo, told, strict=True):
                    score = DATASETS[asking.dataset].score(text, rows[number])
                    labels = {"kind": cache.kind, "family": cache.family, "task": rows[number].task}
                    results.add({**labels, "answer": text, "score": score, **held}, **mine[number])
                    progress.step(cache.label)
    return results.figures([key for key in keys if key["cache"] not in failed])


def _key(cache: Variant, asking: Asking, number: int, context: Tensor, question: Tensor) -> dict[str, Any]:
    """The key of a result: it names a question by its tokens."""
    text = hashlib.sha256(context.numpy().tobytes() + b"?" + question.numpy().tobytes()).hexdigest()[:16]
    return {"dataset": asking.dataset, "sample": number, "text": text, "new_tokens": asking.new_tokens, **cache.key}


def _same_context(asked: Sequence[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Numbers of the rows that ask about one context."""
    groups: dict[bytes, list[int]] = {}
    for number, (context, _) in enumerate(asked):
        groups.setdefault(context.numpy().tobytes(), []).append(number)
    return list(groups.values())


def _limit(row: Asked, asking: Asking) -> int:
    return asking.new_tokens or row.new_tokens


def _ids(subject: Subject, row: Asked, asking: Asking) -> tuple[Tensor, Tensor]:
    """Token ids of context and question, (1, T) and (1, Q)."""
    context = row.context + row.question if asking.aware else row.context
    question = "" if asking.aware else row.question
    before, suffix = _turn(subject.tokenizer, context)
    asked = subject.ids(question + suffix + row.answer_prefix)
    return subject.ids(before)[:, : asking.context_length], asked


def _turn(tokenizer: Any, context: str) -> tuple[str, str]:
    """The text up to the end of the context, and what ends the turn behind the question."""
    if not getattr(tokenizer, "chat_template", None):
        return (getattr(tokenizer, "bos_token", None) or "") + context, SUFFIX
    mark = "#" * (len(context) + 10)
    turn = [{"role": "user", "content": context + mark}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    before, _, suffix = text.partition(mark)
    return before, suffix


def _check(subject: Subject, asking: Asking, rows: Sequence[Asked], asked: Sequence[tuple[Tensor, Tensor]]) -> None:
    needed = [
        context.shape[1] + question.shape[1] + _limit(row, asking)
        for row, (context, question) in zip(rows, asked, strict=True)
    ]
    longest = getattr(subject.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and max(needed) > longest:
        number = needed.index(max(needed))
        rest = needed[number] - asked[number][0].shape[1]
        raise KVStackError(
            f"row {number} takes {needed[number]:,} tokens with its answer, and {subject.name} reads {longest:,}. "
            f"Use --max-context-length {longest - rest}, which cuts contexts as kvpress does, or another model."
        )


def _answers(
    subject: Subject, cache: Variant, asked: Sequence[tuple[Tensor, Tensor]], limits: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each answer to questions about one context, and figures of the bytes held when it was given."""
    context = asked[0][0]
    if cache.press is not None:
        assert subject.kvpress is not None  # it is available, or the cache would have been left out
        for (_, question), limit in zip(asked, limits, strict=True):
            told = subject.kvpress.answer(context, question, limit, cache.press, blind=True)
            yield subject.words(told.ids), {"share": told.share, "model_nbytes": 0, "break_even": 0}
        return
    held = cache.cache(subject.model)
    prefill(subject.model, context, held)
    for number, ((_, question), limit) in enumerate(zip(asked, limits, strict=True), 1):
        used = held if number == len(asked) else copy.deepcopy(held)
        answer = subject.answer(torch.cat([context, question], dim=1), used, limit)
        yield subject.words(answer[0]), sizes.of_bfloat16(used, subject.model)
