"""Perplexity of one long text, also beyond the longest text that its model was made for.

The text is fed in order, some tokens at a time, and the model predicts each token from what the cache holds. The
figures of a length are those of the tokens between the length before it and this one.

    NLL          mean negative log likelihood of the true next token, in nats; perplexity is its exponential
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import terminal
from ..results import Figures, Results
from . import sizes, texts, variants
from .length import at_lengths, tokens_held
from .run import Run, environment
from .subject import opened
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "measure", "run"]

CONTEXTS = (4096, 8192, 12288, 16384)
STACKS = ("evict:1024,score=streaming", "evict:1024,score=streaming,positions=cache")


def run(run: Run, feed: int) -> Iterator[Figures]:
    """Figures of each cache for all parts of a text; `feed` tokens are fed at once."""
    lengths = sorted(run.contexts)
    with opened(run) as subject:
        caches = variants.available(variants.parse(run.stacks), subject.model, caches_only=True)
        results = Results("beyond", run.out, environment(run, subject.name, subject.identity))
        settings = {"feed": feed, "lengths": lengths}
        (piece,) = texts.windows(texts.prose(run.texts), 1, 8 * lengths[-1], run.seed)
        ids = subject.encode(piece, lengths[-1] + 1)

        def read(cache: Variant) -> Iterator[dict[str, Any]]:
            return measure(subject.model, ids, cache, lengths, feed)

        with terminal.steps("parts of a text", len(caches) * len(lengths)) as progress:
            yield from at_lengths(results, caches, settings, progress, "to", read)


def measure(
    model: PreTrainedModel, ids: Tensor, cache: Variant, lengths: Sequence[int], feed: int
) -> Iterator[dict[str, Any]]:
    """Predict each of `ids` (1, T) but the first, `feed` at a time, up to each of the `lengths`."""
    held, ids, seen = cache.cache(model), ids.to(model.device), 0
    for length in lengths:
        losses: list[float] = []
        while seen < length:
            some = min(feed, length - seen)
            logits = model(input_ids=ids[:, seen : seen + some], past_key_values=held, use_cache=True).logits[0]
            targets = ids[0, seen + 1 : seen + some + 1]
            losses += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").tolist()
            seen += some
        nll = mean(losses)
        yield {
            "scored": len(losses),
            "nll": nll,
            "perplexity": math.exp(nll),
            "held": tokens_held(held),
            "nbytes": sizes.held_bytes(held),
        }
