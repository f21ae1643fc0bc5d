"""The words every other file uses, and the small values that travel between stages.

Shapes are written with one vocabulary:

    B  batch rows          H  key/value heads      G  query heads per kv head
    T  tokens              D  head size            R  rank (channels of a latent)
    Q  queries (tokens of the running forward, or the most recent ones)

Two lengths, never one: `seen` counts the tokens the model saw (it feeds positions), `held` the tokens that
are stored (it feeds masks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .heads import ALONE, Heads

if TYPE_CHECKING:
    from .turns import Turns

__all__ = [
    "KV",
    "LONG",
    "Channels",
    "Context",
    "Latent",
    "Layout",
    "Rotation",
    "TokenRotation",
    "positions_between",
    "take_tokens",
]


LONG = 1 << 30
"""Added to a position that a forward rotated by tables for longer texts than the position itself asks for."""


class TokenRotation(Protocol):
    """The rotation of one layer for the tokens of a text, named by their indices in it (0 is the first token).

    The rotation goes through the positions that the model was given for these tokens, whatever they were. With
    `Evict(positions="cache")` it goes through their places in the cache, which attention sees."""

    def rotate(self, x: Tensor, positions: Tensor, /) -> Tensor:
        """Rotate `x` (B, H, T, D) as the tokens at `positions` (B or 1, H or 1, T) were, or will be. One row of `x`
        becomes several where the rows of the text were given positions of their own."""

    def unrotate(self, x: Tensor, positions: Tensor, /) -> Tensor:
        """The inverse of `rotate`."""


class Rotation(TokenRotation, Protocol):
    """The rotary embedding of one layer: `positions` are those that the model was given, (B or 1, H or 1, T), or
    (B or 1, axes, H or 1, T) where these are not the indices of the tokens."""

    def turns(self, positions: Tensor, width: int, /) -> Turns | None:
        """Return the turns of heads of `width` channels at positions that are the same for all
        heads; None if they are not turned pair by pair."""

    def move(self, was: Tensor, now: Tensor, /) -> Callable[[Tensor], Tensor]:
        """Return what rotates keys from one place to another: `unrotate` and `rotate` at once."""

    def remember(self, positions: Tensor, /) -> None:
        """Keep the tables for these positions until `forget`."""

    def forget(self) -> None: ...


@dataclass(frozen=True)
class KV:
    """Keys and values of one layer.

    Keys are as the model caches them (after rotary embedding) unless a transform asked for them un-rotated.
    `hidden` is what the attention module was given, where a transform asked for it (`NeedsHidden`).
    """

    keys: Tensor  # (B, H, T, D)
    values: Tensor  # (B, H, T, D)
    hidden: Tensor | None = None  # (B, 1, T, hidden size)

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def only(self, kind: str) -> KV:
        """The `keys` or the `values` alone: the other one has no channels."""
        none = self.keys[..., :0]
        return KV(self.keys, none) if kind == "keys" else KV(none, self.values)

    def take(self, index: Tensor) -> KV:
        """The tokens at `index` (B or 1, H or 1, n), one choice per row and head."""
        return KV(take_tokens(self.keys, index), take_tokens(self.values, index))


@dataclass(frozen=True)
class Context:
    """The facts that a score may use about the tokens it is given, next to their keys and values.

    Attributes:
        layer: index of the layer in the model.
        seen: tokens this sequence has fed through the model so far.
        positions: (B or 1, H or 1, T) index in the text of every candidate token, ascending, padding not counted.
        queries: (B, H*G, Q, D) queries of the newest Q tokens as attention used them, or None if the score
            did not ask for any (`Score.queries`).
        scaling: the factor attention multiplies `q @ k` with.
        memory: per-token tensors (B, H, T) that the score's own `track` returned last time.
        references: queries (B, H*G, n, D) that are spread evenly over the newest forward of several tokens, or the last
            single ones, and the indices (n,) of their tokens in the text; None if the score did not ask for them
            (`Score.references`).
        rope: rotates and un-rotates keys of this layer, or None where it has no rotary embedding. It takes indices
            such as `positions`, and goes through the positions that the model was given for them.
        sinks, window: numbers of first and last tokens that are always kept, with any scores.
        heads: the kv heads that other processes hold (tensor parallelism). A score that looks at several heads at once
            takes their mean or maximum with it.
    """

    layer: int
    seen: int
    positions: Tensor
    queries: Tensor | None = None
    scaling: float = 1.0
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    rope: TokenRotation | None = None
    sinks: int = 0
    window: int = 0
    heads: Heads = ALONE
    references: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one group's latent, before any token is read. They belong to the model, not to a cache.

    Attributes:
        energy: (R,) variance of each channel, falling.
    """

    energy: Tensor

    def __len__(self) -> int:
        return len(self.energy)


@dataclass(frozen=True)
class Latent:
    """One named tensor that a transform wants stored: channels last, tokens before them.

    Attributes:
        data: (B, H or 1, T, R). It may hold fewer tokens than the block, the same number in every granule of the
            codec (`Codec.granule`).
        exact: store it as it is, without any encoder.
    """

    data: Tensor
    exact: bool = False


@dataclass(frozen=True)
class Layout:
    """The sizes, types and device of a model's cache in one layer, for one token of one row.

    Attributes:
        heads: key and value heads.
        queries: query heads of each of them, 0 where that is not known.
        key_width, value_width: numbers of a key and of a value.
        key_dtype, value_dtype: their types.
        hidden: size of the hidden states.
    """

    heads: int
    queries: int
    key_width: int
    value_width: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    hidden: int
    device: torch.device

    @property
    def numbers(self) -> int:
        """Numbers of keys and values together."""
        return self.heads * (self.key_width + self.value_width)


def positions_between(start: int, stop: int, device: torch.device) -> Tensor:
    """Positions as int32: they are stored, and four bytes reach any text."""
    return torch.arange(start, stop, dtype=torch.int32, device=device)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens of `x` (B, H, T, ...) at `index` (B or 1, H or 1, n), which broadcasts over rows and heads."""
    rows, heads = x.shape[:2]
    n = index.shape[-1]
    # layers of a group may live on several devices
    index = index.to(x.device).long().view(*index.shape, *[1] * (x.dim() - 3))
    return x.gather(2, index.expand(rows, heads, n, *x.shape[3:]))
