"""TriAttention: how much attention a key will get, told from where the queries of the model lie on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..calibration.by_layer import ByLayer, Sizes
from ..calibration.listening import Heard, Read
from ..calibration.of_score import check_finite, fitted_to
from ..errors import BindError
from ..model.layers import LayerGroups
from ..model.probing import SINKS
from ..model.ranks import whole_shapes
from ..stage import Ranking, Score, check
from ..turns import Pairs
from ..types import KV, Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TriAttention"]

TOKENS = 5 * 1024
"""Of text that the mean queries are taken from."""


@dataclass(frozen=True, repr=False)
class TriAttention(Score):
    """Without rotary embedding, the queries of a head lie around one vector. Turned to positions ahead, this vector
    tells how much attention a key will get there; where queries do not point one way, the norm of the key does.

    Needs no queries of the text, so it works the same while decoding. The mean queries belong to the model. They are
    found at first use and kept in the user's cache folder.

    Args:
        horizon: tokens ahead: attention is averaged over distances of 1, 2, 4, ... tokens up to it (default 65,536).
        over: `max` (default) or `mean` over the query heads of a kv head, brought to one scale.

    Source: TriAttention, arXiv 2604.04921. Differs from the paper: by default one choice for all heads of five layers;
    tokens go a block at a time, and the stack's sinks and window stay.
    """

    horizon: int = 65_536
    over: Literal["mean", "max"] = "max"

    name = "triattention"
    source = "arXiv 2604.04921"
    needs_rope = True
    layers = 5
    is_fitted = True

    def __post_init__(self) -> None:
        check(isinstance(self.horizon, int) and self.horizon >= 1, self, "horizon counts tokens.", "Use 1 or more.")
        check(self.over in ("mean", "max"), self, f"{self.over!r} is not a way to reduce.", 'Use "mean" or "max".')

    def bind(self, model: PreTrainedModel, layers: Sequence[int]) -> Ranking:
        groups, shapes = LayerGroups(model, 1, layers), whole_shapes(model)
        pairs, sizes = dict[int, Pairs](), dict[int, Sizes]()
        for layer in layers:
            heads, width, _ = shapes[layer]
            found = groups.pairs(layer, width)
            if found is None:
                raise BindError(
                    f"{self!r} needs keys that are rotated in pairs of channels, and those of layer {layer} of "
                    f'{type(model).__name__} are not. Use score="snapkv".'
                )
            pairs[layer] = found
            sizes[layer] = {"mean": (heads, None, width), "loose": (heads, None, found.counts[0])}
        # what is found is the same for all settings
        return MeanQueries(self, fitted_to(model, layers, TriAttention(), sizes, find, TOKENS), pairs)


@dataclass(frozen=True, eq=False)
class MeanQueries(Ranking):
    """`TriAttention` for one model.

    Attributes:
        found: of every layer, `mean` (H, G, D), the mean un-rotated query of each head, and `loose` (H, G, P): the mean
            norm of queries in each pair of channels, less the norm of their mean.
        pairs: of every layer, the channels that turn together.
    """

    stage: TriAttention
    found: ByLayer
    pairs: Mapping[int, Pairs]

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.found.tensors

    def score(self, kv: KV, context: Context) -> Tensor:
        keys, pairs = kv.keys.float(), self.pairs[context.layer]
        mean, loose = (self.found.of(context.layer, name, context.heads, keys) for name in ("mean", "loose"))
        logits = torch.einsum("bhgd,bhtd->bhgt", self._ahead(mean, context).expand(len(keys), -1, -1, -1), keys)
        logits = logits + torch.einsum("hgp,bhtp->bhgt", loose, norms(keys, pairs))
        # query heads are compared on one scale
        spread = logits.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
        scores = (logits - logits.mean(-1, keepdim=True)) / spread
        return scores.amax(2) if self.stage.over == "max" else scores.mean(2)

    def _ahead(self, mean: Tensor, context: Context) -> Tensor:
        """Mean queries (B or 1, H, G, D), turned to positions ahead and averaged over them."""
        if context.rope is None:
            return mean[None]
        distances = 2 ** torch.arange(self.stage.horizon.bit_length(), device=mean.device)
        each = mean.flatten(0, 1)[None, :, None].expand(-1, -1, len(distances), -1)
        turned = context.rope.rotate(each, (context.seen - 1 + distances)[None, None])
        return turned.mean(2).unflatten(1, mean.shape[:2])


def norms(x: Tensor, pairs: Pairs) -> Tensor:
    """Norms (..., P) of the channels of `x` (..., D) that turn together."""
    return (x[..., pairs.first].square() + x[..., pairs.second].square()).sqrt()


def find(read: Read, texts: Sequence[Tensor], groups: LayerGroups) -> Mapping[int, Mapping[str, Tensor]]:
    """Mean queries of every layer."""
    sums: dict[int, Tensor] = {}
    shapes: dict[int, tuple[int, Pairs]] = {}

    def hear(layer: int, heard: Heard) -> None:
        queries = groups.unrotated(layer, heard.queries)[0, :, SINKS:].float()  # (H*G, T, D)
        pairs = groups.pairs(layer, queries.shape[-1])
        assert pairs is not None  # `bind` has refused
        shapes[layer] = heard.keys.shape[1], pairs.to(torch.device("cpu"))
        each = torch.cat([queries, norms(queries, pairs), torch.ones_like(queries[..., :1])], dim=-1)
        sums[layer] = sums.get(layer, 0) + each.sum(1).cpu().double()

    for ids in texts:
        read([ids], hear)
    for layer, summed in sums.items():
        check_finite(summed, layer)
    return {layer: _means(summed, *shapes[layer]) for layer, summed in sums.items()}


def _means(summed: Tensor, heads: int, pairs: Pairs) -> dict[str, Tensor]:
    """Return the means of one layer, from sums (H*G, D + P + 1) of queries, of their norms, and their number."""
    mean, norm = (summed[:, :-1] / summed[:, -1:]).split(
        [summed.shape[1] - 1 - pairs.counts[0], pairs.counts[0]], dim=-1
    )
    loose = (norm - norms(mean, pairs)).clamp_min(0)  # below 0 by rounding alone
    return {name: x.float().unflatten(0, (heads, -1)) for name, x in (("mean", mean), ("loose", loose))}
