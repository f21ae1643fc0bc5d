"""How alike the layers of a group are: what makes one latent serve them all.

For every token, the cosine between what one layer of a group holds and what another does, averaged over tokens and
groups: of keys (rotated or not: turning both by one angle changes no cosine), values, hidden states, and the paper's
latents (singular vectors of the projection weights, applied to the hidden states). `ends` compares the first and the
last layer, as the paper does; `pairs` all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ...calibration.weight_axes import WeightAxes
from ...calibration.windows import observe
from ...errors import BindError
from ...model.layers import Grouping
from ...types import KV
from ..show import tables as show
from .results import Results
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


def run(run: Run, layers: int | None) -> None:
    with opened(run) as subject:
        with show.working("reading a text"):
            found = measure(subject, layers)
        title = f"groups of {found[0].layers} layers: {subject.name}, {run.dtype}"
        rows = [[row.variant, f"{row.ends:.3f}", f"{row.pairs:.3f}"] for row in found]
        show.table(title, ("cosine of", "first and last", "all pairs"), rows)
        results = Results("layers", run.out, environment(run, subject.name, subject.identity))
        for row in found:
            key = {"variant": row.variant, "layers": row.layers}
            if results.get(**key) is None:
                results.add({"ends": row.ends, "pairs": row.pairs}, **key)


def measure(subject: Subject, layers: int | None) -> list[Likeness]:
    plan = Grouping(subject.model, layers)
    seen = observe(subject.model, plan)
    groups = [[seen[i] for i in group] for group in plan.groups]
    kinds = {
        "keys": [[_flat(kv.keys) for kv in group] for group in groups],
        "values": [[_flat(kv.values) for kv in group] for group in groups],
        "hidden states": [[_flat(_hidden(kv)) for kv in group] for group in groups],
    }
    try:
        axes = WeightAxes(subject.model, plan.modules, plan.groups)
    except BindError as error:  # keys that are normalised have no such latents
        show.console().print(f"latents of the weights: left out. {error}", highlight=False)
    else:
        kinds["latents of the weights"] = [
            [_flat(_hidden(kv)) @ axes.down(layers, axes.full_rank, kv.keys.device).T for kv in group]
            for layers, group in zip(plan.groups, groups, strict=True)
        ]
    return [_likeness(name, plan.size, kind) for name, kind in kinds.items()]


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
