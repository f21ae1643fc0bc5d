"""CommonKV: one latent per token for the keys and values of a whole group of layers.

CommonKV                    settings
Calibrated, OfWeights       bound to a model: where the axes of each group come from, what the groups may spend
Project, Mean               the codec of one group: how its layers become one latent, and back
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from ..abilities import Allotment, Budgeted, Linear, NeedsHidden, ReadsLinearly
from ..calibration.axes import Basis, Shapes, by_basis, flat, split
from ..calibration.calibrate import calibration_for
from ..calibration.calibration import Calibration, loaded
from ..calibration.plan import calibrated_groups
from ..calibration.weight_axes import weight_axes
from ..calibration.windows import sample_ids
from ..checks import check_places
from ..encode.channel_codes import ChannelCodes
from ..errors import BindError
from ..floats import fitting, saturated
from ..heads import ALONE, Heads
from ..model.layers import LayerGroups
from ..model.probing import observe
from ..model.ranks import heads_of
from ..stage import BoundTransform, Transform, as_path, check
from ..types import KV, Channels, Latent, take_tokens
from ..waterfilling import DISTORTION, leading, nearly_best, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CommonKV"]

LATENT, UNMERGED, WHERE = "latent", "unmerged", "places"
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
        layers: adjacent full-attention layers in a group; default those of `calibration`, or a divisor of their number
            near 5, fewer where a layer caches very many numbers.
        basis: the source of a group's axes. `calibrated` (default): the directions along which its un-rotated
            keys and values vary on calibration text, each number weighed by how much it matters. `weights` (the
            paper's): singular vectors of its key and value projections; no data, and much worse.
        merge: makes one latent of a group's layers. `project` (default): the latent that leaves the least error in
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
        exact: to answer a single query, the keys of how many tokens are rebuilt for each kv head at most (default
            384): of fewer tokens all, of more those whose rough scores give them a share of the attention that counts,
            3 in 10,000 or more. The others keep their rough scores, and all values count. None: all keys are rebuilt,
            as for a prompt.
        rough: leading channels of a latent that make the rough scores (default 512).
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
    exact: int | None = 384
    rough: int = 512
    rebuild: Literal["float32", "bfloat16"] | None = None

    name = "commonkv"
    source = "arXiv 2508.16134"
    saves = "layers: one latent for several"
    unrotated = True

    @property
    def usual_window(self) -> int:  # type: ignore[override]
        # latents of calibrated axes are so exact that raw tokens cost more than they give
        return 16 if self.basis == "calibrated" else Transform.usual_window

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
        check(layers is None or _counts(layers), self, "layers counts layers.", "Use 1 or more.")
        check(self.basis in ("calibrated", "weights"), self, f"{self.basis!r} is not a basis.", 'Use "calibrated".')
        check(self.merge in ("project", "mean"), self, f"{self.merge!r} is not a way to merge.", 'Use "project".')
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
        check(
            self.exact is None or _counts(self.exact), self, "exact counts tokens.", "Use exact=384, or None for all."
        )
        check(_counts(self.rough), self, "rough counts channels.", "Use rough=512.")
        object.__setattr__(self, "calibration", as_path(self, "calibration", Calibration))
        known = self.rebuild in (None, "float32", "bfloat16")
        check(known, self, f"{self.rebuild!r} is not a type to compute in.", 'Use "float32" or "bfloat16".')

    def bind(self, model: PreTrainedModel, layers: Sequence[int] | None = None) -> BoundTransform:
        size = self.layers
        if size is None and self.calibration is not None:
            given = self.calibration if isinstance(self.calibration, Calibration) else loaded(self.calibration)
            size = given.layers
        groups = calibrated_groups(model, size, layers)
        dtype = model.dtype if self.rebuild is None else getattr(torch, self.rebuild)
        bound = Calibrated if self.basis == "calibrated" else OfWeights
        return bound(self, model, groups, dtype)

    def check_rank(self, groups: LayerGroups, most: int) -> None:
        """Raise `BindError` where `keep` counts more numbers than a group has axes."""
        if isinstance(self.keep, int) and self.keep > most:
            raise BindError(f"{self!r}: a group of {groups.size} layers has {most} axes. Use keep={most} or less.")


def _counts(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


# ---- bound to a model


class Calibrated(Budgeted):
    """Axes from a calibration. All blocks of all groups compete for one budget, those of other processes as well where
    several share the kv heads.

    Args:
        complete: True if all axes are wanted, where the default calibration keeps half of them.
    """

    stage: CommonKV

    def __init__(
        self,
        stage: CommonKV,
        model: PreTrainedModel,
        groups: LayerGroups,
        dtype: torch.dtype,
        *,
        complete: bool = False,
    ) -> None:
        super().__init__(stage, groups.size, unrotated=groups.rotates)
        self.groups, self.dtype, self.heads = groups, dtype, heads_of(model)
        self.calibration = calibration_for(stage, stage.calibration, model, groups, "fisher", complete=complete)
        self.blocks = [block for layers in groups.groups for block in self.calibration.everywhere(layers)]
        axes = [
            sum(len(block.energy) for block in self.blocks if block.layers == tuple(layers)) for layers in groups.groups
        ]
        stage.check_rank(groups, min(axes))
        self._numbers = int(stage.keep * sum(axes)) if isinstance(stage.keep, float) else stage.keep * len(axes)
        # without an encoder that spends bits unevenly, places go to the channels of most energy
        energies = [known.energy for known in self.channels]
        self.allotments = [Allotment(rank) for rank in leading(energies, self._numbers)]
        self._complete: Callable[[], Any] | None = None
        if not complete:
            self._complete = partial(type(self), stage, model, groups, dtype, complete=True)
        self.apart: list[int] | None = None
        if stage.unmerged:
            self.apart = settle_apart(stage.unmerged, model, groups, self.for_group)

    @property
    def numbers(self) -> int:
        return self._numbers

    @property
    def channels(self) -> Sequence[Channels]:
        return [Channels(block.energy[: len(block.axes)]) for block in self.blocks]

    def ample(self, allotments: Sequence[Allotment]) -> Self:
        """With all axes, where those that are kept leave an error that is much larger."""
        if self._complete is None:
            return self
        energies = [block.energy for block in self.blocks]
        bits = [_bits(allotment) for allotment in allotments]
        if all(isinstance(allotment.encoder, ChannelCodes) for allotment in allotments):
            best = spread(energies, sum(int(given.sum()) for given in bits))
        else:
            best = [_bits(Allotment(rank)) for rank in leading(energies, self._numbers)]
        if nearly_best(energies, bits, best):
            return self
        made: Self = self._complete()
        return made

    def allotted(self, allotments: Sequence[Allotment]) -> Self:
        other: Self = object.__new__(type(self))
        vars(other).update(vars(self), allotments=list(allotments), _complete=None)
        return other

    def for_group(self, layers: Sequence[int]) -> Project:
        number, device = self.groups.number_of(layers), self.groups.devices[layers[0]]
        given = dict(zip(self.blocks, self.allotments, strict=True))
        allotments = [given[block] for block in self.calibration.of(layers)]
        bases = [
            self.calibration.basis(layers, allotment.rank, device, self.dtype, part)
            for part, allotment in enumerate(allotments)
        ]
        codec = Project(bases, None if self.apart is None else self.apart[number], self._heads_of(layers))
        encoders = {name: one.encoder for name, one in zip(codec.names, allotments, strict=True) if one.encoder}
        codec.encoders = {name: x.to(device) if isinstance(x, ChannelCodes) else x for name, x in encoders.items()}
        codec.lower = {
            name: [x.to(device) if isinstance(x, ChannelCodes) else x for x in one.lower]
            for name, one in zip(codec.names, allotments, strict=True)
            if one.lower
        }
        codec.exact, codec.rough = self.stage.exact, self.stage.rough
        codec.tensors = [*(x for basis in bases for x in basis.tensors), *self.calibration.tensors(layers)]
        codec.fingerprint = _fingerprint(self.calibration.fingerprint, layers, codec)
        if widths := [x.runs for x in encoders.values() if isinstance(x, ChannelCodes)]:
            codec.fingerprint += f" bits {widths}"
        return codec

    def _heads_of(self, layers: Sequence[int]) -> Heads:
        return ALONE if self.heads.whole.issuperset(layers) else self.heads


def _bits(allotment: Allotment) -> Tensor:
    """Bits of each channel that is stored; where nobody counts them, so many that they leave no error."""
    encoder = allotment.encoder
    return encoder.bits if isinstance(encoder, ChannelCodes) else torch.full((allotment.rank,), len(DISTORTION))


class OfWeights(BoundTransform):
    """The paper's axes: singular vectors of the key and value projections. All groups have the same rank."""

    stage: CommonKV

    def __init__(self, stage: CommonKV, model: PreTrainedModel, groups: LayerGroups, dtype: torch.dtype) -> None:
        super().__init__(stage, groups.size, unrotated=groups.rotates)
        self.groups, self.dtype = groups, dtype
        self.merge, self.similarity = stage.merge, stage.similarity
        self.axes = weight_axes(model, groups)
        stage.check_rank(groups, self.axes.full_rank)
        each = (
            int(stage.keep * self.axes.numbers) // len(groups.groups) if isinstance(stage.keep, float) else stage.keep
        )
        # more axes than the weights have rank would be zeros
        self.rank = min(max(1, each), self.axes.full_rank)
        every = LayerGroups(model, 1).full
        if stage.weights is not None and len(stage.weights) != len(every):
            raise BindError(
                f"{stage!r}: weights holds {len(stage.weights)} numbers, and {type(model).__name__} has "
                f"{len(every)} full-attention layers. Give one for each."
            )
        self.weights = dict(zip(every, stage.weights or (1.0,) * len(every), strict=True))
        self.apart: list[int] | None = None
        if stage.unmerged:
            self.apart = settle_apart(stage.unmerged, model, groups, self.for_group)

    def for_group(self, layers: Sequence[int]) -> Project:
        number, device = self.groups.number_of(layers), self.groups.devices[layers[0]]
        basis = self.axes.basis(layers, self.rank, device, self.dtype)
        apart = None if self.apart is None else self.apart[number]
        codec = Project([basis], apart)
        if self.merge == "mean":
            mine = [self.weights[layer] for layer in layers]
            shares = torch.tensor(mine if sum(mine) > 0 else [1.0] * len(layers), device=device)
            down = self.axes.down(layers, self.rank, device)
            codec = Mean(basis, apart, down, shares / shares.sum(), self.similarity)
        codec.exact, codec.rough = self.stage.exact, self.stage.rough
        codec.tensors = [*basis.tensors, *self.axes.tensors(layers)]
        codec.fingerprint = _fingerprint(self.axes.fingerprint, layers, codec)
        return codec


