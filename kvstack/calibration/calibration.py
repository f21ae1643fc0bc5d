"""Findings of a calibration about a model, as data: the axes of every group of layers; and their file on disk.

A file holds tensors (safetensors, so reading it runs no code) and a manifest: which model, which texts, which
versions, and a checksum over all tensors. A file that is damaged, or made for another model, is refused.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from ..checks import check_numbers, count, entries, items, misfit
from ..errors import CalibrationError
from ..files import parsed_json, read_tensors, write_tensors
from ..model.fingerprint import is_of, kv_fingerprint, sampled
from ..model.ranks import whole_shapes
from .axes import ROWS, Axes, Basis, Shapes, widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Calibration", "GroupAxes", "Heads", "Metric", "loaded"]

Metric = Literal["fisher", "variance"]

FORMAT = "kvstack calibration 2"
BEFORE = "kvstack calibration 1"
"""Of version 0.1: all axes, as halves."""

Heads = tuple[tuple[int, int], ...]
"""Of each layer, the first kv head and the one behind the last; empty: all heads."""


@dataclass(frozen=True, eq=False)
class GroupAxes:
    """The axes of one block of numbers: the kv heads, or some of them, of a group of adjacent layers.

    Attributes:
        layers: indices in the model.
        shapes: (H, D of keys, D of values) of each of them, in this block.
        mean: (N,) of the block's un-rotated keys and values, side by side, float32.
        weight: (N,) how much an error in each number matters, float32.
        axes: those that are kept, (R, N) rows orthonormal in units of sqrt(weight), most important first.
        energy: (N,) variance along each axis, of all of them, float32, falling.
        heads: the kv heads of each layer; empty: all.
    """

    layers: tuple[int, ...]
    shapes: Shapes
    mean: Tensor
    weight: Tensor
    axes: Axes
    energy: Tensor
    heads: Heads = ()

    @property
    def tensors(self) -> list[Tensor]:
        return [self.mean, self.weight, self.axes.codes, self.axes.fine, self.axes.scale, self.energy]

    def basis(self, rank: int, device: torch.device, dtype: torch.dtype) -> Basis:
        """The `rank` most important axes on `device`, for rebuilding in `dtype`. On the device of the calibration they
        stay where they are."""
        axes = self.axes.leading(rank).to(device)
        return Basis(axes, self.mean.to(device), self.weight.to(device), self.shapes, dtype)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Made by `kvstack.calibrate`; give it to `CommonKV(calibration=...)`, or save it.

    Attributes:
        groups: one per group of layers that are stored together; or several, its parts: one for each run of kv heads,
            and where keys and values are apart (`metric="variance"`), first those of the keys.
        manifest: model, metric, texts, tokens and versions it was made with.
    """

    groups: tuple[GroupAxes, ...]
    manifest: Mapping[str, str]
    _bases: weakref.WeakValueDictionary[Any, Basis] = field(default_factory=weakref.WeakValueDictionary, repr=False)
    _before: str = field(default="", repr=False)
    """The fingerprint of a file of version 0.1: caches that were saved with it still load."""
    cuts: dict[Any, Calibration] = field(default_factory=dict, repr=False)
    """Parts that were cut from it for one of several processes."""

    def __repr__(self) -> str:
        model, tokens = self.manifest.get("model", "?"), self.manifest.get("tokens", "?")
        return f"<Calibration of {model}: {len(self.groups)} groups of layers, {tokens} tokens>"

    @property
    def layers(self) -> int:
        """Layers in a group."""
        return len(self.groups[0].layers)

    @property
    def metric(self) -> str:
        """The way in which numbers were weighed, see `calibrate`."""
        return self.manifest.get("metric", "fisher")

    @property
    def parts(self) -> int:
        """Blocks of axes for each group of layers."""
        return sum(group.layers == self.groups[0].layers for group in self.groups)

    @property
    def runs(self) -> int:
        """Runs of kv heads that have axes of their own."""
        return self.parts // (2 if self.metric == "variance" else 1)

    def of(self, layers: Sequence[int]) -> list[GroupAxes]:
        """The blocks of the group that is `layers`."""
        return [group for group in self.groups if group.layers == tuple(layers)]

    def everywhere(self, layers: Sequence[int]) -> list[GroupAxes]:
        """The blocks that share a budget with those `of` this group: where processes share the kv heads, the blocks of
        all of them."""
        return self.of(layers)

    @property
    def kept(self) -> tuple[int, int]:
        """Axes that are kept, and all that there are."""
        return sum(len(group.axes) for group in self.groups), sum(len(group.energy) for group in self.groups)

    def name_of(self, group: GroupAxes) -> str:
        """Describe the content of a block in words."""
        name = f"layers {group.layers[0]} to {group.layers[-1]}"
        if self.metric == "variance":
            name += ", keys" if group.shapes[0][1] else ", values"
        return f"{name}, heads {group.heads[0][0]} to {group.heads[0][1] - 1}" if group.heads else name

    def covers(self, groups: Sequence[Sequence[int]]) -> bool:
        """Return True if there are axes for each of these groups of layers."""
        return {tuple(layers) for layers in groups} <= {group.layers for group in self.groups}

    def basis(self, layers: Sequence[int], rank: int, device: torch.device, dtype: torch.dtype, part: int = 0) -> Basis:
        """The leading axes of a block of the group that is `layers`; stacks that need the same share one copy."""
        key = (tuple(layers), rank, device, dtype, part)
        made = self._bases.get(key)
        if made is None:
            made = self._bases[key] = self.of(layers)[part].basis(rank, device, dtype)
        return made

    def tensors(self, layers: Sequence[int]) -> list[Tensor]:
        """Return the tensors held for the group that is `layers`."""
        return [x for group in self.of(layers) for x in group.tensors]

    @cached_property
    def fingerprint(self) -> str:
        """Tells this calibration from any other, wherever its file is read."""
        return self._before or sampled(self._tensors())[:24]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self._tensors().values())

    # ---- spectra

    def spectrum(self, part: int = 0) -> dict[tuple[int, ...], Tensor]:
        """Layers of a group -> energy (N,) along each of its axes, falling. The energies of all groups are in one
        unit: the cost of an error of that size, up to a common factor."""
        return {group.layers: group.energy.clone() for group in self.groups[part :: self.parts]}

    def rank(self, share: float = 0.99, part: int = 0) -> dict[tuple[int, ...], int]:
        """Layers of a group -> axes that hold `share` of its energy."""
        return {
            layers: min(len(energy), int((energy.cumsum(0) < share * energy.sum()).sum()) + 1)
            for layers, energy in self.spectrum(part).items()
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the spectra of all groups into a picture (needs matplotlib)."""
        from matplotlib.figure import Figure  # no pyplot: it would choose a backend for the whole process

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for group in self.groups:
            axes.semilogy((group.energy / group.energy.sum()).numpy(), label=self.name_of(group))
        axes.set(xlabel="axis", ylabel="share of the group's energy", title=self.manifest.get("model", ""))
        axes.set_ylim(bottom=1e-7)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path)

    # ---- files

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": x.contiguous()
            for i, group in enumerate(self.groups)
            for name, x in zip(TENSORS, group.tensors, strict=True)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, complete or not at all.

        Raises:
            WriteError: it cannot be written.
        """
        groups = [{"layers": group.layers, "shapes": group.shapes, "heads": group.heads} for group in self.groups]
        metadata = {**self.manifest, "format": FORMAT, "groups": json.dumps(groups), "before": self._before}
        write_tensors(Path(path), self._tensors(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: no such file, damaged, truncated, or of another format.
        """
        again = "Make it again: kvstack calibrate MODEL, or kvstack.calibrate(model)."
        metadata, tensors = read_tensors(Path(path), CalibrationError, "calibration", again)
        version = metadata.pop("format", None)
        if version not in (FORMAT, BEFORE):
            raise CalibrationError(f"{os.fspath(path)!r} is not a calibration of this version of kvstack. {again}")
        names = TENSORS if version == FORMAT else TENSORS_BEFORE
        before = metadata.pop("before", "") if version == FORMAT else sampled(tensors)[:24]
        try:
            described = items(parsed_json(metadata.pop("groups", "")), "the list of groups")
            if tensors.keys() != {f"{i}.{name}" for i in range(len(described)) for name in names} or not tensors:
                raise misfit("the tensors are not those of its groups.")
            groups = []
            for i, entry in enumerate(described):
                groups.append(_read_group(entry, {name: tensors[f"{i}.{name}"] for name in names}))
            calibration = cls(tuple(groups), metadata, _before=before)
            calibration._check_groups()
        except ValueError as error:
            raise CalibrationError(f"{os.fspath(path)!r} is damaged: {error} {again}") from None
        return calibration

    def _check_groups(self) -> None:
        """Refuse groups of unequal size, that share layers, or whose parts are not those of a calibration."""
        if len({len(group.layers) for group in self.groups}) > 1 or len(self.groups) % self.parts:
            raise misfit("its groups are not of one size.")
        if self.metric == "variance" and self.parts % 2:
            raise misfit("keys and values are not two parts of each group.")
        known: set[int] = set()
        for first in range(0, len(self.groups), self.parts):
            layers, *others = (group.layers for group in self.groups[first : first + self.parts])
            if known & set(layers) or any(other != layers for other in others):
                raise misfit("a layer is in two groups.")
            known |= set(layers)

    def check(self, model: PreTrainedModel, metric: Metric = "fisher", layers: int | None = None) -> None:
        """Raise `CalibrationError` where this was made for another model or with another metric; the message says how
        to make one for groups of `layers`."""
        wanted = f"kvstack.calibrate(model{'' if layers is None else f', layers={layers}'}, metric={metric!r})"
        if self.metric != metric:
            raise CalibrationError(
                f"{self!r} was made with metric={self.metric!r}, and {metric!r} is needed. Make one with it: {wanted}."
            )
        mine = self.manifest.get("identity")
        if not is_of(mine, model):
            raise CalibrationError(
                f"{self!r} was made for another model than this {type(model).__name__} (fingerprint {mine}, not "
                f"{kv_fingerprint(model)}). Make one for it: {wanted}."
            )
        cached = whole_shapes(model)
        for number, group in enumerate(self.groups):
            for slot, (layer, shape) in enumerate(zip(group.layers, group.shapes, strict=True)):
                if layer not in cached:
                    raise CalibrationError(
                        f"{self!r} has axes for layer {layer}, and {type(model).__name__} has no full-attention layer "
                        f"of that number. Make one for it: {wanted}."
                    )
                heads, keys, values = cached[layer]
                if self.metric == "variance":
                    keys, values = (keys, 0) if number % self.parts < self.runs else (0, values)
                if group.heads:
                    first, last = group.heads[slot]
                    heads = max(0, min(last, heads) - first)
                if shape != (heads, keys, values):
                    raise CalibrationError(
                        f"{self!r} has (heads, size of a key, size of a value) {shape} for layer {layer}, and this "
                        f"{type(model).__name__} caches {(heads, keys, values)}. Make one for it: {wanted}."
                    )
        for first in range(0, len(self.groups), self.runs):
            runs = self.groups[first : first + self.runs]
            for slot, layer in enumerate(runs[0].layers):
                heads = cached[layer][0]
                spans, each = [run.heads[slot] if run.heads else (0, heads) for run in runs], heads // self.runs
                if heads % self.runs or spans != [(each * n, each * (n + 1)) for n in range(self.runs)]:
                    raise CalibrationError(
                        f"{self!r} does not hold the {heads} kv heads of layer {layer} in runs of equal length. "
                        f"Make one that does: {wanted}."
                    )


TENSORS = ("mean", "weight", "axes", "fine", "scale", "energy")
TENSORS_BEFORE = ("mean", "weight", "axes", "energy")
LARGEST = 1e30  # a weight grows as what it weighs gets smaller
NEARLY_ONE = 0.05
"""The largest distance from 1 that the length of an axis in few bits may have."""


def _read_group(entry: Any, tensors: Mapping[str, Tensor]) -> GroupAxes:
    """One group of a file, of which everything is checked.

    Raises:
        UseError: it is not what `save` writes.
    """
    described = entries(entry, "a group", ("layers", "shapes"), ("heads",))
    layers = [count(layer, "a layer") for layer in items(described["layers"], "the layers of a group")]
    if not layers or sorted(set(layers)) != layers:
        raise misfit(f"the layers of a group are {layers}.")
    shapes = []
    for shape in items(described["shapes"], "the shapes of a group", len(layers)):
        heads, keys, values = (count(n, "the shape of a layer") for n in items(shape, "the shape of a layer", 3))
        shapes.append((heads, keys, values))
    runs = []
    for slot, run in enumerate(items(described.get("heads") or [], "the heads of a group")):
        first, last = (count(n, "a head") for n in items(run, "the heads of a layer", 2))
        if slot >= len(layers) or last - first != shapes[slot][0]:
            raise misfit(f"the heads of layers {layers} are not those of its shapes.")
        runs.append((first, last))
    if runs and len(runs) != len(layers):
        raise misfit(f"the heads of layers {layers} are not those of all of them.")
    n = sum(heads * (keys + values) for heads, keys, values in shapes)
    for name in ("mean", "weight", "energy"):
        if tensors[name].dtype != torch.float32 or tensors[name].shape != (n,) or not n:
            x = tensors[name]
            raise misfit(f"{name} of layers {layers} are {tuple(x.shape)} {x.dtype}, for {n} numbers a token.")
        check_numbers(tensors[name], f"{name} of layers {layers}", LARGEST)
    weight, energy = tensors["weight"], tensors["energy"]
    if not bool((weight > 0).all() and (energy >= 0).all() and (energy.diff() <= 0).all()):
        raise misfit(f"weights of layers {layers} are not above 0, or their energy does not fall.")
    axes = _read_axes(tensors, layers, weight.rsqrt(), widths(tuple(shapes)))
    return GroupAxes(tuple(layers), tuple(shapes), tensors["mean"], weight, axes, energy, tuple(runs))


def _read_axes(tensors: Mapping[str, Tensor], layers: Sequence[int], unit: Tensor, sizes: tuple[int, ...]) -> Axes:
    x, n = tensors["axes"], len(unit)
    coded = "scale" in tensors
    types = (torch.int8,) if coded else (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in types or x.dim() != 2 or x.shape[1] != n or not 1 <= len(x) <= n or (not coded and len(x) < n):
        raise misfit(f"axes of layers {layers} are {tuple(x.shape)} {x.dtype}, for {n} numbers a token.")
    if coded:
        scale, fine = tensors["scale"], tensors["fine"]
        if fine.dtype != torch.int8 or fine.dim() != 2 or fine.shape[1] != n or len(fine) > len(x):
            raise misfit(f"fine parts of layers {layers} are {tuple(fine.shape)} {fine.dtype}, for {len(x)} axes.")
        if scale.dtype != torch.float32 or scale.shape != (len(x), len(sizes)):
            raise misfit(f"scales of layers {layers} are {tuple(scale.shape)} {scale.dtype}, for {len(sizes)} heads.")
        check_numbers(scale, f"scales of layers {layers}", 1.0)
        axes = Axes(x, fine, scale, unit, sizes)
    else:
        check_numbers(x, f"axes of layers {layers}", LARGEST)
        axes = Axes.of(x, unit, sizes, fine=n)
    for first in range(0, len(x), ROWS):
        lengths = axes.rows(first, first + ROWS).square().sum(1)
        if not bool(((lengths - 1).abs() <= NEARLY_ONE).all()):
            raise misfit(f"the axes of layers {layers} are not of length 1.")
    return axes


_loaded: weakref.WeakValueDictionary[Any, Calibration] = weakref.WeakValueDictionary()


def loaded(path: str | os.PathLike[str]) -> Calibration:
    """The calibration in a file, one object for all who ask while the file stays the same."""
    place = Path(path)
    if not place.is_file():
        return Calibration.load(path)  # says so
    stat = place.stat()
    key = (place.resolve(), stat.st_mtime_ns, stat.st_size)
    known = _loaded.get(key)
    if known is None:
        known = _loaded[key] = Calibration.load(path)
    return known
