"""What calibration found about a model, as data: the axes of every group of layers, and how it is kept on disk.

A file holds tensors (safetensors, so reading it runs no code) and a manifest: which model, which texts, which
versions, and a checksum over all tensors. A file that is damaged, or made for another model, is refused.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import deque
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
from ..model.probing import token_shapes
from ..types import Channels
from .axes import Basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Calibration", "GroupAxes", "Metric", "loaded"]

Metric = Literal["fisher", "variance"]

FORMAT = "kvstack calibration 1"
STAY = 2
"""Settings whose axes stay when no stack uses them any more."""


@dataclass(frozen=True, eq=False)
class GroupAxes:
    """The axes of a group of adjacent layers.

    Attributes:
        layers: indices in the model.
        shapes: (H, D of keys, D of values) of each of them.
        mean: (N,) of the group's un-rotated keys and values, side by side, float32.
        weight: (N,) how much an error in each number matters, float32.
        axes: (N, N) rows orthonormal, most important first, in units of sqrt(weight), float16.
        energy: (N,) variance along each axis, float32, falling.
    """

    layers: tuple[int, ...]
    shapes: tuple[tuple[int, int, int], ...]
    mean: Tensor
    weight: Tensor
    axes: Tensor
    energy: Tensor

    def basis(self, rank: int, device: torch.device, dtype: torch.dtype) -> Basis:
        """The `rank` most important axes on `device`, for rebuilding in `dtype`."""
        axes = orthonormal(self.axes[:rank].to(device, torch.float32))
        mean, weight = self.mean.to(device), self.weight.to(device)
        return Basis(axes / weight.sqrt(), mean, weight, self.shapes, dtype)


def orthonormal(rows: Tensor) -> Tensor:
    """Rows that are orthonormal up to float16, made so up to float32: a Newton step towards the polar factor, which
    leaves the square of an error that is below a thousandth."""
    return 1.5 * rows - 0.5 * (rows @ rows.T) @ rows


@dataclass(frozen=True, eq=False)
class Calibration:
    """Made by `kvstack.calibrate`; give it to `CommonKV(calibration=...)`, or save it.

    Attributes:
        groups: one per group of layers that are stored together; two where keys and values are apart
            (`metric="variance"`), those of the keys first: its parts 0 and 1.
        manifest: model, metric, texts, tokens and versions it was made with.
    """

    groups: tuple[GroupAxes, ...]
    manifest: Mapping[str, str]
    _bases: weakref.WeakValueDictionary[Any, Basis] = field(default_factory=weakref.WeakValueDictionary, repr=False)
    _newest: dict[tuple[tuple[int, ...], int], deque[Basis]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        model, tokens = self.manifest.get("model", "?"), self.manifest.get("tokens", "?")
        return f"<Calibration of {model}: {len(self.groups)} groups of layers, {tokens} tokens>"

    @property
    def layers(self) -> int:
        """Layers in a group."""
        return len(self.groups[0].layers)

    @property
    def metric(self) -> str:
        """How numbers were weighed, see `calibrate`."""
        return self.manifest.get("metric", "fisher")

    @property
    def parts(self) -> int:
        """Groups of axes for each group of layers."""
        return 2 if self.metric == "variance" else 1

    def channels_of(self, layers: Sequence[int], part: int = 0) -> Channels:
        """The channels of the group that is `layers`."""
        return Channels(self._axes_of(layers, part).energy)

    def _axes_of(self, layers: Sequence[int], part: int) -> GroupAxes:
        return next(group for group in self.groups[part :: self.parts] if group.layers == tuple(layers))

    def covers(self, groups: Sequence[Sequence[int]]) -> bool:
        """Whether there are axes for each of these groups of layers."""
        return {tuple(layers) for layers in groups} <= {group.layers for group in self.groups}

    def basis(self, layers: Sequence[int], rank: int, device: torch.device, dtype: torch.dtype, part: int = 0) -> Basis:
        """The leading axes of the group that is `layers`; stacks that need the same share one copy. On a processor,
        where making them takes as long as reading hundreds of tokens, those of the last stacks stay for the next."""
        key = (tuple(layers), rank, device, dtype, part)
        made = self._bases.get(key)
        if made is None:
            made = self._bases[key] = self._axes_of(layers, part).basis(rank, device, dtype)
        if device.type == "cpu":
            newest = self._newest.setdefault((tuple(layers), part), deque(maxlen=STAY))
            if made not in newest:
                newest.append(made)
        return made

    def tensors(self, layers: Sequence[int]) -> list[Tensor]:
        """What is held for the group that is `layers`."""
        mine = [group for group in self.groups if group.layers == tuple(layers)]
        return [x for group in mine for x in (group.mean, group.weight, group.axes, group.energy)]

    @cached_property
    def fingerprint(self) -> str:
        """Tells this calibration from any other, wherever its file is read."""
        return sampled(self._tensors())[:24]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self._tensors().values())

    # ---- spectra

    def spectrum(self, part: int = 0) -> dict[tuple[int, ...], Tensor]:
        """Layers of a group -> energy (N,) along each of its axes, falling. The energies of all groups are in one
        unit: what an error of that size would cost, up to a common factor."""
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
        for part, kind in enumerate([""] if self.parts == 1 else [", keys", ", values"]):
            for layers, energy in self.spectrum(part).items():
                axes.semilogy((energy / energy.sum()).numpy(), label=f"layers {layers[0]} to {layers[-1]}{kind}")
        axes.set(xlabel="axis", ylabel="share of the group's energy", title=self.manifest.get("model", ""))
        axes.set_ylim(bottom=1e-7)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path)

    # ---- files

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": getattr(group, name).contiguous() for i, group in enumerate(self.groups) for name in TENSORS
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, complete or not at all.

        Raises:
            WriteError: it cannot be written.
        """
        groups = [{"layers": group.layers, "shapes": group.shapes} for group in self.groups]
        metadata = {**self.manifest, "format": FORMAT, "groups": json.dumps(groups)}
        write_tensors(Path(path), self._tensors(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: no such file, damaged, truncated, or of another format.
        """
        again = "Make it again: kvstack calibrate MODEL, or kvstack.calibrate(model)."
        metadata, tensors = read_tensors(Path(path), CalibrationError, "calibration", again)
        if metadata.get("format") != FORMAT:
            raise CalibrationError(f"{os.fspath(path)!r} is no calibration of this version of kvstack. {again}")
        del metadata["format"]
        try:
            described = items(parsed_json(metadata.pop("groups", "")), "the list of groups")
            if tensors.keys() != {f"{i}.{name}" for i in range(len(described)) for name in TENSORS} or not tensors:
                raise misfit("the tensors are not those of its groups.")
            groups = [
                _read_group(entry, [tensors[f"{i}.{name}"] for name in TENSORS]) for i, entry in enumerate(described)
            ]
            calibration = cls(tuple(groups), metadata)
            calibration._check_groups()
        except ValueError as error:
            raise CalibrationError(f"{os.fspath(path)!r} is damaged: {error} {again}") from None
        return calibration

    def _check_groups(self) -> None:
        """Refuse groups of unequal size, or that share layers."""
        if len({len(group.layers) for group in self.groups}) > 1 or len(self.groups) % self.parts:
            raise misfit("its groups are not of one size.")
        for part in range(self.parts):
            layers = [layer for group in self.groups[part :: self.parts] for layer in group.layers]
            if len(set(layers)) < len(layers):
                raise misfit("a layer is in two groups.")

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
        cached = token_shapes(model)
        for number, group in enumerate(self.groups):
            for layer, shape in zip(group.layers, group.shapes, strict=True):
                heads, keys, values = cached.get(layer, (0, 0, 0))
                expected = ((heads, keys, values), (heads, keys, 0), (heads, 0, values))[
                    0 if self.parts == 1 else 1 + number % 2
                ]
                if shape != expected:
                    raise CalibrationError(
                        f"{self!r} has (heads, size of a key, size of a value) {shape} for layer {layer}, and this "
                        f"{type(model).__name__} caches {expected}. Make one for it: {wanted}."
                    )


TENSORS = ("mean", "weight", "axes", "energy")
LARGEST = 1e30  # a weight grows as what it weighs gets smaller
NEARLY_ONE = 0.05
"""How far the length of an axis in half precision may be from 1."""


def _read_group(entry: Any, tensors: Sequence[Tensor]) -> GroupAxes:
    """One group of a file, of which everything is checked.

    Raises:
        UseError: it is not what `save` writes.
    """
    described = entries(entry, "a group", ("layers", "shapes"))
    layers = [count(layer, "a layer") for layer in items(described["layers"], "the layers of a group")]
    if not layers or sorted(set(layers)) != layers:
        raise misfit(f"the layers of a group are {layers}.")
    shapes = []
    for shape in items(described["shapes"], "the shapes of a group", len(layers)):
        heads, keys, values = (count(n, "the shape of a layer") for n in items(shape, "the shape of a layer", 3))
        shapes.append((heads, keys, values))
    n = sum(heads * (keys + values) for heads, keys, values in shapes)
    for name, x in zip(TENSORS, tensors, strict=True):
        types = (torch.float16, torch.bfloat16, torch.float32) if name == "axes" else (torch.float32,)
        if x.dtype not in types or x.shape != ((n, n) if name == "axes" else (n,)) or not n:
            raise misfit(f"{name} of layers {layers} are {tuple(x.shape)} {x.dtype}, for {n} numbers a token.")
        check_numbers(x, f"{name} of layers {layers}", LARGEST)
    group = GroupAxes(tuple(layers), tuple(shapes), *tensors)
    lengths = group.axes.float().square().sum(1)
    if not bool((group.weight > 0).all() and (group.energy >= 0).all() and (group.energy.diff() <= 0).all()):
        raise misfit(f"weights of layers {layers} are not above 0, or their energy does not fall.")
    if not bool(((lengths - 1).abs() <= NEARLY_ONE).all()):
        raise misfit(f"the axes of layers {layers} are not of length 1.")
    return group


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
