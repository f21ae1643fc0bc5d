"""How far the next tokens drift when a text was read from a compressed cache.

A window of text is parted in two. The first part is prefilled and the cache compresses it; the second is then fed
in one forward, with the true tokens, and its logits are compared with those that the dense cache gives. So all
tokens that are scored read the same compressed text, and none of them is compressed itself.

    KL           mean Kullback-Leibler divergence of the model on this cache from the model on a dense one, in nats;
                 0 is no drift at all
    q99          its 99 % quantile over the tokens
    top-1        share of tokens whose likeliest successor is the same
    NLL          mean negative log likelihood of the true next token, in nats
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import common, texts
from .common import DENSE, Run, Subject, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONTEXTS", "STACKS", "Drift", "measure", "run"]

CONTEXTS = (1024, 4096, 7680)
SHORT = (
    "quant:8",
    "quant:4",
    "quant:2",
    "evict:0.5",
    "evict:0.2",
    "quant:4+evict:0.5",
    "quant:2+evict:0.2",
    "hqq:4,group=16",
    "hqq:4",
    "hqq:2,group=16",
    "hqq:2",
    "commonkv:0.5",
    "commonkv:0.5+quant:2",
    "commonkv:0.3,basis=weights,layers=5",
    "commonkv:0.3,basis=weights,layers=5,merge=mean",
)
STACKS = {
    1024: SHORT,
    # an eighth, a sixteenth
    4096: ("commonkv:0.87+quant:2", "commonkv:0.45+quant:2@window=16", "commonkv+quant:2+evict:0.5", "hqq:2"),
    # a fiftieth, a hundredth, and the line of the README
    7680: ("commonkv:0.136+quant:2@window=16", "commonkv:0.056+quant:2@window=16", "commonkv+quant:2+evict:0.2"),
}
"""What is measured by default at each context; at others, what 1,024 has."""
ALL = "all"
"""Stands for the mean of all domains."""


@dataclass(frozen=True)
class Sample:
    """One window read through one cache: numbers per scored token, and the bytes held while they were scored."""

    kl: Tensor
    same: Tensor
    nll: Tensor
    share: float


@dataclass(frozen=True)
class Drift:
    """What one cache did to the texts of one domain."""

    context: int
    domain: str
    variant: str
    kl: float
    kl_q99: float
    top1: float
    nll: float
    share: float
    """Bytes held, as a share of a bfloat16 dense cache's (`common.share_of_bfloat16`)."""
    scored: int
    """Tokens."""


def run(run: Run, windows: int, score: int, folder: Path | None) -> None:
    with common.opened(run) as subject:
        for context in run.contexts:
            stacks = run.stacks or STACKS.get(context, SHORT)
            variants = common.chosen(replace(run, stacks=stacks))
            data = _windows(subject, context + score + 1, windows, run.seed, folder)
            found = measure(subject.model, data, context, variants)
            title = f"{context:,} tokens compressed, the next {score} scored: {subject.name}, {run.dtype}"
            _show(title, found, variants)
            common.write("quality", run, subject.name, [asdict(drift) for drift in found])


def _windows(subject: Subject, length: int, count: int, seed: int, folder: Path | None) -> dict[str, list[Tensor]]:
    """Token ids (1, length) by domain."""
    if subject.tokenizer is None:
        return {"random": [subject.random(length, seed + i) for i in range(count)]}
    return {
        domain: [subject.encode(piece, length) for piece in texts.windows(text, count, 8 * length, seed)]
        for domain, text in texts.domains(folder).items()
    }


def measure(
    model: PreTrainedModel, data: Mapping[str, Sequence[Tensor]], context: int, variants: Sequence[Variant]
) -> list[Drift]:
    """Score what follows the first `context` tokens of every window in `data`; the first variant must be dense."""
    samples: dict[str, dict[str, list[Sample]]] = {}
    for domain, windows in data.items():
        samples[domain] = {variant.label: [] for variant in variants}
        for number, ids in enumerate(windows):
            with common.progress(f"{domain}, window {number + 1} of {len(windows)}"):
                for label, sample in _read(model, ids, context, variants).items():
                    samples[domain][label].append(sample)
    samples[ALL] = {v.label: [s for mine in samples.values() for s in mine[v.label]] for v in variants}
    return [drift for domain, mine in samples.items() for drift in _drifts(context, domain, mine)]