def _fingerprint(axes: str, layers: Sequence[int], codec: Project) -> str:
    ranks = "+".join(str(basis.rank) for basis in codec.bases)
    return f"{axes} {tuple(layers)} rank {ranks} unmerged {codec.apart}"


def settle_apart(
    share: float, model: PreTrainedModel, groups: LayerGroups, for_group: Callable[..., Project]
) -> list[int]:
    """Return how many tokens of every `TOGETHER` each group keeps apart: those that are most unlike, over all groups,
    on a sample text."""
    observed = observe(model, groups, sample_ids(model))
    unlike = []
    for layers in groups.groups:
        codec, group = for_group(layers), [observed[i] for i in layers]
        unlike.append(codec.unlike(group, codec.latents(group)).flatten().cpu())
    # the threshold that leaves `share` of all groups' tokens above it
    everything = torch.cat(unlike)
    least = everything.sort(descending=True).values[max(0, int(share * len(everything)) - 1)]
    steps = TOGETHER // STEP
    wanted = [float((part >= least).float().mean()) * steps for part in unlike]
    # whole steps, and what rounding left over to those that lost most by it
    counts = [min(steps - 1, int(want)) for want in wanted]
    left = round(share * steps * len(wanted)) - sum(counts)
    for i in sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i])[: max(0, left)]:
        counts[i] = min(steps - 1, counts[i] + 1)
    return [count * STEP for count in counts]


