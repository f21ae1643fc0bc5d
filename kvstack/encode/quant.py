"""The quantizing stage: settings and checks; the arithmetic is in one codec a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ..errors import BindError
from ..packed import Packed
from ..read.codes import fastest
from ..stage import Encode, Reader, check
from ..types import Channels
from ..waterfilling import spread_by_class
from ..workspace import Workspace
from .blockwise import Blockwise
from .channel_codes import ChannelCodes, bits_of
from .kivi import Kivi

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Quant"]

BITS = {"kivi": (2, 3, 4, 8), "nf4": (4,), "fp4": (4,), "int8": (8,)}


@dataclass(frozen=True, repr=False)
class Quant(Encode):
    """Store every number in a few bits.

    Args:
        bits: bits per number: 2, 3, 4 or 8 with `kivi`, 4 with `nf4` and `fp4`, 8 with `int8`.
            Scales come on top: 32 bits per group with `kivi`, 16 with the others. Where a transform knows how much
            energy each channel of its latents has, `kivi` gives way to codes of 0 to 12 bits a channel that are `bits`
            on average, scales included.
        group: numbers that share a scale; default 32 for `kivi`, 64 for the others.
        codec: `kivi` (default; asymmetric, keys per channel, values per token), or bitsandbytes' `nf4`, `fp4`,
            `int8`.

    Source: KIVI, arXiv 2402.02750; bitsandbytes, arXiv 2110.02861 and 2305.14314. Differs from KIVI: a token is
    encoded once, when it leaves the stack's recent window, keys and values together.

    Example:
        >>> from kvstack import KVStack, Quant
        >>> KVStack([Quant(2)])
        KVStack([Quant(bits=2)])
    """

    bits: int
    group: int | None = None
    codec: str = "kivi"

    name = "quant"
    source = "arXiv 2402.02750"
    saves = "bits per number"

    def __post_init__(self) -> None:
        check(self.codec in BITS, self, f"no codec is called {self.codec!r}.", f"Use one of: {', '.join(BITS)}.")
        packed = ", ".join(map(str, BITS[self.codec]))
        check(
            isinstance(self.bits, int) and self.bits in BITS[self.codec],
            self,
            f"{self.codec} packs codes of {packed} bits.",
            "Use one of these." if len(BITS[self.codec]) > 1 else f"Use Quant({packed}, codec={self.codec!r}).",
        )
        group = self.group
        if self.codec == "kivi":
            fits = group is None or (isinstance(group, int) and group >= 8 and group % 8 == 0)
            check(fits, self, "a group must be a multiple of 8, so that its codes fill whole bytes.", "Use group=32.")
        else:
            fits = group is None or group in (64, 128, 256, 512, 1024, 2048, 4096)
            check(fits, self, "bitsandbytes knows blocks of 64, 128, 256, ... 4096 numbers.", "Use group=64.")

    @cached_property
    def coder(self) -> Kivi | Blockwise:
        if self.codec == "kivi":
            return Kivi(self.bits, self.group or 32)
        return Blockwise(self.codec, self.group or 64)

    def bind(self, model: PreTrainedModel) -> Self:
        for width in _head_sizes(model.config.get_text_config(decoder=True)):
            if problem := self.coder.problem(width):
                raise BindError(
                    f"{self!r} does not fit {type(model).__name__}: {problem} Use a group that divides {width}."
                )
        return self

    def granule(self, width: int) -> int:
        # both kinds of tensor are cut at the same tokens
        return max(self.coder.granule(width, "keys"), self.coder.granule(width, "values"))

    @property
    def reads_room(self) -> bool:
        return isinstance(self.coder, Kivi)  # bitsandbytes reads codes that lie side by side

    def allot(self, channels: Sequence[Channels], numbers: int) -> Sequence[ChannelCodes] | None:
        each = self.allot_by_class(channels, numbers, (1.0,), (1.0,))
        return None if each is None else each[0]

    def allot_by_class(
        self, channels: Sequence[Channels], numbers: int, shares: Sequence[float], weights: Sequence[float]
    ) -> Sequence[Sequence[ChannelCodes]] | None:
        if self.codec != "kivi":
            return None
        energies = [known.energy for known in channels]
        by_class = _within(energies, self.bits * numbers, shares, weights)
        return [[_encoder(*each) for each in zip(energies, counts, strict=True)] for counts in by_class]

    def reader(self, device: torch.device) -> Reader:
        return fastest(self.coder, device) if isinstance(self.coder, Kivi) else self

    def encode(self, x: Tensor, role: str) -> Packed:
        return self.coder.encode(x, role)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        return self.coder.decode(packed, role, out)

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        return self.coder.dot(query, packed, role, work)

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        return self.coder.mix(weights, packed, role, work)


def _within(
    energies: Sequence[Tensor], bits: int, shares: Sequence[float], weights: Sequence[float]
) -> list[list[Tensor]]:
    """Widths of all channels, for tokens of each class, that take `bits` bits a token at most in the mean, gains
    included, or one bit for each latent where that is more: without any channel it could not be stored."""
    for_codes = float(bits)
    while True:
        by_class = spread_by_class(energies, for_codes, shares, weights)
        for widths in by_class:
            for each in widths:
                each[:1].clamp_(min=1)
        spent = sum(share * sum(map(bits_of, widths)) for share, widths in zip(shares, by_class, strict=True))
        over = spent - bits * (1 + 1e-9)
        if over <= 0 or not for_codes:
            return by_class
        for_codes = max(0.0, for_codes - max(over, min(shares)))


def _encoder(energy: Tensor, widths: Tensor) -> ChannelCodes:
    rank = int((widths > 0).sum())
    return ChannelCodes(energy[:rank].clone(), widths[:rank].clone())


def _head_sizes(config: Any) -> set[int]:
    """The head sizes of a model's full-attention layers, which may differ from layer to layer (Gemma 4)."""
    each = getattr(config, "per_layer_config", None) or [config]
    kinds = getattr(config, "layer_types", None) or []
    full = [one for one, kind in zip(each, kinds, strict=False) if kind == "full_attention"]
    return {
        getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads
        for one in (full if len(each) > 1 and full else each)
    }
