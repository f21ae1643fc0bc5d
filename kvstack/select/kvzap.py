"""KVzap: how much of a text hangs on a token, told from what the token leaves in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.by_layer import ByLayer, Sizes
from ..calibration.listening import Heard, Read
from ..calibration.of_score import check_finite, fitted_to
from ..model.probing import SINKS
from ..model.ranks import whole_shapes
from ..stage import Ranking, Score, check
from ..types import KV, Context
from .attention import attention_received
from .snapkv import smooth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.layers import LayerGroups

__all__ = ["KVzap"]

TOKENS = 10 * 1024
"""Of text that the regression is fitted to; each is read twice."""
RIDGE = 1e-3
"""Of the regression, as a share of the variance of each feature."""
FLOOR = 1e-5
"""Attention below this is none: its logarithm would run away."""


@dataclass(frozen=True, repr=False)
class KVzap(Score):
    """A linear guess at KVzip's score, the largest attention that a token gets while the model repeats the text: for
    each kv head, a ridge regression from the token's un-rotated key and value to the logarithm of that attention.

    Args:
        window: newest queries that are asked too (default 0: none). The score is then the sum of the logarithms of the
            guess and of the largest attention from these queries: a token must matter to the text and to its end.
        kernel: tokens that their attention is smoothed over, odd (default 5).

    Without a window it needs no queries and looks at one token at a time, so it works the same while decoding. The
    regression belongs to the model. It is fitted at first use and kept in the user's cache folder.

    Source: KVzap, arXiv 2601.07891; KVzip, arXiv 2505.23416. Differs from the paper: the features are the key and the
    value of the kv head with their norms, which the cache has anyway, not the hidden state, which it would have to
    hold; the budget is `Evict`'s, not a threshold; the text is repeated without an instruction before it.
    """

    window: int = 0
    kernel: int = 5

    name = "kvzap"
    source = "arXiv 2601.07891"
    needs_rope = True
    is_fitted = True

    def __post_init__(self) -> None:
        counts = isinstance(self.window, int) and not isinstance(self.window, bool) and self.window >= 0
        check(counts, self, "window counts queries.", "Use 0 or more.")
        odd = isinstance(self.kernel, int) and self.kernel >= 1 and self.kernel % 2 == 1
        check(odd, self, "kernel must be an odd number of tokens.", "Use 5, or 1 for no smoothing.")
        object.__setattr__(self, "queries", self.window)

    def bind(self, model: PreTrainedModel, layers: Sequence[int]) -> Ranking:
        sizes: dict[int, Sizes] = {}
        for layer in layers:
            heads, keys, values = whole_shapes(model)[layer]
            sizes[layer] = {"weight": (heads, keys + values + 4), "bias": (heads,)}
        # the regression is the same, whoever else is asked
        return Guess(fitted_to(model, layers, KVzap(), sizes, find, TOKENS, readings=2), self)


@dataclass(frozen=True, eq=False)
class Guess(Ranking):
    """`KVzap` for one model.

    Attributes:
        found: of every layer, `weight` (H, F) and `bias` (H,).
    """

    found: ByLayer
    settings: KVzap

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.found.tensors

    def score(self, kv: KV, context: Context) -> Tensor:
        keys = kv.keys if context.rope is None else context.rope.unrotate(kv.keys, context.positions)
        weight, bias = (self.found.of(context.layer, name, context.heads, keys) for name in ("weight", "bias"))
        guess: Tensor = torch.einsum("bhtf,hf->bht", features(keys, kv.values), weight) + bias[:, None]
        if not self.settings.window:
            return guess
        assert context.queries is not None
        received = attention_received(context.queries, kv.keys, context.scaling, "max").amax(2)
        return guess + (smooth(received, self.settings.kernel, "max") + FLOOR).log()


def features(keys: Tensor, values: Tensor) -> Tensor:
    """Return the features of tokens, (B, H, T, F): un-rotated key and value, their norms and the logarithms."""
    keys, values = keys.float(), values.float()
    norms = torch.stack([keys.norm(dim=-1), values.norm(dim=-1)], dim=-1)
    return torch.cat([keys, values, norms, norms.clamp_min(1e-6).log()], dim=-1)


def find(read: Read, texts: Sequence[Tensor], groups: LayerGroups) -> Mapping[int, Mapping[str, Tensor]]:
    """The regression of every layer."""
    sums: dict[int, Tensor] = {}

    def hear(layer: int, heard: Heard) -> None:
        received = attention_received(heard.queries, heard.keys, heard.scaling, "max").amax(2)  # (1, H, 2T)
        first = slice(SINKS, heard.keys.shape[2] - heard.queries.shape[2])  # the text as it was read first
        x = features(groups.unrotated(layer, heard.keys[:, :, : first.stop])[:, :, SINKS:], heard.values[:, :, first])
        y = (received[:, :, first, None] + FLOOR).log()
        joint = torch.cat([x, torch.ones_like(y), y], dim=-1)[0].double().cpu()  # (H, T, F + 2)
        sums[layer] = sums.get(layer, 0) + joint.mT @ joint

    for ids in texts:
        read([ids, ids], hear)
    return {layer: regression(joint, layer) for layer, joint in sums.items()}


def regression(joint: Tensor, layer: int) -> dict[str, Tensor]:
    """The regression of one layer, from sums of products (H, F + 2, F + 2) of features, ones, and what is guessed."""
    check_finite(joint, layer)
    count, total = joint[:, -2, -2, None, None], joint[:, -2:-1]  # (H, 1, F + 2): sums
    spread = joint - total.mT @ total / count
    own = spread.diagonal(dim1=-2, dim2=-1)[:, :-2]
    covariance = spread[:, :-2, :-2] + torch.diag_embed((RIDGE * own).clamp_min(1e-9))
    weight = torch.linalg.solve(covariance, spread[:, :-2, -1])  # (H, F)
    mean = (total / count)[:, 0]
    return {"weight": weight.float(), "bias": (mean[:, -1] - (mean[:, :-2] * weight).sum(-1)).float()}