# ---- one group


class Project(ReadsLinearly):
    """The latents that leave the least error in the keys and values of a group: one, or one for each run of kv heads.

    Args:
        bases: the axes of each latent; their heads side by side are those of the group.
        apart: tokens of every `TOGETHER` that keep their plain keys and values; None where no group keeps any.
        heads: the processes that choose these tokens together; by default each does for the heads it has.
    """

    reads_room = True

    def __init__(self, bases: Sequence[Basis], apart: int | None, heads: Heads = ALONE) -> None:
        self.bases, self.apart, self.heads = bases, apart or 0, heads
        self.names = [LATENT] if len(bases) == 1 else [f"{LATENT} {number}" for number in range(len(bases))]
        if apart is not None:
            self.granule, self.latent_multiple = TOGETHER, STEP

    # ---- there and back

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        z = self.latents(group)
        dtype = group[0].keys.dtype
        data = {
            name: fitting(merged, dtype).unsqueeze(1) for name, merged in zip(self.names, self.merged(z), strict=True)
        }
        if not self.apart:
            return {name: Latent(x) for name, x in data.items()}
        apart, rest = self._parted(self.unlike(group, z))
        plain = fitting(flat(group), dtype).unsqueeze(1)
        return {
            UNMERGED: Latent(take_tokens(plain, apart.unsqueeze(1)), exact=True),
            WHERE: Latent((apart % TOGETHER).to(torch.uint8)[:, None, :, None], exact=True),
            **{name: Latent(take_tokens(x, rest.unsqueeze(1))) for name, x in data.items()},
        }

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        values = [
            saturated(basis.values(z, layer), z.dtype) for basis, z in zip(self.bases, self._each(latents), strict=True)
        ]
        kv = KV(self.keys_of(latents, layer), _by_head(values))
        return self._joined(kv, latents, layer) if self.apart else kv

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        return super().keys(latents, layer) if self.apart else self.keys_of(latents, layer)

    def linear(self, kind: Literal["keys", "values"], layer: int) -> Linear | None:
        pairs = self.linears(layer)
        return pairs[0][kind == "values"] if len(pairs) == 1 else None

    def linears(self, layer: int) -> Sequence[tuple[Linear, Linear]]:
        if self.apart:
            return []
        return [
            (Linear(name, *basis.cut(layer, keys=True)), Linear(name, *basis.cut(layer, keys=False)))
            for name, basis in zip(self.names, self.bases, strict=True)
        ]

    def keys_of(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        """Latents -> keys (B, H, T, D) of the tokens that are merged."""
        made = zip(self.bases, self._each(latents), strict=True)
        return _by_head([saturated(basis.keys(z, layer), z.dtype) for basis, z in made])

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        if self.apart:
            return super().weigh(weights, latents, layer)
        parts = weights.split([basis.shapes[layer][0] for basis in self.bases], dim=1)
        made = zip(self.bases, parts, self._each(latents), strict=True)
        return _by_head([basis.weigh(part, z, layer) for basis, part, z in made])

    def _each(self, latents: Mapping[str, Tensor]) -> list[Tensor]:
        """(B, T, R) of each basis."""
        return [latents[name].squeeze(1) for name in self.names]

    def latents(self, group: Sequence[KV]) -> list[Tensor]:
        """Of each basis (B, T, R), or (layers, B, T, R) where each layer gives one."""
        return [basis.project(flat(part)) for basis, part in zip(self.bases, by_basis(group, self.bases), strict=True)]

    def merged(self, z: Sequence[Tensor]) -> Sequence[Tensor]:
        """`latents` -> (B, T, R) of each basis."""
        return z

    @property
    def _shapes(self) -> Shapes:
        """(H, D of keys, D of values) of each layer, all bases together."""
        layers = zip(*(basis.shapes for basis in self.bases), strict=True)
        return tuple((sum(heads for heads, *_ in runs), *runs[0][1:]) for runs in layers)

    def check_latents(self, latents: Mapping[str, Tensor]) -> None:
        if self.apart:
            check_places(latents[WHERE][:, 0, :, 0], self.apart, TOGETHER, "tokens that are not merged")

    # ---- tokens that are not merged

    def unlike(self, group: Sequence[KV], z: Sequence[Tensor]) -> Tensor:
        """(B, T): how badly a token suits one latent for all layers."""
        parts = zip(self.bases, by_basis(group, self.bases), z, strict=True)
        return self.heads.sum(torch.stack([basis.loss(flat(part), mine) for basis, part, mine in parts]).sum(0))

    def _parted(self, unlike: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the tokens that stay apart and of the others, (B, n) each, ascending: as many in every granule."""
        b, t = unlike.shape
        order = unlike.view(b, t // TOGETHER, TOGETHER).argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(0, t, TOGETHER, device=unlike.device)[:, None]
        apart, rest = order.tensor_split([self.apart], dim=-1)
        return (apart.sort(dim=-1).values + first).flatten(1), (rest.sort(dim=-1).values + first).flatten(1)

    def _joined(self, kv: KV, latents: Mapping[str, Tensor], layer: int) -> KV:
        """Merged and unmerged tokens in their order."""
        within = latents[WHERE][:, 0, :, 0].long()  # (B, n)
        b, n = within.shape
        t = n // self.apart * TOGETHER
        apart = within + torch.arange(0, t, TOGETHER, device=within.device).repeat_interleave(self.apart)
        mask = torch.ones(b, t, dtype=torch.bool, device=within.device).scatter_(1, apart, False)
        rest = mask.nonzero()[:, 1].view(b, t - n)
        order = torch.cat([apart, rest], dim=1).argsort(dim=1)[:, None]
        plain = split(latents[UNMERGED].squeeze(1), self._shapes, layer)
        both = KV(torch.cat([plain.keys, kv.keys], dim=2), torch.cat([plain.values, kv.values], dim=2))
        return both.take(order)


def _by_head(parts: Sequence[Tensor]) -> Tensor:
    """Runs of heads (B, h, T, D) side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class Mean(NeedsHidden, Project):
    """The paper's: the mean of one latent per layer, each read off the layer's hidden state.

    Args:
        down: (R, hidden size), hidden states to latents.
        shares: (layers,) how much each layer counts, in all 1.
        similarity: the layers whose latents must be alike for a token to be merged: `ends` or all `pairs`.
    """

    def __init__(
        self, basis: Basis, apart: int | None, down: Tensor, shares: Tensor, similarity: Literal["ends", "pairs"]
    ) -> None:
        super().__init__([basis], apart)
        self.down, self.shares, self.similarity = down, shares, similarity

    def latents(self, group: Sequence[KV]) -> list[Tensor]:
        hidden = [kv.hidden[:, 0].to(self.down.device).float() for kv in group if kv.hidden is not None]
        return [torch.stack([x @ self.down.T for x in hidden])]

    def merged(self, z: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.einsum("l,lbtr->btr", self.shares, z[0])]

    def unlike(self, group: Sequence[KV], z: Sequence[Tensor]) -> Tensor:
        unit = torch.nn.functional.normalize(z[0], dim=-1)
        if self.similarity == "ends":
            return -(unit[0] * unit[-1]).sum(-1)
        return -unit.sum(0).square().sum(-1)  # the sum of all pairs' cosines, up to constants