def _read(model: PreTrainedModel, ids: Tensor, context: int, variants: Sequence[Variant]) -> dict[str, Sample]:
    """One window through every variant."""
    found, dense = {}, None
    for variant in variants:
        cache = variant.make(model)
        common.prefill(model, ids[:, :context], cache)
        share = common.share_of_bfloat16(cache, model)
        logits = _continue(model, ids, context, cache)
        dense = logits if dense is None else dense
        found[variant.label] = _compare(dense, logits, ids[0, context + 1 :], share)
    return found


def _continue(model: PreTrainedModel, ids: Tensor, context: int, cache: object) -> Tensor:
    """Log probabilities (scored, vocabulary) after each true token that has a successor."""
    fed = ids[:, context:-1]
    positions = torch.arange(context, context + fed.shape[1])[None]
    logits = model(input_ids=fed, past_key_values=cache, position_ids=positions, use_cache=True).logits
    return logits[0].float().log_softmax(-1)


def _compare(dense: Tensor, own: Tensor, targets: Tensor, share: float) -> Sample:
    return Sample(
        kl=torch.nn.functional.kl_div(own, dense, log_target=True, reduction="none").sum(-1),
        same=own.argmax(-1) == dense.argmax(-1),
        nll=-own.gather(-1, targets[:, None])[:, 0],
        share=share,
    )


# ---- figures


def _drifts(context: int, domain: str, samples: Mapping[str, Sequence[Sample]]) -> list[Drift]:
    found = []
    for label, mine in samples.items():
        kl = torch.cat([sample.kl for sample in mine])
        drift = Drift(
            context=context,
            domain=domain,
            variant=label,
            kl=kl.mean().item(),
            kl_q99=kl.quantile(0.99).item(),
            top1=torch.cat([sample.same for sample in mine]).float().mean().item(),
            nll=torch.cat([sample.nll for sample in mine]).mean().item(),
            share=sum(sample.share for sample in mine) / len(mine),
            scored=kl.numel(),
        )
        found.append(drift)
    return found


def _show(title: str, found: Sequence[Drift], variants: Sequence[Variant]) -> None:
    by_domain = {
        domain: [drift for drift in found if drift.domain == domain] for domain in {d.domain: 0 for d in found}
    }
    overall = by_domain.pop(ALL)
    peers = [drift for drift, variant in zip(overall, variants, strict=True) if variant.peer]
    rows = [
        [
            drift.variant,
            f"{drift.share:.2%}",
            *(_short(mine[i].kl) for mine in by_domain.values()),
            _short(drift.kl),
            _short(drift.kl_q99),
            f"{drift.top1:.1%}",
            f"{drift.nll:.3f}",
            _nearest(drift, peers) if not variants[i].peer and drift.variant != DENSE else "",
        ]
        for i, drift in enumerate(overall)
    ]
    kinds = [f"KL, {domain}" for domain in by_domain]
    columns = ("cache", "bytes", *kinds, "KL, all", "q99", "top-1", "NLL", "hqq of like bytes")
    caption = (
        f"{overall[0].scored:,} tokens scored; bytes as a share of a bfloat16 dense cache's; last column: KL of the "
        "hqq cache whose bytes are nearest"
    )
    common.table(title, columns, rows, caption)


def _nearest(drift: Drift, peers: Sequence[Drift]) -> str:
    """The quantized cache of transformers that holds the most similar number of bytes."""
    if not peers:
        return ""
    peer = min(peers, key=lambda other: abs(other.share - drift.share))
    return f"{_short(peer.kl)} at {peer.share:.1%}"


def _short(kl: float) -> str:
    return f"{kl:.2g}" if kl < 0.1 else f"{kl:.3f}"
