"""Reading latents without rebuilding all keys: rough scores of all tokens, exact keys of those that matter.

    keys of a layer, before rotation     k = z @ axes + mean           z (T, R), channels by falling importance
    score of a token                     s = q . rotate(k, position)

Rebuilding costs R * D for every token and kv head. But the rotation may change sides, s = turn(q, -position) . k, and
is nearly the same for the tokens of a block. So a block is scored with a few vectors of R numbers, and no key is made:

    rough     s ~ z . u + q . rotate(mean, position),  u = axes @ turn(q, -middle of the block)
              leading channels only. Pairs of channels that turn slowly share their vectors in large blocks, those that
              turn fast in small ones, and what is turned around within a small block is left to the mean
    choose    the tokens whose share of the attention counts, for each kv head; of few tokens all
    exact     rebuild and rotate their keys, and put exact scores in their places
    weigh     all tokens take part in the softmax and in the values, (weights @ z) @ axes

Source: keys that are rebuilt for chosen tokens are xKV's (arXiv 2503.18893, section 4.3) and SALS's (arXiv 2510.24273);
here the other tokens keep their rough scores instead of none.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..abilities import Linear
from ..floats import wide
from ..types import take_tokens

if TYPE_CHECKING:
    from ..turns import Blocks, Turns

__all__ = ["COUNTS", "EVEN", "FEWEST", "Decoded", "Decoding", "LatentReader", "LinearReader", "Reading"]

FEWEST = 4
"""A share of `exact`, 1 / 4: so many keys are rebuilt whatever their shares, since rough scores of a model with very
large keys may be far off."""
COUNTS, EVEN = 3e-4, 2
"""A token's key is rebuilt where its share of the attention is so large, or as large as that of so many tokens if all
had the same."""


class LinearReader(Protocol):
    """Answers one query of a layer from its sealed tokens, and then from raw ones."""

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        """A scaled `query` (B, H, G, D) times the sealed keys, and then times `raw` ones: (B, H, G, T)."""

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        """`weights` (B, H, G, T) times the sealed values, and then `raw` ones: (B, H, G, D)."""


class Decoding(Protocol):
    """A latent that can be decoded: `z` (B, T, R)."""

    @property
    def z(self) -> Tensor: ...

    @property
    def tokens(self) -> int: ...


class Decoded:
    """A latent as plain numbers, (B, T, R)."""

    def __init__(self, z: Tensor) -> None:
        self.z = wide(z.squeeze(1))
        self.tokens = z.shape[2]


class Reading:
    """The knowledge that readers of one layer share.

    Args:
        keys, values: the maps from latents to the layer's keys and values; `keys` before rotation.
        tokens: that are sealed.
        turns: the rotation of the sealed tokens' keys.
        exact: keys that are rebuilt for each kv head, at most.
        rough: channels that score the others.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        tokens: int,
        turns: Turns,
        exact: int,
        rough: int,
    ) -> None:
        self.keys, self.values, self.turns, self.tokens = keys, values, turns, tokens
        self.exact, self.fewest = min(exact, tokens), min(-(-exact // FEWEST), tokens)
        # where nothing is rotated, scores of all channels are exact
        self.rough = min(rough, keys.axes.shape[1]) if turns.rotates else keys.axes.shape[1]

    @cached_property
    def key_axes(self) -> Tensor:
        """The axes of the keys (B or 1, R, H, D), as numbers."""
        return self.keys.rows()

    @property
    def rebuilds_all(self) -> bool:
        """Return True if all keys may be rebuilt: then they are, and no score is rough."""
        return self.turns.rotates and self.exact == self.tokens

    @property
    def least(self) -> float:
        """The share of the attention from which on a token's key is rebuilt."""
        return min(COUNTS, EVEN / self.tokens)


class LatentReader(Reading):
    """Answers one query from the latents of one layer, in plain torch.

    Args:
        latents: those of the keys and of the values, decoded; the same where they have one.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        latents: tuple[Decoding, Decoding],
        turns: Turns,
        exact: int,
        rough: int,
    ) -> None:
        super().__init__(keys, values, latents[0].tokens, turns, exact, rough)
        self.for_keys, self.for_values = latents

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        loose = query @ raw.to(query.dtype).mT
        if self.rebuilds_all:
            every = torch.arange(self.tokens, device=query.device).expand(*query.shape[:2], -1)
            return torch.cat([self._exact(query, every), loose], dim=-1)
        scores = self._rough(query)
        if self.turns.rotates:
            total = torch.cat([scores, loose], dim=-1).logsumexp(-1, keepdim=True)
            shares, places = (scores - total).amax(2).topk(self.exact, dim=-1)  # (B, H, n), for any query of a kv head
            counts = shares >= math.log(self.least)
            counts[..., : self.fewest] = True  # those of the largest shares come first
            if query.device.type == "cpu":  # elsewhere the host would wait for it
                most = int(counts.sum(-1).max())
                places, counts = places[..., :most], counts[..., :most]
            index = places.unsqueeze(2).expand(-1, -1, query.shape[2], -1)
            found = torch.where(counts.unsqueeze(2), self._exact(query, places), scores.gather(3, index))
            scores = scores.scatter(3, index, found)
        return torch.cat([scores, loose], dim=-1)

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        weights, loose = weights.tensor_split([self.tokens], dim=-1)
        mixed = self._weigh(weights)
        out = mixed @ self.values.rows().to(mixed.dtype).transpose(1, 2)
        if self.values.mean is not None:
            out = out + weights.sum(-1, keepdim=True) * self.values.mean.to(mixed.dtype).unsqueeze(1)
        return out + loose @ raw.to(loose.dtype)

    def _weigh(self, weights: Tensor) -> Tensor:
        """`weights` (B, H, G, T) times the latents of the values: (B, H, G, R)."""
        z = self.for_values.z
        return (weights.flatten(1, 2).to(z) @ z).unflatten(1, weights.shape[1:3])

    # ---- rough scores

    def _rough(self, query: Tensor) -> Tensor:
        """(B, H, G, T)."""
        fast, slow = self.turns.fast, self.turns.slow
        # one vector for each small block
        far = self._vectors(slow, query).repeat_interleave(slow.size // fast.size, dim=2)
        scores = self._products(self._vectors(fast, query) + far[:, :, : fast.count], fast.size)
        if self.keys.mean is None:
            return scores
        turning, still = self.turns.facing(query, self.keys.mean)
        return scores + still.unsqueeze(-1) + turning @ self.turns.angles.unsqueeze(1).to(scores.dtype)

    def _products(self, vectors: Tensor, size: int) -> Tensor:
        """Leading channels of all tokens times `vectors` (B, H, blocks, G, r) of their blocks: (B, H, G, T)."""
        z = self.for_keys.z[..., : self.rough]
        z = torch.nn.functional.pad(z, (0, 0, 0, -self.tokens % size)).unflatten(1, (-1, size))
        scores = vectors @ z.unsqueeze(1).mT  # (B, H, blocks, G, size)
        return scores.transpose(2, 3).flatten(3)[..., : self.tokens]

    def _vectors(self, blocks: Blocks, query: Tensor) -> Tensor:
        """Return the products of a query, turned back for each block, with the leading axes: (B, H, blocks, G, r)."""
        facing = blocks.facing(query)  # (B, H, blocks, G, C)
        axes = self.key_axes[:, : self.rough].index_select(3, blocks.channels).to(facing.dtype)  # (B or 1, r, H, C)
        return (facing.flatten(2, 3) @ axes.permute(0, 2, 3, 1)).unflatten(2, facing.shape[2:4])

    # ---- exact scores

    def _exact(self, query: Tensor, places: Tensor) -> Tensor:
        """Scores of the tokens at `places` (B, H, n), from keys that are rebuilt: (B, H, G, n)."""
        h, n = places.shape[1:]
        z = take_tokens(self.for_keys.z.unsqueeze(1), places.flatten(1).unsqueeze(1))[:, 0].unflatten(1, (h, n))
        keys = z @ self.key_axes.to(z.dtype).transpose(1, 2)  # (B, H, n, D)
        if self.keys.mean is not None:
            keys = keys + self.keys.mean.to(z.dtype).unsqueeze(1)
        return query @ self.turns.rotate_at(keys, places).to(query.dtype).mT
