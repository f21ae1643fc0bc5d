"""The share of its tokens that each kv head of a model should keep: found by reading texts, with one threshold for all.

A text is read, every token of every head is scored, and the best tokens of the whole model are counted for each head.
Some heads look at the whole text and get many of them. Others look at the newest tokens only and get next to none. The
counts are much alike from text to text, so their mean over a few texts serves all texts. So every head knows its budget
before a text is read, and does not wait for the scores of other layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .calibration.by_layer import Sizes
from .calibration.listening import Heard, Read
from .calibration.of_score import fitted_to
from .model.probing import SINKS
from .model.ranks import whole_shapes
from .select.evict import Evict
from .stage import Ranking, Score
from .store.budget import GRID
from .store.plan import Plan
from .store.store import Store
from .types import KV
from .workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .model.layers import LayerGroups

__all__ = ["shares_of"]

TOKENS = 6 * 1024
"""Of text that is read."""
WINDOW = 64
"""Newest tokens that every head keeps."""


@dataclass(frozen=True)
class Budgets:
    """The thing that is fitted: the shares for a score.

    Attributes:
        ranking: the score for a model.
    """

    score: Score | str
    ranking: Ranking

    name = "budgets"
    instead = 'budgets="equal"'

    def __repr__(self) -> str:
        return f"budgets of {self.score!r}"


def shares_of(model: PreTrainedModel, layers: Sequence[int], evict: Evict, ranking: Ranking) -> Mapping[int, Tensor]:
    """Layer -> (H, points of `GRID`) shares for the score of `evict`, known, loaded or found now (`fitted_to`)."""
    sizes: dict[int, Sizes] = {layer: {"shares": (whole_shapes(model)[layer][0], len(GRID))} for layer in layers}
    budgets, readings = Budgets(evict.score, ranking), 2 if evict.rereads else 1

    def find(read: Read, texts: Sequence[Tensor], groups: LayerGroups) -> Mapping[int, Mapping[str, Tensor]]:
        # one layer at a time, all heads on their own
        plan = Plan(Evict(1.0, evict.score, layers=1), None, None, SINKS, WINDOW, 1, ranking=ranking)
        sums = {layer: torch.zeros(size["shares"]) for layer, size in sizes.items()}  # type: ignore[arg-type]

        def score(layer: int, heard: Heard) -> None:
            store, seen = Store(plan, [layer], (), groups.ropes, {}), heard.keys.shape[2]
            store.append(0, KV(heard.keys, heard.values))
            if evict.rereads:
                store.hear(0, heard.queries, seen, heard.scaling, Workspace())
                store.take_back(seen, seen // 2)
                seen -= seen // 2
            else:
                store.remember(0, heard.queries, seen, False)
            found[layer] = store.scored(seen, heard.scaling)[0].cpu()  # (H, T)

        for ids in texts:
            found: dict[int, Tensor] = {}
            read([ids] * readings, score)
            for layer, shares in _shares(found).items():
                sums[layer] += shares / len(texts)
        return {layer: {"shares": shares} for layer, shares in sums.items()}

    found = fitted_to(model, layers, budgets, sizes, find, TOKENS, readings)
    return {layer: found.layers[layer]["shares"] for layer in layers}


def _shares(scores: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
    """(H, points of `GRID`) by layer: the share of the tokens of each head among the best of all, of scores (H, T)."""
    every = torch.cat([own.flatten() for own in scores.values()])
    ranks = torch.empty_like(every, dtype=torch.long)
    ranks[every.argsort(descending=True, stable=True)] = torch.arange(len(every))
    among = ranks[:, None] < (torch.tensor(GRID, dtype=torch.float64) * len(every)).round()  # (all tokens, points)
    heads = [len(own) for own in scores.values()]
    by_head = among.unflatten(0, (sum(heads), -1)).float().mean(1)  # (all heads, points)
    return dict(zip(scores, by_head.split(heads), strict=True))
