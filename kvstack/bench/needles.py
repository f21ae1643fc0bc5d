"""Needles: a number hidden in Python's documentation, asked for at the end of the prompt.

Every sample hides one sentence (or several, of which one is asked for) at a depth of its own. What counts is the share
of the answers that stand in what the model generates greedily. The task is RULER's single needle in a text haystack and
its multikey variant (Hsieh et al. 2024, arXiv 2404.06654), written anew with other words and texts; RULER's own files
can be read too.

With `blind` the text is compressed before the question is seen, as when a document is read once and asked about later.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache

from ..errors import KVStackError
from . import common
from .common import Run, Subject, Variant
from .texts import documentation

__all__ = ["CONTEXTS", "RULER", "STACKS", "measure", "run"]

CONTEXTS = (1024,)
RULER = ("niah_single_2", "niah_multikey_1", "niah_multivalue")
STACKS = (
    "evict:0.2",
    "quant:2",
    "quant:4+evict:0.2",
    "commonkv+quant:2",
    "commonkv+quant:2+evict:0.2",
    "evict:0.2,score=streaming",
    "evict:0.2,score=random",
)
WORDS = ("harbor", "violin", "glacier", "lantern", "meadow", "compass", "orchard", "thimble", "walnut", "saddle")
TOKENS_PER_ANSWER = 12
QUESTIONS = ("\nWhat", "\nQuestion")
"""What the question of a RULER task begins with."""


@dataclass(frozen=True)
class Sample:
    text: Tensor  # (1, T)
    question: Tensor  # (1, Q)
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """Share of the answers that the model gave with one cache."""

    context: int
    task: str
    blind: bool
    variant: str
    found: float
    samples: int
    share: float
    """Bytes held after the prompt and the answer, as a share of a bfloat16 dense cache's."""


def run(run: Run, count: int, keys: int, blind: bool, tasks: Path | None, names: Sequence[str]) -> None:
    variants = common.chosen(run)
    with common.opened(run) as subject:
        for context in run.contexts:
            if tasks is None:
                own = [_sample(subject, context, keys, run.seed * 10_000 + number) for number in range(count)]
                data = {f"{keys} needles": own}
            else:
                data = {name: _read(subject, tasks / str(context) / f"{name}.jsonl", count) for name in names}
            for task, samples in data.items():
                found = measure(subject, samples, variants, context, task, blind)
                _show(f"{task}, {context:,} tokens: {subject.name}, {run.dtype}", found)
                common.write("needles", run, subject.name, [asdict(row) for row in found])


def measure(
    subject: Subject, samples: Sequence[Sample], variants: Sequence[Variant], context: int, task: str, blind: bool
) -> list[Found]:
    """Ask every sample of every variant."""
    rows = []
    for variant in variants:
        score, share = 0.0, 0.0
        with common.progress(f"{task}, {variant.label}: {len(samples)} questions"):
            for sample in samples:
                cache = variant.make(subject.model)
                answer = _answer(subject, sample, cache, blind).lower()
                score += sum(wanted.lower() in answer for wanted in sample.answers) / len(sample.answers)
                share += common.share_of_bfloat16(cache, subject.model)
        n = len(samples)
        rows.append(Found(context, task, blind, variant.label, score / n, n, share / n))
    return rows


def _read(subject: Subject, path: Path, count: int) -> list[Sample]:
    """The first `count` samples of a RULER file: a JSON object a line with `input` and `outputs`."""
    if subject.tokenizer is None:
        raise KVStackError("--tasks needs a model with a tokenizer. Leave --tiny out.")
    if not path.is_file():
        raise KVStackError(f"{path} is no file. --tasks names a folder with one CONTEXT/TASK.jsonl per task.")
    samples = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        entry = json.loads(line)
        cut = max(entry["input"].rfind(mark) for mark in QUESTIONS)
        if cut < 0:
            raise KVStackError(f"{path}: no question found in a sample: it begins with one of {QUESTIONS}.")
        text, question = _encode(subject, entry["input"][:cut]), _encode(subject, entry["input"][cut:])
        samples.append(Sample(text[None], question[None], tuple(entry["outputs"])))
    return samples


def _sample(subject: Subject, length: int, keys: int, seed: int) -> Sample:
    draw = random.Random(seed)
    words = draw.sample(WORDS, keys)
    numbers = [str(draw.randrange(1_000_000, 10_000_000)) for _ in words]
    if subject.tokenizer is None:  # a random model finds nothing, whatever it is asked
        ids = subject.random(length, seed)
        return Sample(ids[:, :-8], ids[:, -8:], (numbers[0],))
    text = documentation()
    hay = text[draw.randrange(len(text) // 2) :]
    filler = subject.encode(hay, length)[0]
    depths = sorted(draw.random() for _ in words)
    facts = [
        _encode(subject, f"\nThe special number of the {w} is {n}.\n") for w, n in zip(words, numbers, strict=True)
    ]
    question = _encode(
        subject, f"\n\nWhat is the special number of the {words[0]}? The special number of the {words[0]} is"
    )
    filler = filler[: length - len(question) - sum(map(len, facts))]
    pieces, last = [], 0
    for depth, fact in zip(depths, draw.sample(facts, len(facts)), strict=True):
        place = int(depth * len(filler))
        pieces += [filler[last:place], fact]
        last = place
    return Sample(torch.cat([*pieces, filler[last:]])[None], question[None], (numbers[0],))


def _encode(subject: Subject, text: str) -> Tensor:
    assert subject.tokenizer is not None
    ids: Tensor = subject.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return ids


def _answer(subject: Subject, sample: Sample, cache: Cache, blind: bool) -> str:
    model = subject.model
    ids = torch.cat([sample.text, sample.question], dim=1).to(model.device)
    if blind:
        common.prefill(model, sample.text.to(model.device), cache)
    mask = torch.ones_like(ids)
    new_tokens = TOKENS_PER_ANSWER * len(sample.answers)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False)
    new = out[0, ids.shape[1] :]
    return str(new.tolist()) if subject.tokenizer is None else str(subject.tokenizer.decode(new))


def _show(title: str, found: Sequence[Found]) -> None:
    rows = [[row.variant, f"{row.found:.2f}", f"{row.share:.2%}"] for row in found]
    when = "the text compressed before the question is seen" if found[0].blind else "the question inside the prompt"
    caption = f"share of the answers to {found[0].samples} questions, {when}"
    common.table(title, ("cache", "found", "bytes of a bf16 cache"), rows, caption)
