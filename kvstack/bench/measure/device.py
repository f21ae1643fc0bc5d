"""The cost of stacks on a device, and a check that its fast readers are right there: one table for a report.

Times and peaks are those of decode.py. `differs` compares a stack with one that is read in plain torch, `fused=False`,
with the same tokens and weights in float32: the largest difference of a logit, as a share of the largest logit. Readers
that rebuild only some keys (CommonKV, KVTC, XKV) differ by what that changes, too; all others by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import KVStack
from ..results import Figures, Results
from . import subject, variants
from .decode import measure
from .run import Run, environment
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "run"]

CONTEXTS = (1024, 7936)
STACKS = ("empty", "evict:0.2", "quant:8", "quant:4", "quant:2", "commonkv:0.65+quant:2", "commonkv+quant:2+evict:0.2")
COMPARED = 8
"""Tokens decoded by both: few, since a number that is sealed meanwhile may get another code."""


def run(run: Run, shape: str | None, rounds: int, steps: int, burst: int) -> Iterator[Figures]:
    """Figures at each context, of all caches, with a model of the run or a random one of a `shape`."""
    with subject.opened(run, shape) as opened:
        opened.check(max(run.contexts) + steps + burst)
        caches = variants.available(variants.parse(run.stacks), opened.model, caches_only=True)
        settings = {"rounds": rounds, "steps": steps, "burst": burst, "in_turns": [cache.label for cache in caches]}
        results = Results("device", run.out, environment(run, opened.name, opened.identity))
        for context in run.contexts:
            keys = [{"context": context, **cache.key, **settings} for cache in caches]
            if any(results.get(**key) is None for key in keys):
                ids = opened.tokens(context)
                timed = measure(opened.model, ids, caches, rounds, steps, burst)
                for key, cache, figures in zip(keys, caches, timed, strict=True):
                    results.add(figures | {"differs": differs(opened.model, ids, cache)}, **key)
            yield results.figures(keys)


def differs(model: PreTrainedModel, ids: Tensor, cache: Variant) -> float | None:
    """Return the distance of the logits of tokens behind `ids` (1, T) from those of the same stack in plain torch; None
    if nothing is read in another way, or the device is too small for float32."""
    if cache.kind != "kvstack" or not cache.stages:
        return None
    plain = variants.parse([cache.label + ("," if "@" in cache.label else "@") + "fused=False"])[-1]
    dtype = model.dtype
    try:
        # halves would differ by their own rounding, which is more than a wrong reader need be
        model.float()
        return _differs(model, ids, cache, plain)
    except torch.OutOfMemoryError:
        return None
    finally:
        model.to(dtype)


def _differs(model: PreTrainedModel, ids: Tensor, cache: Variant, plain: Variant) -> float | None:
    fast, slow = cache.cache(model), plain.cache(model)
    assert isinstance(fast, KVStack)
    if not fast.report().reads_with:
        return None
    token = subject.prefill(model, ids, fast)
    subject.prefill(model, ids, slow)
    most = 0.0
    for _ in range(COMPARED):
        found, expected = (model(input_ids=token, past_key_values=each, use_cache=True).logits for each in (fast, slow))
        most = max(most, float((found - expected).abs().max() / expected.abs().max()))
        token = torch.as_tensor(expected[:, -1:].argmax(-1))
    return most
