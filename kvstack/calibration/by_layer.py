"""Findings of a score about each layer of a model: a few named tensors a layer, as data and as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ..checks import check_numbers, misfit
from ..errors import CalibrationError, UseError
from ..files import read_tensors, write_tensors
from ..heads import Heads
from ..model.fingerprint import is_of, kv_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ByLayer", "Sizes"]

FORMAT = "kvstack score 1"
LARGEST = 1e15
AGAIN = "You can delete this file."

Sizes = Mapping[str, tuple[int | None, ...]]
"""Name of a tensor -> its shape; None stands for any size."""


@dataclass(frozen=True, eq=False)
class ByLayer:
    """Findings of a score about a model.

    Attributes:
        layers: layer -> its tensors by name, float32.
        manifest: the score, its settings, the model and the texts.
    """

    layers: Mapping[int, Mapping[str, Tensor]]
    manifest: Mapping[str, str]

    @property
    def tensors(self) -> list[Tensor]:
        return [x for named in self.layers.values() for x in named.values()]

    def of(self, layer: int, name: str, heads: Heads, like: Tensor) -> Tensor:
        """A tensor of a layer, of the kv heads of this process that keys `like` (B, H, T, D) belong to, and on their
        device."""
        return self.layers[layer][name][heads.places(layer, like.shape[1])].to(like.device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, complete or not at all.

        Raises:
            WriteError: it cannot be written.
        """
        named = [(f"{layer}.{name}", x) for layer, own in self.layers.items() for name, x in own.items()]
        write_tensors(Path(path), {name: x.contiguous() for name, x in named}, {**self.manifest, "format": FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, score: str, sizes: Mapping[int, Sizes]) -> Self:
        """Read a file that `save` wrote, for `model` and a `score` (its settings, as `manifest` has them), which needs
        tensors of these `sizes` in each layer.

        Raises:
            CalibrationError: no such file, damaged, or not what `score` needs for `model`.
        """
        where = repr(os.fspath(path))
        manifest, tensors = read_tensors(Path(path), CalibrationError, "calibration", AGAIN)
        if manifest.pop("format", None) != FORMAT:
            raise CalibrationError(f"{where} is not a calibration of a score of this version of kvstack. {AGAIN}")
        if manifest.get("score") != score or not is_of(manifest.get("identity"), model):
            raise CalibrationError(
                f"{where} is for {manifest.get('score')} and the model {manifest.get('identity')}, not for {score} and "
                f"this {type(model).__name__} (fingerprint {kv_fingerprint(model)}). {AGAIN}"
            )
        try:
            _check(tensors, sizes)
        except UseError as error:
            raise CalibrationError(f"{where} is damaged: {error} {AGAIN}") from None
        layers = {layer: {name: tensors[f"{layer}.{name}"] for name in named} for layer, named in sizes.items()}
        return cls(layers, manifest)


def _check(tensors: Mapping[str, Tensor], sizes: Mapping[int, Sizes]) -> None:
    """Refuse other tensors than those of `sizes`."""
    wanted = {f"{layer}.{name}": size for layer, named in sizes.items() for name, size in named.items()}
    if tensors.keys() != wanted.keys():
        raise misfit(f"it holds {len(tensors)} tensors, not the {len(wanted)} of {len(sizes)} layers.")
    for name, x in tensors.items():
        size = wanted[name]
        fits = x.dim() == len(size) and all(n in (None, m) for n, m in zip(size, x.shape, strict=True))
        if x.dtype != torch.float32 or not fits:
            raise misfit(f"{name} is {tuple(x.shape)} {x.dtype}, not {size} float32.")
        check_numbers(x, name, LARGEST)
