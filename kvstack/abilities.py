"""Abilities of a codec, or of a bound transform, beyond `forward` and `inverse`: small classes to inherit from.

    NeedsHidden      forward looks at hidden states too
    ReadsDirectly    one query is answered without rebuilding keys and values
      ReadsLinearly  and from rough scores, but for the tokens that matter
    FitsText         fitted to each text: axes, means or codebooks of its own
      RefitsText     and fitted again where they no longer serve the text
    Budgeted         (of a bound transform) channels of all groups compete for one budget

The stack asks `isinstance`, nothing else: a codec can do what it inherits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from .stage import BoundTransform, Codec, Encoder
from .types import KV, Channels

__all__ = [
    "FINE",
    "Allotment",
    "Budgeted",
    "FitsText",
    "Linear",
    "NeedsHidden",
    "PackedAxes",
    "ReadsDirectly",
    "ReadsLinearly",
    "RefitsText",
    "with_fine",
]


class NeedsHidden(Codec):
    """Wants `KV.hidden`, the hidden states that the attention modules were given; they are held for raw tokens."""


class ReadsDirectly(Codec):
    """Answers one query from latents."""

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        """The keys alone (B, H, T, D), as `inverse` gives them."""
        return self.inverse(latents, layer).keys

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        """`weights` (B, H, G, T) times the values: (B, H, G, D). Override to weigh the latents first."""
        return torch.matmul(weights, self.inverse(latents, layer).values.to(weights.dtype))


FINE = 256
"""Steps of a fine part in one step of a code."""


@dataclass(frozen=True, eq=False)
class PackedAxes:
    """Axes (1, R, H, D) as whole numbers: codes, times a scale for each axis and head, times a unit for each number.

    Attributes:
        codes: (R, H, D) int8, the numbers of an axis side by side.
        fine: (K, H, D) int8, 256ths of a code, of the leading axes; as far apart as `codes`.
        scale: (R, H) float32.
        unit: (H, D) float32.
    """

    codes: Tensor
    fine: Tensor
    scale: Tensor
    unit: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((1, *self.codes.shape))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def full(self, rank: int | None = None) -> Tensor:
        """The first `rank` axes, or all of them (1, R, H, D), float32."""
        first = self.first(rank)
        return (with_fine(first.codes, first.fine) * first.scale[:, :, None] * first.unit).unsqueeze(0)

    def first(self, rank: int | None) -> PackedAxes:
        """The first `rank` axes, or all of them, in the same memory."""
        return PackedAxes(self.codes[:rank], self.fine[:rank], self.scale[:rank], self.unit)


def with_fine(codes: Tensor, fine: Tensor) -> Tensor:
    """Codes, the first of them with their fine parts, float32."""
    rows = codes.float()
    rows[: len(fine)].add_(fine, alpha=1 / FINE)
    return rows


@dataclass(frozen=True, eq=False)
class Linear:
    """Keys or values (B, H, T, D) of one layer as one latent (B, 1, T, R) times axes, plus a mean.

    Attributes:
        latent: its name.
        axes: (B or 1, R, H, D), the most important channels first.
        mean: (H, D), or None.
    """

    latent: str
    axes: Tensor | PackedAxes
    mean: Tensor | None = None

    def rows(self) -> Tensor:
        """The axes (B or 1, R, H, D) as numbers."""
        return self.axes.full() if isinstance(self.axes, PackedAxes) else self.axes

    def first(self, rank: int) -> Linear:
        """The same from the first `rank` channels of the latent."""
        axes = self.axes.first(rank) if isinstance(self.axes, PackedAxes) else self.axes[:, :rank]
        return Linear(self.latent, axes, self.mean)


class ReadsLinearly(ReadsDirectly):
    """Makes keys and values of latents by a product each. So a single query needs no more than some keys rebuilt: see
    read/linear.py."""

    exact: int | None = None
    """Keys that are rebuilt for each kv head at most, None (the default): all."""
    rough: int = 512
    """Leading channels that score the other tokens."""

    def linear(self, kind: Literal["keys", "values"], layer: int) -> Linear | None:
        """Return the map from a latent to the keys or values of the group's layer number `layer`, keys as `inverse`
        gives them (the stack rotates); None if they do not come from one latent alone."""
        raise NotImplementedError  # the one method that such a codec must write

    def linears(self, layer: int) -> Sequence[tuple[Linear, Linear]]:
        """Return the maps from latents to the keys and values of a layer, one run of kv heads after the other; empty if
        there are none. Override this if heads are stored apart; by default all come from one latent."""
        keys, values = self.linear("keys", layer), self.linear("values", layer)
        return [] if keys is None or values is None else [(keys, values)]


class FitsText(Codec):
    """Is fitted to each text. What it found is `fitted`, named tensors (B, ...): the store counts, moves and saves
    them, and forgets them with the last sealed token."""

    fitted: Mapping[str, Tensor] = {}
    """The result of `fit`; empty: not fitted."""
    first_block_only: bool = False
    """True if only the first block of a text is sealed, and later tokens stay raw."""

    def min_tokens(self, group: Sequence[KV]) -> int:
        """Return the number of tokens that the first block of a text needs; fewer stay raw. `group` holds the raw
        tokens: its shapes tell how much there is to fit."""
        return 0

    def fit(self, group: Sequence[KV], decoded: int = 0) -> Self:
        """A copy fitted to these tokens: the first that are sealed or, in a refit, all that are. In a refit the
        first `decoded` ones were sealed before."""
        raise NotImplementedError  # the one method a codec that is fitted must write

    def with_fitted(self, fitted: Mapping[str, Tensor]) -> Self:
        """A copy with `fitted` in place of its own: rows of it, or what was saved. Empty: not fitted any more."""
        raise NotImplementedError  # the other one

    def check_fitted(self, group: Sequence[KV]) -> None:
        """Raise `UseError` where `fitted`, which comes from a file, is not what `fit` makes of keys and values like
        those of `group`. Every tensor has the rows of the batch, and no number is infinite."""


class RefitsText(FitsText):
    """May be fitted again: to the decoded old tokens and the new ones, which are then all encoded again."""

    def needs_refit(self, group: Sequence[KV]) -> bool:
        """Return True if the fit is bad for these new tokens."""
        return False


@dataclass(frozen=True)
class Allotment:
    """The share of one latent: it stores its leading `rank` channels, packed by `encoder` (None: by the stack's own).

    Attributes:
        lower: if tokens are in classes, the encoders of the other classes, which keep as many channels or fewer.
    """

    rank: int
    encoder: Encoder | None = None
    lower: Sequence[Encoder] = ()


class Budgeted(BoundTransform):
    """Channels of all groups compete for one budget: of bits where the encoder can spend them unevenly, of numbers
    otherwise."""

    @property
    def numbers(self) -> int:
        """Numbers kept per token in all groups together."""
        raise NotImplementedError

    @property
    def channels(self) -> Sequence[Channels]:
        """The channels of every latent, group by group."""
        raise NotImplementedError

    def ample(self, allotments: Sequence[Allotment]) -> Self:
        """This, or a copy with more channels where what is allotted calls for them."""
        return self

    def allotted(self, allotments: Sequence[Allotment]) -> Self:
        """A copy that stores just what is allotted to it, one allotment for each of `channels`."""
        raise NotImplementedError
