"""A test that facts in a long text are still found: RULER's tasks, RULER's and LongBench's own files.

aware      text and question are one prompt, and the cache compresses both: it may look at the question
agnostic   the text is compressed before any question is seen; each question is then asked of a copy of the cache
turns      as agnostic, but the questions follow each other in one cache, its own answers between them
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import KVStackError
from .. import tasks, terminal
from ..results import Figures, Results
from ..tasks import Question, Sample
from . import sizes, texts, variants
from .run import Run, environment
from .subject import Subject, opened, prefill
from .variants import Variant

__all__ = ["CONTEXTS", "MODES", "STACKS", "TASKS", "Asking", "ask", "run", "shortened"]

Mode = Literal["aware", "agnostic", "turns"]
MODES: tuple[Mode, ...] = ("aware", "agnostic", "turns")
CONTEXTS = (1024,)
NO_TURNS = "it does not ask several questions in one cache."
TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue")
STACKS = (
    "evict:0.2",
    "evict:0.2,score=random",
    "quant:2",
    "commonkv+quant:2",
    "commonkv+quant:2+evict:0.2",
    "hqq:2",
    "kvpress:snapkv,keep=0.2",
    "kvpress:kvzip,keep=0.2",
)


@dataclass(frozen=True)
class Asking:
    """The questions, and the ways to ask them.

    Attributes:
        tasks: names of tasks, or of files in `folder`.
        modes: see above.
        samples: texts for each task.
        questions: for each text; more than one only in tasks that have several.
        answer_tokens: if answers are looked for in the generated text, at most this many new tokens for each of them,
            and no more than the task allows; other metrics get all that the task allows.
        folder: RULER's CONTEXT/TASK.jsonl files, or LongBench's TASK.jsonl files, in place of our own texts.
        longbench: True if `folder` holds LongBench's.
    """

    tasks: tuple[str, ...] = TASKS
    modes: tuple[Mode, ...] = ("aware", "agnostic")
    samples: int = 10
    questions: int = 1
    answer_tokens: int = 48
    folder: Path | None = None
    longbench: bool = False


def run(run: Run, asking: Asking) -> Iterator[Figures]:
    """Answers and scores at each context, for each task and mode."""
    unknown = [name for name in asking.tasks if asking.folder is None and name not in tasks.TASKS]
    if unknown:
        raise KVStackError(f"{unknown[0]!r} is not a task. Use one of {', '.join(tasks.TASKS)}.")
    with opened(run) as subject:
        subject.check(max(run.contexts))
        caches = [c for c in variants.parse(run.stacks) if c.label != variants.NOTHING]
        caches = variants.available(caches, subject.model)
        results = Results("needles", run.out, environment(run, subject.name, subject.identity))
        for context in run.contexts:
            for task in asking.tasks:
                samples = _samples(subject, run, asking, context, task)
                for mode in asking.modes:
                    able = variants.without_presses(caches, NO_TURNS) if mode == "turns" else caches
                    yield measure(subject, results, asking, context, samples, mode, able)


def _samples(subject: Subject, run: Run, asking: Asking, context: int, task: str) -> list[Sample]:
    if asking.folder is None:
        prose = texts.prose(run.texts)
        return tasks.make(task, context, asking.samples, run.seed, subject.count, prose, asking.questions)
    if asking.longbench:
        whole = tasks.longbench_files(asking.folder, task, asking.samples)
        return [shortened(subject, sample, context) for sample in whole]
    return tasks.ruler_files(asking.folder, context, task, asking.samples)


def shortened(subject: Subject, sample: Sample, length: int) -> Sample:
    """The sample with the middle of its text left out, so that text, question and answer fit into `length` tokens."""
    asked = max(subject.count(question.text) + question.new_tokens for question in sample.questions)
    room, ids = length - asked, subject.ids(sample.text)[0]
    if len(ids) <= room:
        return sample
    if room < 2:
        raise KVStackError(
            f"{sample.task}: question and answer take {asked} of {length} tokens. Use longer --contexts."
        )
    ends = (ids[: room // 2], ids[-(room // 2) :])
    return replace(sample, text="".join(subject.tokenizer.decode(part, skip_special_tokens=True) for part in ends))


def measure(
    subject: Subject,
    results: Results,
    asking: Asking,
    context: int,
    samples: Sequence[Sample],
    mode: Mode,
    caches: Sequence[Variant],
) -> Figures:
    """Ask every sample of every cache; figures of what was asked now or before."""
    keys, failed = [], set()
    with terminal.steps(f"{samples[0].task}, {mode}", len(samples) * len(caches)) as progress:
        for cache in caches:
            for sample in samples:
                key = {"context": context, "task": sample.task, "mode": mode, "sample": sample.index}
                key |= {"text": _digest(sample), "answer_tokens": asking.answer_tokens, **cache.key}
                keys.append(key)
                if cache.label in failed or results.get(**key) is not None:
                    progress.skip()
                    continue
                try:
                    results.add(ask(subject, cache, sample, mode, asking.answer_tokens), **key)
                except KVStackError as error:
                    failed.add(cache.label)
                    variants.skipped(cache.label, error)
                progress.step(cache.label)
    return results.figures(keys)


def _digest(sample: Sample) -> str:
    whole = [sample.text, *(question.text for question in sample.questions)]
    return hashlib.sha256("\0".join(whole).encode()).hexdigest()[:8]


def ask(subject: Subject, cache: Variant, sample: Sample, mode: Mode, answer_tokens: int) -> dict[str, Any]:
    """Figures of one sample in one cache: answers, scores, and the mean share of bytes held when they were given."""
    text = subject.ids(sample.text, first=True)
    told = list(_answers(subject, cache, text, sample, mode, answer_tokens))
    answers, held = [answer for answer, _ in told], [nbytes for _, nbytes in told]
    scores = [tasks.score(q.metric, answer, q) for q, answer in zip(sample.questions, answers, strict=True)]
    return {
        "kind": cache.kind,
        "family": cache.family,
        "depth": sample.depth,
        "score": sum(scores) / len(scores),
        "scores": scores,
        "answers": answers,
        **held[-1],
        "share": sum(nbytes["share"] for nbytes in held) / len(held),
    }


def _answers(
    subject: Subject, cache: Variant, text: Tensor, sample: Sample, mode: Mode, answer_tokens: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each answer, and figures of the bytes held when it was given."""
    if cache.press is not None:
        yield from _answers_of_peer(subject, cache, text, sample, mode, answer_tokens)
        return
    model = subject.model
    held = cache.cache(model)
    if mode != "aware":
        prefill(model, text, held)
    so_far = text
    for number, question in enumerate(sample.questions):
        if number and mode == "aware":
            held = cache.cache(model)
        last = number == len(sample.questions) - 1
        used = copy.deepcopy(held) if mode == "agnostic" and not last else held
        ids = torch.cat([so_far if mode == "turns" else text, subject.ids(question.text)], dim=1)
        answer = subject.answer(ids, used, _limit(question, answer_tokens))
        yield subject.words(answer[0]), sizes.of_bfloat16(used, model)
        so_far = torch.cat([ids, answer], dim=1)


def _limit(question: Question, answer_tokens: int) -> int:
    if question.metric != "share":
        return question.new_tokens
    return min(question.new_tokens, answer_tokens * len(question.answers))


def _answers_of_peer(
    subject: Subject, cache: Variant, text: Tensor, sample: Sample, mode: Mode, answer_tokens: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    assert subject.kvpress is not None and cache.press is not None  # noqa: PT018
    for question in sample.questions:
        asked, limit = subject.ids(question.text), _limit(question, answer_tokens)
        answer = subject.kvpress.answer(text, asked, limit, cache.press, blind=mode == "agnostic")
        yield subject.words(answer.ids), {"share": answer.share, "model_nbytes": 0, "break_even": 0}
