"""Needles: a number hidden in Python's documentation, asked for at the end of the prompt.

Every sample hides one sentence (or several, of which one is asked for) at a depth of its own. A sample counts as found
where the number stands in what the model generates greedily. The task is RULER's single needle in a text haystack and
its multikey variant (Hsieh et al. 2024, arXiv 2404.06654), written anew with other words and texts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import common
from .common import Run, Subject, Variant
from .texts import documentation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "measure", "run"]

CONTEXTS = (1024,)
STACKS = ("evict:0.2", "quant:2", "quant:4+evict:0.2", "evict:0.2,score=streaming", "evict:0.2,score=random")
WORDS = ("harbor", "violin", "glacier", "lantern", "meadow", "compass", "orchard", "thimble", "walnut", "saddle")
NEW_TOKENS = 12


@dataclass(frozen=True)
class Sample:
    ids: Tensor  # (1, T)
    answer: str


@dataclass(frozen=True)
class Found:
    """Share of the samples whose number one cache's model named."""

    context: int
    variant: str
    keys: int
    found: float
    samples: int
    share: float
    """Bytes held after the prompt and the answer, of the dense cache's."""


def run(run: Run, count: int, keys: int) -> None:
    variants = common.chosen(run)
    with common.opened(run) as subject:
        for context in run.contexts:
            samples = [_sample(subject, context, keys, run.seed * 10_000 + number) for number in range(count)]
            found = measure(subject, samples, variants, context, keys)
            _show(f"{keys} needles in {context:,} tokens: {subject.name}, {run.dtype}", found)
            common.write("needles", run, subject.name, [asdict(row) for row in found])


def measure(
    subject: Subject, samples: Sequence[Sample], variants: Sequence[Variant], context: int, keys: int
) -> list[Found]:
    """Ask every sample of every variant; the first variant must be dense."""
    rows, dense = [], 0
    for variant in variants:
        hits, held = 0, 0
        with common.progress(f"{variant.label}: {len(samples)} questions"):
            for sample in samples:
                cache = variant.make(subject.model)
                hits += sample.answer in _answer(subject, subject.model, sample, cache)
                held += common.held_bytes(cache)
        dense = dense or held
        rows.append(Found(context, variant.label, keys, hits / len(samples), len(samples), held / dense))
    return rows


def _sample(subject: Subject, length: int, keys: int, seed: int) -> Sample:
    draw = random.Random(seed)
    words = draw.sample(WORDS, keys)
    numbers = [str(draw.randrange(1_000_000, 10_000_000)) for _ in words]
    if subject.tokenizer is None:  # a random model finds nothing, whatever it is asked
        return Sample(subject.random(length, seed), numbers[0])
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
    return Sample(torch.cat([*pieces, filler[last:], question])[None], numbers[0])


def _encode(subject: Subject, text: str) -> Tensor:
    assert subject.tokenizer is not None
    ids: Tensor = subject.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return ids


def _answer(subject: Subject, model: PreTrainedModel, sample: Sample, cache: object) -> str:
    ids = sample.ids.to(model.device)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = out[0, ids.shape[1] :]
    return str(new.tolist()) if subject.tokenizer is None else str(subject.tokenizer.decode(new))


def _show(title: str, found: Sequence[Found]) -> None:
    rows = [[row.variant, f"{row.found:.2f}", f"{row.share:.1%}"] for row in found]
    caption = f"share of {found[0].samples} samples, the question inside the prompt"
    common.table(title, ("cache", "found", "bytes of dense"), rows, caption)
