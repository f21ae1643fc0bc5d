"""The cost of a token in longer and longer texts: time, and bytes held.

One text grows under each stack. At every length some tokens are decoded one by one; then the text goes on. A random
model with few layers stands for any other: what grows with the text is attention and what a stack does, and both are
the same in every layer. `us_held` is a decoded token's time divided by the tokens held: where it stays the same or
falls, cost is linear.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache

from ... import KVStack
from .. import terminal
from ..results import Figures, Results
from . import sizes, subject, variants
from .run import Run, environment
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "at_lengths", "measure", "run", "tokens_held"]

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
STACKS = ("empty", "quant:4", "quant:2", "quant:2+evict:0.2")
SHAPE = "small"
CHUNK = 1024
"""Tokens of a text that are read at once."""


def run(run: Run, steps: int) -> Iterator[Figures]:
    """Figures of each cache at all lengths; `steps` tokens are decoded at each."""
    lengths = sorted(run.contexts)
    with subject.opened(run, SHAPE) as opened:
        opened.check(lengths[-1] + steps)
        caches = variants.available(variants.parse(run.stacks), opened.model, caches_only=True)
        results = Results("length", run.out, environment(run, opened.name, opened.identity))
        settings = {"steps": steps, "lengths": lengths}

        def read(cache: Variant) -> Iterator[dict[str, Any]]:
            return measure(opened.model, opened.tokens(lengths[-1] + steps), cache, lengths, steps)

        with terminal.steps("lengths", len(caches) * len(lengths)) as progress:
            yield from at_lengths(results, caches, settings, progress, "at", read)


def at_lengths(
    results: Results,
    caches: Iterable[Variant],
    settings: Mapping[str, Any],
    progress: terminal.Steps,
    word: str,
    read: Callable[[Variant], Iterator[dict[str, Any]]],
) -> Iterator[Figures]:
    """Figures of each cache at all `lengths` of the settings, as `read(cache)` yields them. A cache reads one text for
    all of them, so figures of an earlier run count only if all are there. `word`: between a cache and a length, in what
    is shown meanwhile."""
    for cache in caches:
        keys = [{"context": length, **cache.key, **settings} for length in settings["lengths"]]
        if any(results.get(**key) is None for key in keys):
            for key, figures in zip(keys, read(cache), strict=True):
                results.add({"kind": cache.kind, **figures}, **key)
                progress.step(f"{cache.label} {word} {key['context']:,}")
        else:
            progress.skip(len(keys))
        yield results.figures(keys)


def measure(
    model: PreTrainedModel, ids: Tensor, cache: Variant, lengths: list[int], steps: int
) -> Iterator[dict[str, Any]]:
    """Read `ids` (1, T) up to each of the `lengths` and decode `steps` tokens there."""
    held, ids, seen = cache.cache(model), ids.to(model.device), 0
    for length in lengths:
        start = time.perf_counter()
        token, before = None, seen
        while seen < length:
            some = min(CHUNK, length - seen)
            token = subject.prefill(model, ids[:, seen : seen + some], held)
            seen += some
        subject.wait(model)
        reading = time.perf_counter() - start
        assert token is not None
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            token = subject.step(model, token, held)
            subject.wait(model)
            times.append(time.perf_counter() - start)
        seen += steps
        tokens = tokens_held(held)
        yield {
            "ms_typical": statistics.median(times) * 1e3,
            "ms_mean": statistics.mean(times) * 1e3,
            "ms_most": max(times) * 1e3,
            "us_held": statistics.mean(times) / tokens * 1e6,
            "ms_read": reading / (length - before) * 1e3,
            "held": tokens,
            "nbytes": sizes.held_bytes(held),
            **sizes.fitted(held),
        }


def tokens_held(cache: Cache) -> int:
    """Tokens that a cache holds in each layer."""
    return cache.held if isinstance(cache, KVStack) else int(cache.get_seq_length())
