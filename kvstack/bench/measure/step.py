"""The time of a decoded token in a stack, part by part.

    model      everything outside of kvstack: products with weights, norms, the token's own rotation
    hooks      finding the running layer, its mask and its positions
    storing    the new token goes behind the raw ones, and attention gets a promise of all
    scores     the query and the keys
    values     the attention weights and the values
    softmax    what is between and around these two
    settling   eviction and sealing; most steps have none

Functions of kvstack are timed while they run, each less those that it calls. That costs time itself, so the parts say
where to look, and `kvstack bench decode` says how fast a stack is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ... import KVStack
from ...attend import Attention
from ...batch import Batch
from ...promise import Promises
from ...store.sealed import GroupLatents, LayerCodes
from ...store.store import Store
from .. import terminal
from ..results import Figures, Results
from . import subject, variants
from .run import Run, environment
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "PARTS", "STACKS", "measure", "run"]

CONTEXTS = (1024, 4096)
STACKS = ("empty", "quant:4", "commonkv:0.65+quant:2", "commonkv+quant:2+evict:0.2")
PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "hooks": ((Attention, "enter"), (Attention, "attention"), (Attention, "leave")),
    "storing": ((Attention, "update"), (Store, "append"), (Promises, "make")),
    "scores": ((LayerCodes, "logits"), (GroupLatents, "logits")),
    "values": ((LayerCodes, "output"), (GroupLatents, "output")),
    "softmax": ((Store, "attend"),),
    "settling": ((Batch, "settle"),),
}
WARM_UP = 3


def run(run: Run, steps: int) -> Iterator[Figures]:
    """Milliseconds of the parts of a step at each context, the mean of `steps`."""
    with subject.opened(run) as opened:
        opened.check(max(run.contexts) + WARM_UP + steps)
        caches = [each for each in variants.parse(run.stacks) if each.kind == "kvstack"]
        results = Results("step", run.out, environment(run, opened.name, opened.identity))
        for context in run.contexts:
            keys = [{"context": context, **cache.key, "steps": steps} for cache in caches]
            with terminal.steps(f"steps at {context:,}", len(caches)) as progress:
                for cache, key in zip(caches, keys, strict=True):
                    if results.get(**key) is None:
                        results.add(measure(opened.model, opened.tokens(context), cache, steps), **key)
                    progress.step(cache.label)
            yield results.figures(keys)


def measure(model: PreTrainedModel, ids: Tensor, cache: Variant, steps: int) -> dict[str, Any]:
    """Decode `steps` tokens behind `ids` (1, T); milliseconds a step of each part, and how often a step calls it."""
    stack = cache.cache(model)
    assert isinstance(stack, KVStack)
    token = subject.prefill(model, ids.to(model.device), stack)
    for _ in range(WARM_UP):
        token = subject.step(model, token, stack)
    with _timed() as (seconds, calls):
        start = time.perf_counter()
        for _ in range(steps):
            token = subject.step(model, token, stack)
        subject.wait(model)
        whole = time.perf_counter() - start
    parts = {part: seconds[part] / steps * 1e3 for part in PARTS}
    model_ms = whole / steps * 1e3 - sum(parts.values())
    return {
        "ms": whole / steps * 1e3,
        "parts": {"model": model_ms, **parts},
        "calls": {part: calls[part] / steps for part in PARTS},
    }


@contextmanager
def _timed() -> Iterator[tuple[dict[str, float], Counter[str]]]:
    """Time the functions of all parts, each less what it calls: seconds and calls by part."""
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    calls: Counter[str] = Counter()
    inner: list[float] = []  # seconds of what the running functions have called so far

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                passed = time.perf_counter() - start
                seconds[part] += passed - inner.pop()
                calls[part] += 1
                if inner:
                    inner[-1] += passed

        return call

    plain: Sequence[tuple[type, str, Any]] = [
        (owner, name, vars(owner)[name]) for functions in PARTS.values() for owner, name in functions
    ]
    try:
        for part, functions in PARTS.items():
            for owner, name in functions:
                setattr(owner, name, timed(part, vars(owner)[name]))
        yield seconds, calls
    finally:
        for owner, name, function in plain:
            setattr(owner, name, function)
