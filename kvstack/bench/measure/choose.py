"""Candidate stacks at one budget of bytes, measured on your own texts.

Every candidate reads a window of each text, and the tokens behind it are scored as in quality.py. Then all of them
decode behind one of the windows, in turns, as in decode.py. The context counts the scored tokens too, so that it may be
all that the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from torch import Tensor

from ... import budgets
from ...errors import KVStackError
from .. import terminal
from ..results import Figures, Record
from . import decode, quality, texts, variants
from .run import Run, environment
from .subject import Subject, opened
from .variants import Variant

__all__ = ["CONTEXT", "best", "run"]

CONTEXT = (8192,)
PIECES = 3
"""Windows of your texts that take the place of one of each of three kinds."""


def run(run: Run, share: float, windows: int, score: int, steps: int, burst: int) -> tuple[Figures, Figures]:
    """Drift and speed of the dense cache and of every candidate that holds `share` of its bytes.

    Args:
        run: its first context is the number of tokens, those that are scored included.
        share: the budget, as in `kvstack.for_budget`.
        windows: of each kind of text; three times as many of a folder of texts.
        score: tokens scored behind the compressed ones.
        steps: tokens decoded, `burst` at a time.

    Raises:
        KVStackError: the context is too short for `score`, or no stack is so small.
    """
    context = run.contexts[0] - score - 1
    if context < 1:
        raise KVStackError(f"{score} of {run.contexts[0]} tokens are scored, and none is left. Use a longer --context.")
    with opened(run) as subject:
        subject.check(run.contexts[0])
        caches = _candidates(subject, share, context)
        data = _windows(subject, run, run.contexts[0], windows)
        rows = _read(subject, caches, data, context, score)
        measured = {row["cache"] for row in rows}
        caches = [cache for cache in caches if cache.label in measured]
        ids = next(iter(data.values()))[:, :context]
        timed = decode.measure(subject.model, ids, caches, 1, steps, burst)
        where = environment(run, subject.name, subject.identity)
    speeds = [{"context": context, **cache.key, **one} for cache, one in zip(caches, timed, strict=True)]
    return Figures(rows, where), Figures(speeds, where)


def best(drifts: Figures, speeds: Figures, share: float, most: float | None = None) -> str | None:
    """The spec of the candidate that drifts least, of those that really hold no more than `share`; with `most`, the one
    that decodes fastest, of those whose KL is no larger. None where there is none."""
    rows: dict[str, list[Record]] = {}
    for row in drifts.rows:
        rows.setdefault(row["cache"], []).append(row)
    fit = {label: mean(x for row in mine for x in row["kl"]) for label, mine in rows.items() if _holds(mine, share)}
    if most is None:
        return min(fit, key=lambda label: fit[label], default=None)
    speed = {row["cache"]: row["speed_typical"] for row in speeds.rows}
    return max((label for label in fit if fit[label] <= most), key=lambda label: speed[label], default=None)


def _holds(rows: Sequence[Record], share: float) -> bool:
    return rows[0]["kind"] == "kvstack" and max(row["share"] for row in rows) <= share


def _candidates(subject: Subject, share: float, context: int) -> list[Variant]:
    caches = budgets.Caches.of(subject.model)
    found = budgets.candidates(share, context, caches)
    if not found:
        raise KVStackError(
            f"no stack holds {share:g} of a dense cache's bytes after {context:,} tokens. "
            f"Use --bytes {budgets.smallest(context, caches):g} or more, or a longer --context."
        )
    specs = [candidate.stack().spec for candidate in found]
    with terminal.working("fitting the candidates to the model"):
        return variants.available(variants.parse(specs), subject.model)


def _windows(subject: Subject, run: Run, length: int, count: int) -> dict[tuple[str, int], Tensor]:
    """Token ids (1, length) by domain and number: of the user's texts alone, where there are some."""
    if run.texts is None:
        return quality.windows_of(subject, run, length, count)
    whole = texts.prose(run.texts)
    most = max(1, min(count * PIECES, len(whole) // (8 * length)))  # those of a short text would overlap
    pieces = texts.windows(whole, most, 8 * length, run.seed)
    return {("texts", number): subject.encode(piece, length) for number, piece in enumerate(pieces)}


def _read(
    subject: Subject, caches: Sequence[Variant], data: dict[tuple[str, int], Tensor], context: int, score: int
) -> list[dict[str, Any]]:
    rows, failed = [], set()
    with terminal.steps(f"drift at {context:,}", len(data) * len(caches)) as progress:
        for (domain, number), ids in data.items():
            dense = quality.read(subject, caches[0], ids, context)
            for cache in caches:
                progress.step(f"{domain}, {cache.label}")
                if cache.label in failed:
                    continue
                try:
                    reading = dense if cache is caches[0] else quality.read(subject, cache, ids, context)
                except KVStackError as error:
                    failed.add(cache.label)
                    variants.skipped(cache.label, error)
                    continue
                figures = quality.compare(reading, dense.log_probs, ids[0, context + 1 :])
                place = {"context": context, "score": score, "domain": domain, "window": number}
                rows.append({**place, **cache.key, "kind": cache.kind, "family": cache.family, **figures})
    return [row for row in rows if row["cache"] not in failed]
