"""The likeness of the layers of a group: if they are alike, one latent can serve them all.

For every token, the cosine between what one layer of a group holds and what another does, averaged over tokens and
groups: of keys (rotated or not: turning both by one angle changes no cosine), values, hidden states, and the paper's
latents (singular vectors of the projection weights, applied to the hidden states). `ends` compares the first and the
last layer, as the paper does; `pairs` all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ...calibration.weight_axes import WeightAxes
from ...calibration.windows import sample_ids
from ...errors import BindError
from ...model.layers import LayerGroups
from ...model.probing import observe
from ...types import KV
from .. import terminal
from ..results import Figures, Results
from .run import Run, environment
from .subject import Subject, opened

__all__ = ["measure", "run"]


@dataclass(frozen=True)
class Likeness:
    """Mean cosines between the layers of a group; `variant` says of what."""

    variant: str
    layers: int
    ends: float
    pairs: float


def run(run: Run, layers: int | None) -> Iterator[Figures]:
    """Likeness within groups of `layers`, or of the usual size."""
    with opened(run) as subject:
        with terminal.working("reading a text"):
            likenesses = measure(subject, layers)
        results = Results("layers", run.out, environment(run, subject.name, subject.identity))
        keys = [{"variant": likeness.variant, "layers": likeness.layers} for likeness in likenesses]
        for likeness, key in zip(likenesses, keys, strict=True):
            if results.get(**key) is None:
                results.add({"ends": likeness.ends, "pairs": likeness.pairs}, **key)
        yield results.figures(keys)


def measure(subject: Subject, layers: int | None) -> list[Likeness]:
    split = LayerGroups(subject.model, layers)
    seen = observe(subject.model, split, sample_ids(subject.model))
    groups = [[seen[i] for i in group] for group in split.groups]
    kinds = {
        "keys": [[_flat(kv.keys) for kv in group] for group in groups],
        "values": [[_flat(kv.values) for kv in group] for group in groups],
        "hidden states": [[_flat(_hidden(kv)) for kv in group] for group in groups],
    }
    try:
        axes = WeightAxes(subject.model, split.modules, split.groups)
    except BindError as error:  # keys that are normalised have no such latents
        terminal.say(f"latents of the weights: left out. {error}")
    else:
        kinds["latents of the weights"] = [
            [_flat(_hidden(kv)) @ axes.down(layers, axes.full_rank, kv.keys.device).T for kv in group]
            for layers, group in zip(split.groups, groups, strict=True)
        ]
    return [_likeness(name, split.size, kind) for name, kind in kinds.items()]


def _likeness(name: str, size: int, groups: Sequence[Sequence[Tensor]]) -> Likeness:
    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())

    ends = [cosine(group[0], group[-1]) for group in groups]
    pairs = [cosine(a, b) for group in groups for a, b in combinations(group, 2)] or ends
    return Likeness(name, size, sum(ends) / len(ends), sum(pairs) / len(pairs))


def _flat(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B*T, H*D)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1).float()


def _hidden(kv: KV) -> Tensor:
    assert kv.hidden is not None
    return kv.hidden
