"""Time to the first token of a question about a text that was read before: on a fork, on a copy, and by reading again.

    read again    a new stack reads the text and the question
    copy          `copy.deepcopy` of the stack that has read the text, then the question
    fork          `fork()` of it, then the question

The three take turns. Bytes are what branches add to the stack that has read the text, all of them held at once.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ... import KVStack, nbytes_of
from .. import terminal
from ..results import Figures, Results
from . import subject, variants
from .run import Run, environment
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "measure", "run"]

CONTEXTS = (1024, 4096)
STACKS = ("quant:4@block=256", "quant:4", "commonkv+quant:2+evict:0.2", "evict:0.2")
QUESTION = 32
"""Tokens of a question."""
BRANCHES = 4
"""Held at the same time when bytes are counted."""


def run(run: Run, rounds: int) -> Iterator[Figures]:
    """Figures of each stack at each context; times are medians of `rounds`."""
    with subject.opened(run) as opened:
        opened.check(max(run.contexts) + QUESTION)
        caches = [each for each in variants.parse(run.stacks) if each.kind == "kvstack"]
        results = Results("fork", run.out, environment(run, opened.name, opened.identity))
        for context in run.contexts:
            keys = [{"context": context, **cache.key, "rounds": rounds} for cache in caches]
            with terminal.steps(f"forks at {context:,}", len(caches)) as progress:
                for cache, key in zip(caches, keys, strict=True):
                    if results.get(**key) is None:
                        results.add(measure(opened.model, opened.tokens(context + QUESTION), cache, rounds), **key)
                    progress.step(cache.label)
            yield results.figures(keys)


def measure(model: PreTrainedModel, ids: Tensor, cache: Variant, rounds: int) -> dict[str, Any]:
    """Ask the last tokens of `ids` (1, T) about those before: milliseconds to the first token, and bytes."""
    ids = ids.to(model.device)
    text, question = ids[:, :-QUESTION], ids[:, -QUESTION:]
    stack = cache.cache(model)
    assert isinstance(stack, KVStack)
    subject.prefill(model, text, stack)

    def again() -> None:
        new = cache.cache(model)
        subject.prefill(model, text, new)
        subject.prefill(model, question, new)

    ways: dict[str, Callable[[], Any]] = {
        "again": again,
        "copy": lambda: subject.prefill(model, question, copy.deepcopy(stack)),
        "fork": lambda: subject.prefill(model, question, stack.fork()),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, act in ways.items():
            start = time.perf_counter()
            act()
            subject.wait(model)
            times[way].append((time.perf_counter() - start) * 1e3)
    branches = [stack.fork() for _ in range(BRANCHES)]
    forked = nbytes_of([stack, *branches]) - stack.nbytes
    for branch in branches:
        subject.prefill(model, question, branch)
    return {
        **{f"ms_{way}": statistics.median(each) for way, each in times.items()},
        "question": QUESTION,
        "nbytes": stack.nbytes,
        "nbytes_forked": forked / BRANCHES,
        "nbytes_asked": (nbytes_of([stack, *branches]) - stack.nbytes) / BRANCHES,
    }
