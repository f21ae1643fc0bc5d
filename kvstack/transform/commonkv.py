"""CommonKV: one latent per token for the keys and values of a whole group of layers."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ..basis import Basis, flat
from ..calibration import Calibration
from ..calibrator import Plan, calibrated
from ..errors import BindError
from ..stage import Transform, check
from ..types import KV, Channels, Latent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CommonKV"]

LATENT = "latent"


@dataclass(frozen=True, repr=False)
class CommonKV(Transform):
    """Store one latent per token for the keys and values of all layers of a group, instead of each layer's own.

    Args:
        keep: the share of a token's numbers KEPT, a float in (0, 1], or how many a group keeps, an int of 1 or more
            (default 0.5). All groups share one budget: a group gets more where its channels have more energy. With an
            encoder that can spend bits unevenly, such as `Quant(2)`, the budget is this many numbers of that many bits,
            spread over all channels.
        layers: adjacent full-attention layers in a group; default a divisor of their number near 5.
        calibration: a `Calibration` or the path of a saved one. Default: made at first use (about a minute for a
            small model) and kept in the user's cache folder.

    Source: CommonKV, arXiv 2508.16134. Differs from the paper: the axes are principal axes of un-rotated keys and
    values on calibration text, weighed by how much each number matters to the model's predictions, not singular
    vectors of the projection weights; a latent is the least-squares projection of the group's keys and values, not the
    mean of one latent per layer; it is stored once.

    Example:
        >>> from kvstack import CommonKV, KVStack, Quant
        >>> KVStack([CommonKV(), Quant(2)])
        KVStack([CommonKV(), Quant(bits=2)])
    """

    keep: float | int = 0.5
    layers: int | None = None
    calibration: str | os.PathLike[str] | Calibration | None = None

    _plan: Plan = field(init=False, repr=False, compare=False)
    _axes: Calibration = field(init=False, repr=False, compare=False)
    _numbers: int = field(init=False, repr=False, compare=False)
    _channels: tuple[Channels, ...] = field(init=False, repr=False, compare=False, default=())
    _basis: Basis = field(init=False, repr=False, compare=False)
    _mine: Channels | None = field(init=False, repr=False, compare=False, default=None)

    name = "commonkv"
    source = "arXiv 2508.16134"
    saves = "layers: one latent for several"
    unrotated = True

    def __post_init__(self) -> None:
        share = isinstance(self.keep, float) and 0 < self.keep <= 1
        count = isinstance(self.keep, int) and not isinstance(self.keep, bool) and self.keep >= 1
        check(
            share or count,
            self,
            "keep is what stays: a share of the numbers in (0, 1] or how many a group keeps, an int of 1 or more.",
            "Use keep=0.5 for half of them.",
        )
        layers = self.layers
        counts = layers is None or (isinstance(layers, int) and not isinstance(layers, bool) and layers >= 1)
        check(counts, self, "layers counts layers.", "Use 1 or more.")

    # ---- fitted to a model

    def bind(self, model: PreTrainedModel) -> Self:
        plan = Plan(model, self.layers)
        calibration = self._calibration_of(model, plan)
        numbers = sum(len(group.energy) for group in calibration.groups)
        budget = int(self.keep * numbers) if isinstance(self.keep, float) else self.keep * len(plan.groups)
        return self._with(
            layers=plan.size,
            unrotated=plan.rotates,
            _plan=plan,
            _axes=calibration,
            _numbers=budget,
            _channels=leading(calibration.channels, budget),
        )

    def _calibration_of(self, model: PreTrainedModel, plan: Plan) -> Calibration:
        if self.calibration is None:
            return calibrated(model, plan.size)
        given = self.calibration
        found = given if isinstance(given, Calibration) else Calibration.load(given)
        found.check(model)
        if found.layers != plan.size:
            raise BindError(
                f"{self!r}: the calibration is for groups of {found.layers} layers, not of {plan.size}. "
                f"Use layers={found.layers}, or calibrate with layers={plan.size}."
            )
        return found

    def _with(self, **changes: Any) -> Self:
        fitted = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(fitted, name, value)
        return fitted

    def of(self, layers: Sequence[int]) -> Self:
        group = self._plan.groups.index(list(layers))
        mine = self._channels[group]
        basis = self._axes.basis(layers, len(mine.energy), self._plan.devices[layers[0]])
        return self._with(_basis=basis, _mine=mine)

    @property
    def numbers(self) -> int:
        return self._numbers

    @property
    def channels(self) -> Sequence[Channels]:
        return self._channels

    def trim(self, channels: Sequence[Channels]) -> Self:
        return self._with(_channels=tuple(channels))

    @property
    def tensors(self) -> Sequence[Tensor]:
        basis = self._basis
        return [x for x in (basis.axes, basis.mean, basis.weight) if x is not None]

    # ---- there and back

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        z = self._basis.project(flat(group))
        return {LATENT: Latent(z.to(group[0].keys.dtype).unsqueeze(1), self._mine)}

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        z = latents[LATENT].squeeze(1)
        return KV(self._basis.keys(z, layer).to(z.dtype), self._basis.values(z, layer).to(z.dtype))

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        z = latents[LATENT].squeeze(1)
        return self._basis.keys(z, layer).to(z.dtype)

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        return self._basis.weigh(weights, latents[LATENT].squeeze(1), layer)


def leading(channels: Sequence[Channels], numbers: int) -> tuple[Channels, ...]:
    """The `numbers` channels of most energy of all groups, at least one in each."""
    energies = torch.cat([known.energy for known in channels])
    least = energies.sort(descending=True).values[min(numbers, len(energies)) - 1]
    counts = [max(1, int((known.energy >= least).sum())) for known in channels]
    return tuple(Channels(known.energy[:count].clone()) for known, count in zip(channels, counts, strict=True))
