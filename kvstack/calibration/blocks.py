"""Axes of smaller blocks from those of a larger one: for processes that hold some kv heads each (tensor parallelism).

C = axes^T energy axes   the covariance (N, N) of a block, in units of sqrt(weight); what its axes do not hold is
                         spread evenly over all other directions
C[part, part]            that of some of its numbers, which has axes of its own

All processes cut the same calibration in the same way. So each knows the energies of all blocks, and its part of the
budget that they share, without asking the others. It stores the blocks of its own heads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import BindError, CalibrationError
from ..heads import Heads
from ..waterfilling import leading
from .axes import Axes, fine_rows, slice_of, widths
from .calibration import Calibration, GroupAxes

__all__ = ["HeldHere", "by_heads", "covariance", "held_by", "numbers_of"]


def covariance(block: GroupAxes) -> Tensor:
    """(N, N), float32, in units of sqrt(weight)."""
    axes, rank, n = block.axes.rows(), len(block.axes), len(block.energy)
    rest = float(block.energy[rank:].mean()) if rank < n else 0.0
    found = axes.T @ ((block.energy[:rank] - rest)[:, None] * axes)
    found.diagonal().add_(rest)
    return found


def numbers_of(block: GroupAxes, layer: int, keys: bool) -> Tensor:
    """Return the places of the keys or values of a layer among the numbers of a block: (H, D)."""
    heads, *sizes = block.shapes[layer]
    part = slice_of(block.shapes, layer, keys)
    return torch.arange(part.start, part.stop).view(heads, sizes[not keys])


def by_heads(calibration: Calibration, runs: int, whole: Collection[int] = ()) -> Calibration:
    """The same calibration with the kv heads of each group in `runs` blocks, each with axes of its own: as many as it
    kept, in as many bits. Keys and values that are apart stay apart. What is in that many blocks already, or in a
    multiple, stays as it is, and so do groups of `whole` layers.

    Raises:
        CalibrationError: heads do not divide, or are in other blocks already.
    """
    held = calibration.runs
    if held % runs == 0:
        return calibration
    if runs % held:
        raise CalibrationError(
            f"{calibration!r} has kv heads in {held} runs, and {runs} or a multiple are needed. Calibrate again."
        )
    parts = [[block] if set(block.layers) <= set(whole) else _runs(block, runs // held) for block in calibration.groups]
    cut = [n for n, each in enumerate(parts) if len(each) > 1]
    kept = sum(len(calibration.groups[n].axes) for n in cut)
    ranks = iter(leading([part.energy for n in cut for part in parts[n]], kept))
    for n in cut:
        parts[n] = [replace(part, axes=part.axes.cloned(next(ranks))) for part in parts[n]]
    return Calibration(tuple(part for each in parts for part in each), calibration.manifest)


def _runs(block: GroupAxes, runs: int) -> list[GroupAxes]:
    """A block in runs of kv heads, with all their axes."""
    if any(heads % runs for heads, *_ in block.shapes):
        raise CalibrationError(
            f"layers {block.layers} have {[heads for heads, *_ in block.shapes]} kv heads, which {runs} do not divide."
        )
    whole, made = covariance(block), []
    begin = [first for first, _ in block.heads] or [0] * len(block.layers)
    shapes = tuple((count // runs, keys, values) for count, keys, values in block.shapes)
    for run in range(runs):
        heads = [(count * run, count * (run + 1)) for count, *_ in shapes]
        parts = [
            numbers_of(block, layer, keys)[first:last].flatten()
            for layer, (first, last) in enumerate(heads)
            for keys in (True, False)
        ]
        mine = torch.cat(parts)
        energy, vectors = torch.linalg.eigh(whole[mine][:, mine])
        weight = block.weight[mine]
        fine = fine_rows(len(mine), bits=16 if len(block.axes.fine) == len(block.axes) else 8)
        axes = Axes.of(vectors.T.flip(0), weight.rsqrt(), widths(shapes), fine)
        energy = energy.flip(0).clamp_min(float(block.energy[-1]))
        where = tuple((at + first, at + last) for at, (first, last) in zip(begin, heads, strict=True))
        made.append(GroupAxes(block.layers, shapes, block.mean[mine], weight, axes, energy, where))
    return made


# ---- processes that hold some heads each


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HeldHere(Calibration):
    """The blocks of the kv heads of one process, as if these were all heads.

    Attributes:
        whole: the blocks of all processes.
        source: the calibration that `whole` was cut from. Who has this keeps that, so that others find it.
        place: the number of this process, and the number of all.
    """

    whole: Calibration
    source: Calibration
    place: tuple[int, int]

    def everywhere(self, layers: Sequence[int]) -> list[GroupAxes]:
        return self.whole.of(layers)

    def tensors(self, layers: Sequence[int]) -> list[Tensor]:
        """All that is held, that of the heads of other processes as well."""
        held = [*self.source.of(layers), *self.whole.of(layers)]
        return [x for block in held for x in block.tensors]

    @cached_property
    def fingerprint(self) -> str:
        rank, size = self.place
        return f"{self.whole.fingerprint} {rank}-of-{size}"


def held_by(calibration: Calibration, heads: Heads, groups: Sequence[Sequence[int]]) -> Calibration:
    """Return the calibration along which a process with these `heads` stores `groups` of layers: its blocks of a whole
    `calibration`, which is cut once for all stacks; or the calibration itself, if all heads are here.

    Raises:
        CalibrationError: as `by_heads`.
        BindError: a group has layers whose heads are split, and others.
    """
    if heads.size == 1 or all(heads.whole.issuperset(group) for group in groups):
        return calibration
    for group in groups:
        whole = sorted(heads.whole.intersection(group))
        if whole and len(whole) < len(group):
            raise BindError(
                f"layers {list(group)} would be stored together, and each process holds all kv heads of layers {whole} "
                "and some of the others. Use layers=1."
            )
    if heads not in calibration.cuts:
        calibration.cuts[heads] = _cut(calibration, heads)
    return calibration.cuts[heads]


def _cut(calibration: Calibration, heads: Heads) -> HeldHere:
    whole, own = by_heads(calibration, heads.size, heads.whole), list[GroupAxes]()
    for layers in dict.fromkeys(block.layers for block in whole.groups):
        blocks = whole.of(layers)
        each = max((run[0][1] for block in blocks if (run := block.heads)), default=0) // heads.size
        own += [block for block in blocks if not block.heads or block.heads[0][0] // each == heads.rank]
    place = (heads.rank, heads.size)
    return HeldHere(tuple(own), whole.manifest, whole=whole, source=calibration, place=place)
