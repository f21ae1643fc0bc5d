"""CommonKV: one latent per token for the keys and values of a whole group of layers."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from ..calibration.axes import Basis, flat
from ..calibration.calibrate import fitting
from ..calibration.calibration import Calibration
from ..calibration.weight_axes import WeightAxes, weight_axes
from ..calibration.windows import observe
from ..errors import BindError
from ..model.layers import Grouping
from ..stage import Transform, check, hold_path
from ..store.budget import leading
from ..types import KV, Channels, Latent, take_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CommonKV"]

LATENT, PLAIN, WHERE = "latent", "unmerged", "places"
TOGETHER, STEP = 256, 32
"""Tokens of which each group keeps the same number apart, and the unit of that number."""


@dataclass(frozen=True, repr=False)
class CommonKV(Transform):
    """Store one latent per token for the keys and values of all layers of a group, instead of each layer's own.

    Args:
        keep: the share of a token's numbers KEPT, a float in (0, 1], or how many a group keeps, an int of 1 or more
            (default 0.5). All groups share one budget: a group gets more where its channels have more energy. With an
            encoder that can spend bits unevenly, such as `Quant(2)`, the budget is this many numbers of that many bits,
            spread over all channels.
        layers: adjacent full-attention layers in a group; default a divisor of their number near 5.
        basis: where the axes of a group come from. `calibrated` (default): the directions along which its un-rotated
            keys and values vary on calibration text, each number weighed by how much it matters. `weights` (the
            paper's): singular vectors of its key and value projections; no data, and much worse.
        merge: how a group's layers become one latent. `project` (default): the latent that leaves the least error in
            the group's keys and values. `mean` (the paper's, with `basis="weights"`): the mean of what each layer's
            hidden state would give; hidden states of raw tokens are then held too.
        weights: with `merge="mean"`: how much each layer of the model counts in its group's mean (equal by default);
            `kvstack.sensitivity` measures some.
        unmerged: share of the tokens that keep their plain keys and values, unquantized (default 0.0). Those whose
            latents of first and last layer have the least cosine (the paper's, with `merge="mean"`), or those that the
            latent serves worst. The share is that of all groups together: on a sample text it is settled which group
            keeps how many of every 256 tokens, and the text itself decides which.
        similarity: with `unmerged` and `merge="mean"`: `ends` (default) compares the first and last layer of a group,
            `pairs` all its layers.
        calibration: a `Calibration` or the path of a saved one. Default: made at first use (about a minute for a
            small model) and kept in the user's cache folder.
        rebuild: floating type that keys and values are computed from latents in, `float32` or `bfloat16`; default the
            model's own. On processors with products of bfloat16 that is several times faster.

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
    basis: Literal["calibrated", "weights"] = "calibrated"
    merge: Literal["project", "mean"] = "project"
    weights: tuple[float, ...] | None = None
    unmerged: float = 0.0
    similarity: Literal["ends", "pairs"] = "ends"
    calibration: str | os.PathLike[str] | Calibration | None = None
    rebuild: Literal["float32", "bfloat16"] | None = None

    _dtype: torch.dtype = field(init=False, repr=False, compare=False)
    _plan: Grouping = field(init=False, repr=False, compare=False)
    _axes: Calibration | WeightAxes = field(init=False, repr=False, compare=False)
    _numbers: int = field(init=False, repr=False, compare=False)
    _channels: tuple[Channels, ...] = field(init=False, repr=False, compare=False, default=())
    _rank: int = field(init=False, repr=False, compare=False, default=0)
    _apart: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())
    _layers: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _m: int = field(init=False, repr=False, compare=False, default=0)
    _down: Tensor | None = field(init=False, repr=False, compare=False, default=None)
    _shares: Tensor = field(init=False, repr=False, compare=False)
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
        check(self.basis in ("calibrated", "weights"), self, f"{self.basis!r} is no basis.", 'Use "calibrated".')
        check(self.merge in ("project", "mean"), self, f"{self.merge!r} is no way to merge.", 'Use "project".')
        paper = self.basis == "weights"
        check(
            paper or self.merge == "project",
            self,
            "a calibrated basis has no latents of single layers to take the mean of.",
            'Use merge="project", or basis="weights".',
        )
        check(not paper or self.calibration is None, self, "weights need no calibration.", "Leave it out.")
        share = isinstance(self.unmerged, int | float) and 0 <= self.unmerged < 1
        check(share, self, "unmerged is a share of the tokens, 0 or more and below 1.", "Use unmerged=0.4.")
        check(self.similarity in ("ends", "pairs"), self, f"{self.similarity!r} compares nothing.", 'Use "ends".')
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
            check(bool(self.weights), self, "weights is empty.", "Give one number for each full-attention layer.")
            check(self.merge == "mean", self, "weights weigh the layers of a mean.", 'Use merge="mean".')
            check(
                min(self.weights) >= 0 < sum(self.weights), self, "weights are shares, none below 0.", "Use 1.0 each."
            )
        hold_path(self, "calibration", Calibration)
        known = self.rebuild in (None, "float32", "bfloat16")
        check(known, self, f"{self.rebuild!r} is no type to compute in.", 'Use "float32" or "bfloat16".')

    # ---- fitted to a model

    @property
    def hidden(self) -> bool:  # type: ignore[override]
        return self.merge == "mean"

    def bind(self, model: PreTrainedModel) -> Self:
        plan = Grouping(model, self.layers)
        dtype = model.dtype if self.rebuild is None else getattr(torch, self.rebuild)
        fitted = self._with(layers=plan.size, unrotated=plan.rotates, _plan=plan, _dtype=dtype)
        fitted = fitted._bind_weights(model) if self.basis == "weights" else fitted._bind_calibrated(model)
        return fitted._settle_apart(model) if self.unmerged else fitted

    def _bind_calibrated(self, model: PreTrainedModel) -> Self:
        found = fitting(self, self.calibration, model, self._plan.size, "fisher")
        numbers = [len(group.energy) for group in found.groups]
        self._check_rank(min(numbers))
        budget = int(self.keep * sum(numbers)) if isinstance(self.keep, float) else self.keep * len(numbers)
        return self._with(_axes=found, _numbers=budget, _channels=found.channels)

    def _bind_weights(self, model: PreTrainedModel) -> Self:
        plan = self._plan
        found = weight_axes(model, plan)
        self._check_rank(found.full_rank)
        rank = int(self.keep * found.numbers) // len(plan.groups) if isinstance(self.keep, float) else self.keep
        # more axes than the weights have rank would be zeros
        rank = min(max(1, rank), found.full_rank)
        if self.weights is not None and len(self.weights) != len(plan.full):
            raise BindError(
                f"{self!r}: weights holds {len(self.weights)} numbers, and {type(model).__name__} has "
                f"{len(plan.full)} full-attention layers. Give one for each."
            )
        return self._with(_axes=found, _numbers=rank * len(plan.groups), _rank=rank)

    def _check_rank(self, most: int) -> None:
        if isinstance(self.keep, int) and self.keep > most:
            raise BindError(f"{self!r}: a group of {self.layers} layers has {most} axes. Use keep={most} or less.")

    def _with(self, **changes: Any) -> Self:
        fitted = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(fitted, name, value)
        return fitted

    def _settle_apart(self, model: PreTrainedModel) -> Self:
        """How many tokens of every `TOGETHER` each group keeps apart: those that are most unlike, over all groups."""
        seen = observe(model, self._plan)
        merged = self.trim(leading(self._channels, self._numbers)) if self._channels else self
        unlike = []
        for layers in self._plan.groups:
            stage = merged.of(layers)
            group = [seen[i] for i in layers]
            unlike.append(stage._unlike(group, stage._latents_of(group)).flatten().cpu())
        everything = torch.cat(unlike)
        least = everything.sort(descending=True).values[max(0, int(self.unmerged * len(everything)) - 1)]
        steps = TOGETHER // STEP
        wanted = [float((part >= least).float().mean()) * steps for part in unlike]
        counts = [min(steps - 1, int(want)) for want in wanted]
        left = round(self.unmerged * steps * len(wanted)) - sum(counts)
        for i in sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i])[: max(0, left)]:
            counts[i] = min(steps - 1, counts[i] + 1)
        return self._with(_apart=tuple(count * STEP for count in counts), granule=TOGETHER, unit=STEP)

    # what stacks share must not be an inference tensor, whatever forward the first of them is bound in
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(self, layers: Sequence[int]) -> Self:
        group = self._plan.groups.index(list(layers))
        device = self._plan.devices[layers[0]]
        mine = self._channels[group].to(device) if self._channels else None
        rank = len(mine.energy) if mine else self._rank
        basis = self._axes.basis(layers, rank, device, self._dtype)
        apart = self._apart[group] if self._apart else 0
        fitted = self._with(_basis=basis, _mine=mine, _m=apart, _layers=tuple(layers))
        if self.merge == "project" or not isinstance(self._axes, WeightAxes):
            return fitted
        size, given = len(layers), self.weights or (1.0,) * len(self._plan.full)
        mine_of = given[group * size : (group + 1) * size]
        shares = torch.tensor(mine_of if sum(mine_of) > 0 else (1.0,) * size, device=device)
        return fitted._with(_down=self._axes.down(layers, rank, device), _shares=shares / shares.sum())

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
        known = (self._mine.energy, self._mine.bits) if self._mine else ()
        own = [*self._basis.tensors, *self._axes.tensors(self._layers)]
        return own + [x for x in known if x is not None]

    @property
    def mark(self) -> str:
        return f"{self._axes.mark} {self._layers} rank {len(self._basis.axes)} unmerged {self._m}"

    # ---- there and back

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        z = self._latents_of(group)
        data = self._merged(z).to(group[0].keys.dtype).unsqueeze(1)
        if not self._m:
            return {LATENT: Latent(data, self._mine)}
        apart, rest = self._parted(self._unlike(group, z))
        plain = flat(group).to(data.dtype).unsqueeze(1)
        found = {PLAIN: Latent(take_tokens(plain, apart.unsqueeze(1)), exact=True)}
        found[WHERE] = Latent((apart % TOGETHER).to(torch.uint8)[:, None, :, None], exact=True)
        return found | {LATENT: Latent(take_tokens(data, rest.unsqueeze(1)), self._mine)}

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        z = latents[LATENT].squeeze(1)
        kv = KV(self._basis.keys(z, layer).to(z.dtype), self._basis.values(z, layer).to(z.dtype))
        return self._joined(kv, latents, layer) if self._m else kv

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        if self._m:
            return super().keys(latents, layer)
        z = latents[LATENT].squeeze(1)
        return self._basis.keys(z, layer).to(z.dtype)

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        if self._m:
            return super().weigh(weights, latents, layer)
        return self._basis.weigh(weights, latents[LATENT].squeeze(1), layer)

    def _latents_of(self, group: Sequence[KV]) -> Tensor:
        """(B, T, R) projected; with the paper's merge one per layer, (layers, B, T, R), from the hidden states."""
        if self._down is None:
            return self._basis.project(flat(group))
        hidden = [kv.hidden[:, 0].to(self._down.device).float() for kv in group if kv.hidden is not None]
        return torch.stack([x @ self._down.T for x in hidden])

    def _merged(self, z: Tensor) -> Tensor:
        return z if self._down is None else torch.einsum("l,lbtr->btr", self._shares, z)

    # ---- tokens that are not merged

    def _unlike(self, group: Sequence[KV], z: Tensor) -> Tensor:
        """(B, T): how badly a token suits one latent for all layers."""
        if self._down is None:
            return self._basis.loss(flat(group), z)
        unit = torch.nn.functional.normalize(z, dim=-1)
        if self.similarity == "ends":
            return -(unit[0] * unit[-1]).sum(-1)
        return -unit.sum(0).square().sum(-1)  # the sum of all pairs' cosines, up to constants

    def _parted(self, unlike: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the tokens that stay apart and of the others, (B, n) each, ascending: as many in every granule."""
        b, t = unlike.shape
        order = unlike.view(b, t // TOGETHER, TOGETHER).argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(0, t, TOGETHER, device=unlike.device)[:, None]
        return tuple((part.sort(dim=-1).values + first).flatten(1) for part in order.tensor_split([self._m], dim=-1))  # type: ignore[return-value]

    def _joined(self, kv: KV, latents: Mapping[str, Tensor], layer: int) -> KV:
        """Merged and unmerged tokens in their order."""
        within = latents[WHERE][:, 0, :, 0].long()  # (B, n)
        b, n = within.shape
        t = n // self._m * TOGETHER
        apart = within + torch.arange(0, t, TOGETHER, device=within.device).repeat_interleave(self._m)
        mask = torch.ones(b, t, dtype=torch.bool, device=within.device).scatter_(1, apart, False)
        rest = mask.nonzero()[:, 1].view(b, t - n)
        order = torch.cat([apart, rest], dim=1).argsort(dim=1)[:, None]
        keys, values = self._basis.split(latents[PLAIN].squeeze(1), layer)
        plain = KV(keys.to(kv.keys.dtype), values.to(kv.values.dtype))
        both = KV(torch.cat([plain.keys, kv.keys], dim=2), torch.cat([plain.values, kv.values], dim=2))
        return both.take(order)
