"""Reading latents of tokens in classes on a processor: each class is packed in its own way.

rough     leading channels of all tokens are joined, once for all layers that share the latent: neighbours are in
          different classes, and rough scores take neighbours together (linear.py)
exact     keys of chosen tokens are rebuilt from the codes of their class
weigh     each class is read in place, and the sums of all classes are added
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..abilities import Linear
from ..turns import Turns
from ..workspace import Workspace
from . import compiled
from .linear_numba import Codes, CodesReader, Joined

__all__ = ["ByClass", "Class"]


class Class(NamedTuple):
    """Tokens of one class.

    Attributes:
        keys, values: the maps from its channels.
        latents: those of the keys and of the values; the same where they have one.
        places: (B, n) where its tokens are among all that are sealed.
        turns: the rotation of their keys.
    """

    keys: Linear
    values: Linear
    latents: tuple[Codes, Codes]
    places: Tensor
    turns: Turns


class ByClass:
    """Answers one query of a layer.

    Args:
        keys: the map from the joined channels.
        joined: the leading channels of all tokens.
        turns: the rotation of the keys of all tokens.
        exact: keys that are rebuilt for each kv head, at most.
        work: for scratch memory.
    """

    def __init__(
        self, keys: Linear, joined: Joined, turns: Turns, classes: Sequence[Class], exact: int, work: Workspace
    ) -> None:
        self.rough = CodesReader(keys, keys, (joined, joined), turns, exact, joined.rank, work)
        self.readers = [
            CodesReader(each.keys, each.values, each.latents, each.turns, exact, joined.rank, work, joined.tokens)
            for each in classes
        ]
        self.tokens, self.counts = joined.tokens, [reader.tokens for reader in self.readers]
        self.order = torch.cat([each.places for each in classes], dim=1)  # (B, T), class by class

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        query, loose = query.contiguous(), compiled.side_by_side(raw)
        in_order = torch.empty(*query.shape[:3], self.tokens + loose[1])
        all_exact = self.rough.rebuilds_all
        if not all_exact:
            self.rough.score(query, in_order)
        if all_exact or not self.rough.turns.rotates:
            in_order[..., self.tokens :] = query @ loose[0].mT
        if not self.rough.turns.rotates:
            return in_order
        # class by class
        scores, ends = torch.empty_like(in_order), list(itertools.accumulate(self.counts))
        its = [scores[..., end - count : self.tokens] for end, count in zip(ends, self.counts, strict=True)]
        if all_exact:
            for reader, mine in zip(self.readers, its, strict=True):
                reader.rescore_all(query, mine)
        else:
            scores[..., : self.tokens] = self._by_class(in_order[..., : self.tokens])
            found = self.rough.choose(query, scores, loose, ends)
            in_order[..., self.tokens :] = scores[..., self.tokens :]
            for reader, mine, places, counts in zip(self.readers, its, *found, strict=True):
                reader.rescore(query, mine, places, counts)
        self._put_in_order(scores[..., : self.tokens], in_order)
        return in_order

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        sealed, loose = weights.tensor_split([self.tokens], dim=-1)
        first, *others = self._by_class(sealed).split(self.counts, dim=-1)
        mixed = self.readers[0].mix(torch.cat([first, loose], dim=-1), raw)
        for reader, mine in zip(self.readers[1:], others, strict=True):
            mixed += reader.mix(mine, raw[:, :, :0])
        return mixed

    def _by_class(self, x: Tensor) -> Tensor:
        """Numbers (B, H, G, T) in the order of positions -> class by class."""
        if len(self.order) == 1:
            return x.index_select(3, self.order[0])
        return x.gather(3, self.order[:, None, None].expand(x.shape))

    def _put_in_order(self, x: Tensor, out: Tensor) -> None:
        """The inverse, into the first of `out` (B, H, G, T or more)."""
        if len(self.order) == 1:
            out.index_copy_(3, self.order[0], x)
        else:
            out.scatter_(3, self.order[:, None, None].expand(x.shape), x)
