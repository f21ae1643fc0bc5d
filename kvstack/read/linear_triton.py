"""Reading latents in codes of channels on a GPU (triton/channels.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..abilities import Linear
from ..encode.channel_codes import GRANULE, ChannelCodes
from ..packed import Packed
from .linear import Decoded, LatentReader
from .sizes import padded
from .triton.launch import LARGEST, MOST

if TYPE_CHECKING:
    from ..turns import Turns
    from .triton import channels

__all__ = ["DeviceCodes", "TritonReader"]


class DeviceCodes:
    """A latent in codes of channels on a GPU: Triton's kernels read them, and where these do not serve, it is decoded
    once."""

    def __init__(self, encoder: ChannelCodes, packed: Packed) -> None:
        self.encoder, self.packed, self.tokens = encoder, packed, packed.tokens

    @cached_property
    def z(self) -> Tensor:
        return Decoded(self.encoder.decode(self.packed, "latent")).z

    @cached_property
    def latent(self) -> channels.Latent:
        """As kernels are given it."""
        from .triton import channels

        packed = self.packed.apart_evenly()
        codes, gains = packed.parts["codes"], packed.parts["gains"]
        return channels.Latent(codes, gains, packed.apart // GRANULE, channels.tables(self.encoder))


class TritonReader(LatentReader):
    """Answers one query from codes on a GPU. If all keys may be rebuilt, they are, and there are no rough scores.

    Args:
        agrees: tells of a device, queries of a kv head, D, turning pairs and `mean` whether kernels are right.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        latents: tuple[DeviceCodes, DeviceCodes],
        turns: Turns,
        exact: int,
        rough: int,
        agrees: Callable[..., bool],
    ) -> None:
        super().__init__(keys, values, latents, turns, exact, rough)
        self.key_codes, self.value_codes = latents
        self.agrees = agrees

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        if not (self.rebuilds_all and self._serves(query, query.shape[2])):
            return super().dot(query, raw)
        scores = torch.empty(*query.shape[:3], self.tokens + raw.shape[2], device=query.device)
        scores[..., self.tokens :] = query @ raw.to(query.dtype).mT
        self._score(query, None, scores)
        return scores

    def _rough(self, query: Tensor) -> Tensor:
        if self.turns.rotates or not self._serves(query, query.shape[2]):
            return super()._rough(query)
        # without a rotation, all tokens are one block
        vectors = (query @ self.key_axes.to(query.dtype).permute(0, 2, 3, 1)).unsqueeze(2)
        scores = self._products(vectors, padded(self.tokens, 64))
        return scores if self.keys.mean is None else scores + query @ self.keys.mean.to(query.dtype).unsqueeze(-1)

    def _products(self, vectors: Tensor, size: int) -> Tensor:
        if not self._serves(vectors, vectors.shape[3]):
            return super()._products(vectors, size)
        from .triton import channels

        return channels.project(vectors, self.key_codes.latent, size)

    def _exact(self, query: Tensor, places: Tensor) -> Tensor:
        if not (self.turns.rotates and self._serves(query, query.shape[2])):
            return super()._exact(query, places)
        scores = torch.empty(*query.shape[:3], places.shape[2], device=query.device)
        self._score(query, places, scores)
        return scores

    def _weigh(self, weights: Tensor) -> Tensor:
        if not self._serves(weights, weights.shape[2]):
            return super()._weigh(weights)
        from .triton import channels

        return channels.mix(weights, self.value_codes.latent, self.values.axes.shape[1])

    def _score(self, query: Tensor, places: Tensor | None, scores: Tensor) -> None:
        """Write exact scores of the tokens at `places` (B, H, n), or of all."""
        from .triton import channels

        keys, turns = self.keys, self.turns
        every, angles = turns.pairs.every, turns.angles
        channels.scores(query, self.key_codes.latent, self.key_axes, keys.mean, every, angles, places, scores)

    def _serves(self, x: Tensor, queries: int) -> bool:
        """Return True if there are kernels for `x`, of so many queries of each kv head, that were seen to be right."""
        width, mean = self.keys.axes.shape[3], self.keys.mean is not None
        if x.dtype != torch.float32 or x.device != self.key_codes.latent.codes.device:
            return False
        if width > LARGEST or queries > MOST:
            return False
        return self.agrees(x.device, queries, width, len(self.turns.pairs.first), mean=mean)
