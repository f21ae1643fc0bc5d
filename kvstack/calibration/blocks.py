"""Axes of smaller blocks from those of a larger one: for ranks that hold some kv heads, and to see what it costs.

C = axes^T energy axes   the covariance (N, N) of a block, in units of sqrt(weight); what its axes do not hold is
                         spread evenly over all other directions
C[part, part]            that of some of its numbers, which has axes of its own
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..waterfilling import leading
from .axes import Axes, fine_rows, slice_of, widths
from .calibration import Calibration, GroupAxes

__all__ = ["by_heads", "covariance", "numbers_of"]


def covariance(block: GroupAxes) -> Tensor:
    """(N, N), float32, in units of sqrt(weight)."""
    axes, rank, n = block.axes.rows(), len(block.axes), len(block.energy)
    rest = float(block.energy[rank:].mean()) if rank < n else 0.0
    found = axes.T @ ((block.energy[:rank] - rest)[:, None] * axes)
    found.diagonal().add_(rest)
    return found


def numbers_of(block: GroupAxes, layer: int, keys: bool) -> Tensor:
    """Where the keys or values of a layer are among the numbers of a block: (H, D)."""
    heads, *sizes = block.shapes[layer]
    part = slice_of(block.shapes, layer, keys)
    return torch.arange(part.start, part.stop).view(heads, sizes[not keys])


def by_heads(calibration: Calibration, runs: int) -> Calibration:
    """The same calibration with the kv heads of each group in `runs` blocks, each with axes of its own: as many as it
    kept, in as many bits. Keys and values that are apart stay apart.

    Raises:
        CalibrationError: heads do not divide, or are in blocks already.
    """
    if any(group.heads for group in calibration.groups) and calibration.parts != runs:
        raise CalibrationError(
            f"{calibration!r} has kv heads in {calibration.parts} blocks, and {runs} are needed. Calibrate anew."
        )
    if runs == 1 or any(group.heads for group in calibration.groups):
        return calibration
    parts = [part for group in calibration.groups for part in _runs(group, runs)]
    kept = sum(len(group.axes) for group in calibration.groups)
    ranks = leading([part.energy for part in parts], kept)
    cut = [replace(part, axes=part.axes.cloned(rank)) for part, rank in zip(parts, ranks, strict=True)]
    return Calibration(tuple(cut), calibration.manifest)


def _runs(block: GroupAxes, runs: int) -> list[GroupAxes]:
    """A block in runs of kv heads, with all their axes."""
    if any(heads % runs for heads, *_ in block.shapes):
        raise CalibrationError(
            f"layers {block.layers} have {[heads for heads, *_ in block.shapes]} kv heads, which {runs} do not divide."
        )
    whole, made = covariance(block), []
    for run in range(runs):
        heads = tuple((count // runs * run, count // runs * (run + 1)) for count, *_ in block.shapes)
        parts = [
            numbers_of(block, layer, keys)[first:last].flatten()
            for layer, (first, last) in enumerate(heads)
            for keys in (True, False)
        ]
        mine = torch.cat(parts)
        energy, vectors = torch.linalg.eigh(whole[mine][:, mine])
        shapes = tuple((count // runs, keys, values) for count, keys, values in block.shapes)
        weight = block.weight[mine]
        fine = fine_rows(len(mine), bits=16 if len(block.axes.fine) == len(block.axes) else 8)
        axes = Axes.of(vectors.T.flip(0), weight.rsqrt(), widths(shapes), fine)
        energy = energy.flip(0).clamp_min(float(block.energy[-1]))
        made.append(GroupAxes(block.layers, shapes, block.mean[mine], weight, axes, energy, heads))
    return made
