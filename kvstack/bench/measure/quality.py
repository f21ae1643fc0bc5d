"""The drift of the next tokens when a text was read from a compressed cache.

A window of text is parted in two. The first part is prefilled and the cache compresses it; the second is then fed
in one forward, with the true tokens, and its logits are compared with those that the dense cache gives. So all
tokens that are scored read the same compressed text, and none of them is compressed itself. With `feed` they come a
few at a time, as in decoding: they are compressed themselves when they leave the window, and with 1 the cache is read
the way a single query reads it.

    KL           mean Kullback-Leibler divergence of the model on this cache from the model on a dense one, in nats;
                 0 is no drift at all
    q99          its 99 % quantile over the tokens
    top-1        share of tokens whose likeliest successor is the same
    NLL          mean negative log likelihood of the true next token, in nats; that of `nothing`, which reads the
                 second part alone, says what the context is worth
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import KVStackError
from .. import terminal
from ..results import Figures, Results
from . import sizes, texts, variants
from .run import Run, environment
from .subject import Subject, opened, prefill
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "Reading", "compare", "read", "run", "windows_of"]

CONTEXTS = (1024,)
STACKS = (
    "nothing",
    "evict:0.2,score=random",
    "quant:8",
    "quant:4",
    "quant:2",
    "evict:0.5",
    "evict:0.2",
    "evict:0.5,score=kvzap(window=32),budgets=heads",
    "evict:0.2,score=kvzap(window=32),budgets=heads",
    "quant:4+evict:0.5",
    "quant:4+evict:0.2,score=kvzap(window=32),budgets=heads",
    "quant:2+evict:0.2",
    "commonkv:0.5",
    "commonkv:0.5+quant:2",
    "commonkv:0.3,basis=weights,layers=5",
    "commonkv:0.3,basis=weights,layers=5,merge=mean",
    "hqq:4,group=16",
    "hqq:4",
    "hqq:2,group=16",
    "hqq:2",
    "quanto:4",
    "quanto:2",
    "kvpress:snapkv,keep=0.5",
    "kvpress:snapkv,keep=0.2",
    "kvpress:expected,keep=0.5",
    "kvpress:keydiff,keep=0.5",
    "kvpress:kvzip,keep=0.5",
)


@dataclass(frozen=True)
class Reading:
    """The result of one cache on one window."""

    log_probs: Tensor  # (scored, vocabulary), float32
    share: float
    """Bytes held while the tokens were scored, as a share of a bfloat16 dense cache's."""
    simulated: bool = False
    """True if the bytes are those that the method claims, not those that are held."""
    model_nbytes: int = 0
    """Bytes that were fitted to the model and serve all its caches."""
    break_even: int | None = 0
    """From how many tokens on they are saved too (`sizes.of_bfloat16`)."""


def run(run: Run, windows: int, score: int, feed: int | None = None) -> Iterator[Figures]:
    """The drift after each context, of all caches and windows."""
    with opened(run) as subject:
        subject.check(max(run.contexts) + score)
        caches = variants.available(variants.parse(run.stacks), subject.model)
        if feed:
            caches = variants.without_presses(caches, "it reads all tokens at once.")
        results = Results("quality", run.out, environment(run, subject.name, subject.identity))
        for context in run.contexts:
            yield measure(subject, results, run, context, caches, windows, score, feed)


def measure(
    subject: Subject,
    results: Results,
    run: Run,
    context: int,
    caches: Sequence[Variant],
    windows: int,
    score: int,
    feed: int | None = None,
) -> Figures:
    """Score what follows the first `context` tokens of every window; figures of what was measured now or before."""
    data = windows_of(subject, run, context + score + 1, windows)
    keys, failed = [], set()
    with terminal.steps(f"quality at {context:,}", len(data) * len(caches)) as progress:
        for (domain, number), ids in data.items():
            place = {"context": context, "score": score, "feed": feed, "domain": domain, "window": number}
            place["text"] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8]
            keys += [{**place, **cache.key} for cache in caches]
            todo = [c for c in caches if c.label not in failed and results.get(**place, **c.key) is None]
            progress.skip(len(caches) - len(todo))
            reference = read(subject, caches[0], ids, context, feed) if todo else None
            for cache in todo:
                assert reference is not None
                try:
                    reading = reference if cache is caches[0] else read(subject, cache, ids, context, feed)
                except KVStackError as error:
                    failed.add(cache.label)
                    variants.skipped(cache.label, error)
                else:
                    labels = {"kind": cache.kind, "family": cache.family}
                    figures = compare(reading, reference.log_probs, ids[0, context + 1 :])
                    results.add(labels | figures, **place, **cache.key)
                progress.step(f"{domain}, {cache.label}")
    return results.figures(keys)


def windows_of(subject: Subject, run: Run, length: int, count: int) -> dict[tuple[str, int], Tensor]:
    """Token ids (1, length) by domain and number."""
    return {
        (domain, number): subject.encode(piece, length)
        for domain, text in texts.domains(run.texts).items()
        for number, piece in enumerate(texts.windows(text, count, 8 * length, run.seed))
    }


def read(subject: Subject, cache: Variant, ids: Tensor, context: int, feed: int | None = None) -> Reading:
    """Prefill the first `context` of `ids` (1, T) into an empty cache and score the rest from it, `feed` tokens at a
    time, or all at once."""
    if cache.label == variants.NOTHING:
        alone = torch.cat([subject.begin, ids[:, context:-1]], dim=1)
        return Reading(_log_probs(subject.model, alone, None, 0, None)[subject.begin.shape[1] :], 0.0)
    if cache.press is not None:
        assert subject.kvpress is not None  # it is available, or the cache would have been skipped
        return Reading(*subject.kvpress.read(ids, context, cache.press))
    held = cache.cache(subject.model)
    prefill(subject.model, ids[:, :context], held)
    nbytes = sizes.of_bfloat16(held, subject.model)
    return Reading(_log_probs(subject.model, ids[:, context:-1], held, context, feed), **nbytes)


def _log_probs(model: PreTrainedModel, fed: Tensor, cache: Any, start: int, feed: int | None) -> Tensor:
    """Log probabilities (scored, vocabulary) after each true token that has a successor."""
    scored = []
    for part in fed.to(model.device).split(feed or fed.shape[1], dim=1):
        positions = torch.arange(start, start + part.shape[1], device=model.device)[None]
        use = {"past_key_values": cache, "position_ids": positions, "use_cache": cache is not None}
        scored.append(model(input_ids=part, **use).logits[0].float().log_softmax(-1))
        start += part.shape[1]
    return torch.cat(scored)


def compare(reading: Reading, dense: Tensor, targets: Tensor) -> dict[str, Any]:
    """Figures for each scored token. `dense` (scored, vocabulary), `targets` (scored,) the true next tokens."""
    own, targets = reading.log_probs, targets.to(dense.device)
    kl = torch.nn.functional.kl_div(own, dense, log_target=True, reduction="none").sum(-1)
    return {
        "share": reading.share,
        "simulated": reading.simulated,
        "model_nbytes": reading.model_nbytes,
        "break_even": reading.break_even,
        "kl": _numbers(kl),
        "same": (own.argmax(-1) == dense.argmax(-1)).int().tolist(),
        "nll": _numbers(-own.gather(-1, targets[:, None])[:, 0]),
    }


def _numbers(x: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in x.tolist()]
