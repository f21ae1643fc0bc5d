"""Bits where the energy is: reverse water-filling over the channels of a latent.

Each further bit takes a fixed share of what is left of a channel's error, so bits go, one by one, to the channel
whose error they lower most. That is the discrete form of reverse water-filling (Cover and Thomas, Elements of
Information Theory, section 10.3), with the distortion of real quantizers in place of the rate function's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DISTORTION", "STEPS", "error_left", "leading", "nearly_best", "spread", "spread_by_class"]

STEPS = (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308, 0.0165, 0.00879, 0.00465, 0.00245)
"""Step of the best uniform quantizer of 1, 2, ... 12 bits for a Gaussian of variance 1 (Max 1960, table II; its
recursion for 6 bits and more)."""

DISTORTION = (
    *(1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041),
    *(3.04e-4, 8.77e-5, 2.49e-5, 7.00e-6, 1.94e-6, 5.36e-7),
)
"""Mean squared error of these quantizers, with 0, 1, ... 12 bits. A few channels of a latent carry thousands of
times the energy of the others, and with 8 bits at most their errors would be nearly all that is left."""

ENOUGH = 1.1


def spread(energies: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Spread `bits` bits over channels: return one uint8 tensor like each of `energies` (R,).

    Spends exactly `bits`, or 12 on every channel where that is less. A channel never gets fewer bits than one of
    less energy. Of equal channels the first come first.
    """
    return spread_by_class(energies, bits, (1.0,), (1.0,))[0]


def spread_by_class(
    energies: Sequence[Tensor], bits: float, shares: Sequence[float], weights: Sequence[float]
) -> list[list[Tensor]]:
    """One water level for the channels of tokens of several classes: for each class what `spread` gives.

    A class is a share of the tokens, whose errors weigh so much. A bit for each token of it costs this share of a bit
    per token, and serves this share of the tokens. So bits go where weight times energy is largest.

    Args:
        bits: spent per token, in the mean over all tokens: at most that many, and less than one share below.
        shares: of the tokens, 1 in all.
        weights: the weight of a squared error in each class.
    """
    lengths = [len(energy) for energy in energies]
    one = torch.cat([energy.double().cpu() for energy in energies])
    flat = torch.outer(torch.tensor(weights, dtype=torch.float64), one).flatten()  # class by class
    costs = torch.tensor(shares, dtype=torch.float64).repeat_interleave(len(one))
    less = -torch.tensor(DISTORTION, dtype=torch.float64).diff()  # what the first, second, ... bit takes off
    gains = torch.outer(less, flat).flatten()  # all first bits, all second bits, ...
    best = gains.sort(descending=True, stable=True).indices % len(flat)
    # sums of shares are rounded: a budget that is just spent is not overspent
    affordable = int((costs[best].cumsum(0) <= bits * (1 + 1e-9)).sum())
    counts = torch.bincount(best[:affordable], minlength=len(flat)).to(torch.uint8)
    by_class = [counts[i : i + len(one)].split(lengths) for i in range(0, len(flat), len(one))]
    return [[part.to(x.device) for part, x in zip(parts, energies, strict=True)] for parts in by_class]


def leading(energies: Sequence[Tensor], numbers: int) -> list[int]:
    """Return how many leading channels each of `energies` (R,) keeps if all together keep the `numbers` of most energy;
    at least one each. For encoders that spend the same bits on every channel."""
    lengths = [len(energy) for energy in energies]
    flat = torch.cat([energy.cpu() for energy in energies])
    best = flat.sort(descending=True, stable=True).indices[:numbers]
    kept = torch.bincount(best, minlength=len(flat)).split(lengths)
    return [max(1, int(part.sum())) for part in kept]


def error_left(energies: Sequence[Tensor], bits: Sequence[Tensor]) -> float:
    """The squared error that is left where of each of `energies` (R,) the leading channels get `bits`, (n,) with n up
    to R, and the others none. With one bit more than quantizers have, a channel has no error."""
    table, error = torch.tensor([*DISTORTION, 0.0], dtype=torch.float64), 0.0
    for energy, given in zip(energies, bits, strict=True):
        known, count = energy.double().cpu(), len(given)
        error += float(known[:count] @ table[given.long().cpu()] + known[count:].sum())
    return error


def nearly_best(energies: Sequence[Tensor], bits: Sequence[Tensor], best: Sequence[Tensor]) -> bool:
    """Return True if `bits` leave an error that is at most a tenth larger than that of the `best` ones."""
    return error_left(energies, bits) <= ENOUGH * error_left(energies, best)
