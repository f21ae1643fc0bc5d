"""Codes for the channels of a latent whose variances are known: as many bits for each as its energy is worth.

    z (B, H, T, R), channels by falling energy     | 9 9 | 5 5 5 | 3 3 3 3 | 2 2 ... | 1 1 1 ... | (0: not stored)
    codes (B, H, T/8, bytes)     8 tokens together   9*2    5*3      3*4       ...         bytes
    gains (B, H, T/8, 2*runs)    one of four a token and run, in 2 bits

    z ~ (code - (2^bits - 1) / 2) * step[bits] * gain * sqrt(energy)

Steps are those of a Gaussian of the channel's variance, so no scale is stored with the tokens. But tokens are not
Gaussian: some exceed the range of all their channels at once, others fill a part of it. So every run of channels of
equal width has a gain, for each token the one of four that leaves the least error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UseError
from ..floats import saturated
from ..packed import Packed
from ..stage import ChannelEncoder
from ..waterfilling import STEPS
from .bits import pack, unpack

__all__ = ["GAIN_BITS", "GRANULE", "ChannelCodes", "bits_of"]

GRANULE = 8
"""Tokens whose codes fill whole bytes at any width."""
GAINS = (1 / math.sqrt(2), 1.0, math.sqrt(2), 2.0)
GAIN_BITS = 2
TINY = 1e-6  # a channel without energy still divides
FAR = 1e6  # deviations; far beyond all codes, and its square is a number


def bits_of(widths: Tensor) -> int:
    """Bits that a token takes when its channels have so many each (R,), gains included."""
    stored = widths[widths > 0]
    return int(stored.sum()) + GAIN_BITS * len(stored.unique_consecutive())


@dataclass(frozen=True, eq=False)
class ChannelCodes(ChannelEncoder):
    """Codes for one latent.

    Args:
        energy: (R,) variance of each channel, falling.
        bits: (R,) uint8, how many bits each takes: 1 to 12, falling.
    """

    energy: Tensor
    bits: Tensor

    @property
    def rank(self) -> int:
        return len(self.bits)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self.energy, self.bits)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(bits, channels that have as many), in the order of the channels."""
        widths, counts = self.bits.unique_consecutive(return_counts=True)
        return tuple(zip(widths.tolist(), counts.tolist(), strict=True))

    @property
    def deviation(self) -> Tensor:
        """(R,) standard deviation of each channel, above zero."""
        deviation = self.energy.sqrt()
        return torch.maximum(deviation, TINY * deviation.max() + torch.finfo(deviation.dtype).tiny)

    @cached_property
    def steps(self) -> Tensor:
        """(R,) of each channel, at gain 1."""
        return torch.tensor(STEPS, device=self.energy.device)[self.bits.long() - 1] * self.deviation

    def to(self, device: torch.device) -> ChannelCodes:
        return ChannelCodes(self.energy.to(device), self.bits.to(device))

    @property
    def reads_room(self) -> bool:
        return True

    def granule(self, width: int) -> int:
        return GRANULE

    def encode(self, x: Tensor, role: str) -> Packed:
        b, h, t, _ = x.shape
        deviation = self.deviation
        unit = (x.float() / deviation).clamp_(-FAR, FAR)
        if not bool(torch.isfinite(x).all()):
            raise UseError("latents hold NaN or infinity. Check the model's dtype (float16 overflows) and its input.")
        codes, gains, start = [], [], 0
        for bits, count in self.runs:
            run = slice(start, start + count)
            run_codes, run_gains = _quantize(unit[..., run], bits, deviation[run])
            codes.append(pack(run_codes.view(b, h, t // GRANULE, GRANULE, count), bits, 3).flatten(3))
            gains.append(run_gains)
            start += count
        gain = torch.cat(gains, dim=-1).view(b, h, t // GRANULE, GRANULE, len(gains))
        parts = {"codes": torch.cat(codes, dim=-1), "gains": pack(gain, GAIN_BITS, 3).flatten(3)}
        return Packed(parts, tokens=t, width=x.shape[3], dtype=x.dtype)

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        codes, gains = packed.parts["codes"], packed.parts["gains"]
        b, h, units, _ = codes.shape
        n = len(self.runs)
        table = torch.tensor(GAINS, device=codes.device)
        chosen = unpack(gains.view(b, h, units, GAIN_BITS, n), GAIN_BITS, 3, GRANULE)
        gain = table[chosen.long()]  # (B, H, T/8, 8, runs)
        unit = torch.empty(b, h, units, GRANULE, packed.width, device=codes.device)
        channel = byte = 0
        for number, (bits, count) in enumerate(self.runs):
            run = codes[..., byte : byte + bits * count].unflatten(3, (bits, count))
            numbers = unit[..., channel : channel + count]
            numbers.copy_(unpack(run, bits, 3, GRANULE)).sub_((2**bits - 1) / 2)
            numbers.mul_(gain[..., number : number + 1] * STEPS[bits - 1])
            channel, byte = channel + count, byte + bits * count
        x = saturated(unit.mul_(self.deviation).flatten(2, 3), packed.dtype)
        return x if out is None else out.copy_(x)


def _quantize(x: Tensor, bits: int, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x` (..., T, n), uint8 up to 8 bits and int16 above, and the gain (..., T, 1) of each token, uint8: the
    one that leaves the least error in the latent, whose channels are `deviation` (n,) times `x`."""
    weight = deviation / deviation.max()  # so that squares of small ones are not 0
    best = error = chosen = None
    for number, gain in enumerate(GAINS):
        step, middle, top = STEPS[bits - 1] * gain, (2**bits - 1) / 2, 2**bits - 1
        codes = (x * (1 / step)).add_(middle).round_().clamp_(0, top)
        loss = (codes - middle).mul_(step).sub_(x).mul_(weight).square_().sum(-1, keepdim=True)
        if best is None or error is None or chosen is None:
            best, error, chosen = codes, loss, torch.zeros_like(loss)
            continue
        better = loss < error
        best, error = torch.where(better, codes, best), torch.where(better, loss, error)
        chosen.masked_fill_(better, number)
    assert best is not None
    assert chosen is not None
    return best.to(torch.uint8 if bits <= 8 else torch.int16), chosen.to(torch.uint8)
