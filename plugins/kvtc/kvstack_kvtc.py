"""KVTC: transform coding. Principal axes over all layers, bits where they lower the error most, codes of these bits."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kvstack import KV, BindError, Calibration, Latent, Transform
from kvstack.authoring import (
    DISTORTION,
    GAIN_BITS,
    Basis,
    BoundTransform,
    ChannelCodes,
    GroupAxes,
    LayerGroups,
    Linear,
    ReadsLinearly,
    as_path,
    by_basis,
    calibrated_groups,
    calibration_for,
    check,
    flat,
    nearly_best,
    saturated,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KVTC", "widths"]

KINDS = ("keys", "values")
BLOCKS, UNITS = 1024, 8192
"""At most so many blocks of channels, of all latents together, share the bits of a token, counted in so many units."""


@dataclass(frozen=True, repr=False)
class KVTC(Transform):
    """Store, for every token, the codes of two latents: one for the keys of all layers, one for their values.

        keys of all layers, un-rotated (N)     z = (x - mean) axes^T,  channels by falling energy (R)
        bits per channel                       8 8 7 .. 5 5 5 .. 2 2 2 2 .. 1 1 1 1 1 1 .. 0 0 0

    Axes are principal axes of keys, and of values, on calibration text. Bits of a token are spread over the channels of
    both so that the expected squared error is least, by dynamic programming; channels without bits are not stored.

    It says by itself how many bits each channel takes, so it takes the place of an encoder too: a stack with
    `Quant` in addition is refused.

    Args:
        ratio: how many times smaller than 16-bit numbers the codes are, more than 1 (default 16: one bit a number on
            average). A channel takes 12 bits at most, so below 4/3 nothing is gained. Sinks and window come on top.
        layers: adjacent full-attention layers that share axes; default all of them. Fewer need less memory to
            calibrate, and less arithmetic to rebuild.
        calibration: a `Calibration` made with `metric="variance"`, or the path of a saved one. Default: made at first
            use and kept in the user's cache folder.
        exact: to answer a single query, the keys of how many tokens are rebuilt for each kv head at most (default
            384): those whose rough scores give them a share of the attention that counts. The others keep their rough
            scores, and all values count. None: all keys are rebuilt.
        rough: leading components that make the rough scores (default 512).

    Source: KVTC, arXiv 2511.01815. Differs from the paper: codes are those of a Gaussian of the channel's variance,
    with one of four gains a token for each run of channels of equal bits, not integer and floating types with a scale;
    widths are 0 to 12 bits; tokens are coded in the running cache, not when it is stored away, and the entropy coder
    comes when the cache is saved: `KVStack.save(path, compress=True)`. The paper keeps 128 recent tokens: `window=128`.

    Example:
        >>> from kvstack import Evict, KVStack
        >>> KVStack([KVTC(16), Evict(0.5)])
        KVStack([KVTC(), Evict(keep=0.5)])
    """

    ratio: float = 16
    layers: int | None = None
    calibration: str | os.PathLike[str] | Calibration | None = None
    exact: int | None = 384
    rough: int = 512

    name = "kvtc"
    source = "arXiv 2511.01815"
    saves = "layers and bits: codes of principal components"
    unrotated = True
    encodes_itself = True

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool) and self.ratio > 1
        check(number, self, "ratio is how many times smaller the codes are, more than 1.", "Use ratio=16.")
        layers = self.layers
        check(
            layers is None or _counts(layers), self, "layers counts layers.", "Use 1 or more, or leave it out for all."
        )
        exact = self.exact is None or _counts(self.exact)
        check(exact, self, "exact counts tokens.", "Use exact=384, or None for all.")
        check(_counts(self.rough), self, "rough counts channels.", "Use rough=512.")
        object.__setattr__(self, "calibration", as_path(self, "calibration", Calibration))

    def bind(self, model: PreTrainedModel, layers: Sequence[int] | None = None) -> BoundTransform:
        groups = calibrated_groups(model, self.layers, layers, "variance")
        calibration = calibration_for(self, self.calibration, model, groups, "variance")
        codes = self._codes(groups, calibration)
        if codes is None:  # there are bits for axes that are not kept
            calibration = calibration_for(self, self.calibration, model, groups, "variance", complete=True)
            codes = self._codes(groups, calibration)
        assert codes is not None
        return BoundKVTC(self, groups, calibration, codes, model.dtype)

    def _codes(self, groups: LayerGroups, calibration: Calibration) -> list[ChannelCodes] | None:
        """Of all blocks, or None where they want more axes than are kept; worked out once for a calibration, since it
        takes a second."""
        known, key = _known.setdefault(calibration, {}), (tuple(map(tuple, groups.groups)), self.ratio)
        if key in known:
            return known[key]
        blocks = _blocks(groups, calibration)
        energies = [block.energy for block in blocks]
        bits = int(16 * sum(map(len, energies)) / self.ratio)
        spent = widths(energies, bits)
        if spent is None:
            raise BindError(
                f"{self!r}: {bits} bits a token are too few for {len(energies)} latents. "
                "Use a smaller ratio, or more layers in a group."
            )
        if any(int((given > 0).sum()) > len(block.axes) for block, given in zip(blocks, spent, strict=True)):
            best, held = spent, [block.energy[: len(block.axes)] for block in blocks]
            spent = widths(held, bits)
            if spent is None or not nearly_best(energies, spent, best):
                known[key] = None
                return None
        codes: list[ChannelCodes] = []
        for energy, given in zip(energies, spent, strict=True):
            rank = int((given > 0).sum())
            codes.append(ChannelCodes(energy[:rank].clone(), given[:rank].clone()))
        known[key] = codes
        return codes


def _blocks(groups: LayerGroups, calibration: Calibration) -> list[GroupAxes]:
    """All blocks that share the bits: those of other processes as well, where several share the kv heads."""
    return [block for group in groups.groups for block in calibration.everywhere(group)]


_known: weakref.WeakKeyDictionary[Calibration, dict[Any, list[ChannelCodes] | None]] = weakref.WeakKeyDictionary()


def _counts(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


# ---- for a model


class BoundKVTC(BoundTransform):
    """KVTC for one model.

    Args:
        stage: the settings.
        groups: the layers that share axes.
        calibration: their axes.
        codes: of the keys of the first group, of its values, of the keys of the second group, ...; of each kind one for
            every run of kv heads that has axes of its own.
        dtype: the model's.
    """

    def __init__(
        self,
        stage: KVTC,
        groups: LayerGroups,
        calibration: Calibration,
        codes: Sequence[ChannelCodes],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(stage, groups.size, unrotated=groups.rotates)
        self.stage: KVTC
        self.groups, self.calibration, self.dtype = groups, calibration, dtype
        self.codes = dict(zip(_blocks(groups, calibration), codes, strict=True))

    def for_group(self, layers: Sequence[int]) -> Components:
        device = self.groups.devices[layers[0]]
        codes = [self.codes[block].to(device) for block in self.calibration.of(layers)]
        bases = [self.calibration.basis(layers, each.rank, device, self.dtype, part) for part, each in enumerate(codes)]
        own = [x for each in codes for x in each.tensors] + [x for basis in bases for x in basis.tensors]
        tensors = [*own, *self.calibration.tensors(layers)]
        fingerprint = f"{self.calibration.fingerprint} {tuple(layers)} bits {[each.runs for each in codes]}"
        made = Components(bases, codes, self.dtype, tensors, fingerprint)
        made.exact, made.rough = self.stage.exact, self.stage.rough
        return made


class Components(ReadsLinearly):
    """The codec of one group of layers: principal components of its keys, and of its values.

    Args:
        bases: the axes of the keys, and those of the values; of each kind as many as there are runs of kv heads with
            axes of their own, whose heads side by side are those of the group.
        codes: the encoders of the components along them.
        dtype: of keys and values.
        tensors, fingerprint: of the data fitted to the model, see `Codec`.
    """

    def __init__(
        self,
        bases: Sequence[Basis],
        codes: Sequence[ChannelCodes],
        dtype: torch.dtype,
        tensors: Sequence[Tensor],
        fingerprint: str,
    ) -> None:
        self.bases, self.dtype, self.tensors, self.fingerprint = bases, dtype, tensors, fingerprint
        runs = len(bases) // len(KINDS)
        names = [kind if runs == 1 else f"{kind} {run}" for kind in KINDS for run in range(runs)]
        self.encoders = dict(zip(names, codes, strict=True))
        named = list(zip(names, bases, strict=True))
        self.of_keys, self.of_values = named[:runs], named[runs:]

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        latents = {}
        for kind, named in zip(KINDS, (self.of_keys, self.of_values), strict=True):
            parts = by_basis([kv.only(kind) for kv in group], [basis for _, basis in named])
            for (name, basis), part in zip(named, parts, strict=True):
                latents[name] = Latent(basis.project(flat(part)).unsqueeze(1))  # (B, 1, T, R)
        return latents

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        values = [basis.values(latents[name].squeeze(1), layer) for name, basis in self.of_values]
        return KV(self.keys(latents, layer), saturated(torch.cat(values, 1), self.dtype))

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        keys = [basis.keys(latents[name].squeeze(1), layer) for name, basis in self.of_keys]
        return saturated(torch.cat(keys, 1), self.dtype)

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        parts = weights.split([basis.shapes[layer][0] for _, basis in self.of_values], dim=1)
        made = zip(self.of_values, parts, strict=True)
        return torch.cat([basis.weigh(part, latents[name].squeeze(1), layer) for (name, basis), part in made], 1)

    def linear(self, kind: Literal["keys", "values"], layer: int) -> Linear | None:
        pairs = self.linears(layer)
        return pairs[0][KINDS.index(kind)] if len(pairs) == 1 else None

    def linears(self, layer: int) -> Sequence[tuple[Linear, Linear]]:
        return [
            (Linear(keys, *of_keys.cut(layer, keys=True)), Linear(values, *of_values.cut(layer, keys=False)))
            for (keys, of_keys), (values, of_values) in zip(self.of_keys, self.of_values, strict=True)
        ]


# ---- bits


def widths(energies: Sequence[Tensor], bits: int) -> list[Tensor] | None:
    """Spread `bits` bits over channels so that the expected squared error is least: return one uint8 tensor like each
    of `energies` (R,), which fall. None if the bits are too few: every latent gets some.

    A channel of energy e with w bits leaves the error `DISTORTION[w]` e. It costs w bits, and each run of channels of
    equal width costs 2 more, its gain. With more than 1,024 channels, blocks of 2, 4, 8, ... have one width; with more
    than 8,192 bits, they are counted in units of 2, 4, 8, ... at most a block's channels, rounded up.

    Source: dynamic programming over groups of components, as in KVTC (arXiv 2511.01815). Widths fall with the energy,
    so the choice is where each width begins. Over latents, widths from 12 down to 1 and blocks, it keeps the least
    error for every number of units c:

        run[i][c]    the first i blocks, the last of width w   = error of block i + the less of
                     run[i-1][c - cost of w], done[i-1][c - cost of w - gain]
        done[i][c]   the first i blocks, none narrower than w  = the less of run[i][c], done[i][c] before w
    """
    size = _power(sum(len(energy) for energy in energies) / BLOCKS)
    unit = min(size, _power(bits / UNITS))
    units, gain, cost = bits // unit, -(-GAIN_BITS // unit), size // unit
    least = torch.zeros(units + 1, dtype=torch.float64)  # of all latents so far, by units spent at most
    steps = []
    for energy in energies:
        blocks = torch.stack([part.sum() for part in energy.double().cpu().split(size)])
        steps.append(_Step(blocks, least, cost, gain))
        least = steps[-1].least
    if not bool(torch.isfinite(least[units])):
        return None
    spent: list[Tensor] = []
    for energy, step in zip(reversed(energies), reversed(steps), strict=True):
        given, units = step.back(units)
        spent.append(given.repeat_interleave(size)[: len(energy)].to(energy.device))
    return spent[::-1]


def _power(x: float) -> int:
    """The least power of two that is `x` or more."""
    return 1 << math.ceil(math.log2(max(x, 1)))


class _Step:
    """The programme for the blocks (n,) of one latent, from the `least` error of those before it. A bit for a block
    costs `cost` units, a run `gain`."""

    def __init__(self, blocks: Tensor, least: Tensor, cost: int, gain: int) -> None:
        n, c = len(blocks), len(least)
        self.cost, self.gain = cost, gain
        done = torch.full((n + 1, c), torch.inf, dtype=torch.float64)
        done[0] = least
        most = len(DISTORTION) - 1
        self.took = torch.zeros(most + 1, n + 1, c, dtype=torch.bool)  # the run of this width ends at block i
        self.began = torch.zeros(most + 1, n + 1, c, dtype=torch.bool)  # block i is the first of its run
        for width in range(most, 0, -1):
            run, before = torch.full((c,), torch.inf, dtype=torch.float64), done[0]
            for i in range(1, n + 1):
                goes_on, begins = _later(run, width * cost), _later(before, width * cost + gain)
                self.began[width, i] = begins < goes_on
                run = torch.minimum(goes_on, begins) + DISTORTION[width] * blocks[i - 1]
                self.took[width, i] = run < done[i]
                before = done[i].clone()  # without runs of this width
                done[i] = torch.minimum(done[i], run)
        rest = blocks.sum() - blocks.cumsum(0)
        self.least, self.last = (done[1:] + rest[:, None]).min(dim=0)

    def back(self, units: int) -> tuple[Tensor, int]:
        """Bits of every block when `units` are spent, and how many of them are left for the latents before."""
        i = int(self.last[units]) + 1
        given = torch.zeros(self.took.shape[1] - 1, dtype=torch.uint8)
        for width in range(1, len(DISTORTION)):
            if not self.took[width, i, units]:
                continue
            first = False
            while not first:
                first = bool(self.began[width, i, units])
                given[i - 1] = width
                units -= width * self.cost + first * self.gain
                i -= 1
        return given, units


def _later(x: Tensor, units: int) -> Tensor:
    """`x` (c,) by units spent, when `units` more are spent."""
    return torch.cat([torch.full((min(units, len(x)),), torch.inf, dtype=x.dtype), x[: max(0, len(x) - units)]])
