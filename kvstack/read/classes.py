"""Reading latents of tokens in classes: each is packed in its own way, and a reader of its own reads it in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear import LatentReader
from .linear_numba import CodesReader, scored

__all__ = ["ByClass"]


class ByClass:
    """Answers one query of a layer whose sealed tokens are in classes.

    Args:
        readers: one for each class, all of one kind.
        places: (B, n) of each class, where its tokens are among all that are sealed.
    """

    def __init__(self, readers: Sequence[LatentReader | CodesReader], places: Sequence[Tensor]) -> None:
        self.readers = readers
        self.counts = [each.shape[1] for each in places]
        self.order = torch.cat(list(places), dim=1)  # (B, T), class by class

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        sealed, loose = self._scores(query, raw).tensor_split([self.order.shape[1]], dim=-1)
        return torch.cat([self._in_order(sealed), loose], dim=-1)

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        sealed, loose = weights.tensor_split([self.order.shape[1]], dim=-1)
        first, *others = self._by_class(sealed).split(self.counts, dim=-1)
        mixed = self.readers[0].mix(torch.cat([first, loose], dim=-1), raw)
        for reader, mine in zip(self.readers[1:], others, strict=True):
            mixed = mixed + reader.mix(mine, raw[:, :, :0])
        return mixed

    def _scores(self, query: Tensor, raw: Tensor) -> Tensor:
        """Scores of the classes, one behind the other, and of `raw` keys."""
        codes = [each for each in self.readers if isinstance(each, CodesReader)]
        if len(codes) == len(self.readers):
            return scored(codes, query, raw)
        # a GPU rebuilds as many keys of each class as of all: to choose among them would make it wait
        parts = [each.dot(query, raw).tensor_split([n], -1) for each, n in zip(self.readers, self.counts, strict=True)]
        return torch.cat([*(sealed for sealed, _ in parts), parts[0][1]], dim=-1)

    def _by_class(self, x: Tensor) -> Tensor:
        """Numbers (B, H, G, T) in the order of positions -> class by class."""
        if len(self.order) == 1:
            return x.index_select(3, self.order[0])
        return x.gather(3, self.order[:, None, None].expand(x.shape))

    def _in_order(self, x: Tensor) -> Tensor:
        """The inverse."""
        if len(self.order) == 1:
            return torch.empty_like(x).index_copy_(3, self.order[0], x)
        return torch.empty_like(x).scatter_(3, self.order[:, None, None].expand(x.shape), x)
