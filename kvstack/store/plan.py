"""The plan of a stack for its tokens, decided once: its stages by kind and the numbers they agreed on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..abilities import FitsText, NeedsHidden, ReadsLinearly, RefitsText
from ..encode.exact import EXACT, Exact
from ..heads import ALONE, Heads
from ..read import latents
from ..select.choosing import Select
from ..select.evict import Evict
from ..select.tiers import Tiers
from ..stage import BoundTransform, Codec, Encode, Encoder, Ranking, Reader, check

__all__ = ["Plan", "Spans"]


class Spans(NamedTuple):
    """The stack's own settings: how many tokens stay as they are at both ends, how many are compressed at a time while
    decoding, and the device of sealed ones (None: that of their layers)."""

    sinks: int
    window: int
    block: int
    device: torch.device | None = None


@dataclass(frozen=True)
class Plan:
    """The stages of a stack, bound, and the stack's own settings.

    Attributes:
        codecs: one for each group of layers that a transform stores together, in the order of the layers.
        ranking: what ranks tokens for `evict`.
        budgets: layer -> (H, points of `GRID`), the shares of the tokens that its heads keep; None: all keep equally
            many.
        heads: the kv heads that other processes hold.
    """

    select: Select | None
    transform: BoundTransform | None
    encode: Encode | None
    sinks: int
    window: int
    block: int
    device: torch.device | None = None
    codecs: Sequence[Codec] = ()
    heads: Heads = ALONE
    ranking: Ranking | None = None
    budgets: Mapping[int, Tensor] | None = None
    _granules: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _readers: dict[str, Reader] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for codec in self.codecs:
            check(
                not (isinstance(codec, NeedsHidden) and isinstance(codec, RefitsText)),
                self.transform and self.transform.stage,
                "it wants hidden states and may be fitted again, and those of compressed tokens are not kept.",
                "Leave out hidden states, or the setting that fits it again.",
            )

    @property
    def evict(self) -> Evict | None:
        """The stage that drops tokens."""
        return self.select if isinstance(self.select, Evict) else None

    @property
    def tiers(self) -> Tiers | None:
        """The stage that puts tokens into classes."""
        return self.select if isinstance(self.select, Tiers) else None

    @cached_property
    def renumbers(self) -> bool:
        """Return True if attention sees the places of tokens inside the cache, and not those in the text."""
        return self.evict is not None and self.evict.positions == "cache"

    @cached_property
    def rotates_late(self) -> bool:
        """Return True if sealed keys are held without rotary embedding, and rotated when they are read."""
        return self.transform is not None and self.transform.unrotated

    @cached_property
    def fuses(self) -> bool:
        """Return True if packed keys can be read as they are. Those that were rotated to another position must be
        decoded and turned first."""
        return self.rotates_late or not self.renumbers

    @cached_property
    def seals(self) -> bool:
        """Return True if tokens are encoded at all."""
        return self.encode is not None

    @cached_property
    def first_block_only(self) -> bool:
        """Return True if only the first block of a text is sealed."""
        return any(isinstance(codec, FitsText) and codec.first_block_only for codec in self.codecs)

    @cached_property
    def stored_together(self) -> int:
        """Adjacent layers that one codec stores."""
        return self.transform.layers if self.transform else 1

    @cached_property
    def layers(self) -> int:
        """Adjacent layers that are handled together: stored together, or evicted together."""
        if self.select is None:
            return self.stored_together
        stored = self.transform.layers if self.transform else None
        return max(self.select.layers or stored or self.select.usual_layers, self.stored_together)

    @cached_property
    def share_heads(self) -> bool:
        """Return True if one token set serves all heads (and layers) of a group."""
        wish = bool(self.select and self.select.share_heads) or bool(
            self.transform and self.transform.stage.share_heads
        )
        return wish or self.layers > 1

    @cached_property
    def references(self) -> bool:
        """Return True if queries of the whole forward are wanted."""
        return self.select is not None and self.select.references

    @cached_property
    def rereads(self) -> bool:
        """Return True if a text is read a second time before it is compressed."""
        return self.select is not None and self.select.rereads

    @cached_property
    def refits(self) -> bool:
        """Return True if tokens that stay are made to stand in for those that are dropped."""
        return self.select is not None and self.select.refit

    @cached_property
    def hidden(self) -> bool:
        """Return True if the hidden states of raw tokens are held too."""
        return any(isinstance(codec, NeedsHidden) for codec in self.codecs)

    @cached_property
    def own_encoder(self) -> bool:
        """Return True if the user named an encoder: without one, what a transform made is stored."""
        return self.encode is not None and not isinstance(self.encode, Exact)

    def reader(self, device: torch.device) -> Reader:
        """The reader that answers a single query from codes on `device`."""
        assert self.encode is not None
        if device.type not in self._readers:
            self._readers[device.type] = self.encode.reader(device)
        return self._readers[device.type]

    def reads_with(self, device: torch.device) -> frozenset[str]:
        """Names of the readers that answer a single query from sealed tokens on `device`."""
        if self.encode is None or not self.fuses:
            return frozenset()
        if not self.codecs:
            return frozenset({self.reader(device).reads_with})
        encoders = [encoder for codec in self.codecs for encoder in self._encoders_of(codec)]
        return frozenset(latents.reads_with(encoder, device) for encoder in encoders)

    def _encoders_of(self, codec: Codec) -> Sequence[Encoder]:
        """The encoders of the latents that are read in place, if any."""
        assert self.encode is not None
        if not isinstance(codec, ReadsLinearly) or codec.exact is None:
            return [EXACT]
        lower = (encoder for classes in codec.lower.values() for encoder in classes)
        return [*codec.encoders.values(), *lower] or [self.encode]

    def granule(self, width: int) -> int:
        """Tokens that are sealed, and dropped, together where a key has `width` channels."""
        if self.encode is None:
            return 1
        if not self.codecs:
            return self.encode.granule(width)
        if width not in self._granules:
            self._granules[width] = math.lcm(*(_granule(codec, self.encode, width) for codec in self.codecs))
        return self._granules[width]


def _granule(codec: Codec, encode: Encode, width: int) -> int:
    lower = (encoder for classes in codec.lower.values() for encoder in classes)
    encoders = [*codec.encoders.values(), *lower] or [encode]
    packed = math.lcm(*(encoder.granule(width) for encoder in encoders))
    # as many granules of the transform as make whole ones of the encoder out of any share of them
    return codec.granule * (packed // math.gcd(packed, codec.latent_multiple))
