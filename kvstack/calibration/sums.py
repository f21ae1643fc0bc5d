"""Sums over windows of text, and the axes that come of them: one block of numbers at a time.

    numbers (T, N) of a block   ->  mean, covariance C (N, N), gradients' mean square w (N,)
    eigenvectors of  sqrt(w) C sqrt(w)  are its axes, eigenvalues their energy

A block takes four bytes for each of its N * N sums, whatever the length of the text; finding its axes takes five times
that for a moment. Of the axes that were found, one or two bytes a number are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.probing import SINKS
from ..model.rope import Rope
from ..types import KV
from ..waterfilling import leading
from .axes import ROWS, Axes, Shapes, fine_rows, flat, widths
from .calibration import GroupAxes, Heads

__all__ = ["Found", "OneKind", "Sums", "leading_axes"]

RIDGE = 1e-3
"""Least weight of a number, as a share of the mean weight of its layer's keys or values."""
TINY = 1e-12
"""Least weight: a layer that the model does not look at still has axes."""
LEAST = 1e-8
"""Least energy, where 1 is the mean: what never varied in the text read may vary in others."""


@dataclass(frozen=True, eq=False)
class Found:
    """All axes of one block, before it is known which of them are kept.

    Attributes:
        power: the sum of all energies, in the unit of the gradients.
        factor: weights and energies were multiplied with it, so that they are numbers of ordinary size.
    """

    layers: tuple[int, ...]
    shapes: Shapes
    heads: Heads
    mean: Tensor
    weight: Tensor
    axes: Axes
    energy: Tensor
    power: float
    factor: float


class Sums:
    """The sums of one block: some kv heads, or all, of a group of layers.

    Args:
        layers: the group.
        ropes: the rotation of each layer's keys; not used if they come un-rotated.
        heads: of each layer, the first kv head of the block and the one behind its last; empty: all.
    """

    def __init__(self, layers: Sequence[int], ropes: Mapping[int, Rope | None], heads: Heads = ()) -> None:
        self.layers, self.ropes, self.heads = layers, ropes, heads
        self.gradient: Tensor | float = 0.0
        self.count = 0
        self.origin: Tensor | None = None  # numbers are taken from here, or a large mean would eat their digits
        self.shapes: Shapes = ()

    def add(self, cache: Mapping[int, KV], gradients: Mapping[int, KV]) -> None:
        x = self.flat(cache, lambda rope, x, positions: rope.unrotate(x, positions))
        g = self.flat(gradients, lambda rope, x, positions: rope.pull(x, positions))
        self._add([self._mine(slot, cache[i]) for slot, i in enumerate(self.layers)], x)
        self.gradient = self.gradient + g.square().sum(0)

    def _mine(self, slot: int, kv: KV) -> KV:
        """The heads of the block."""
        if not self.heads:
            return kv
        mine = slice(*self.heads[slot])
        return KV(kv.keys[:, mine], kv.values[:, mine])

    def _add(self, kvs: Sequence[KV], x: Tensor) -> None:
        if self.origin is None:
            self.shapes = tuple((kv.keys.shape[1], kv.keys.shape[3], kv.values.shape[3]) for kv in kvs)
            n = x.shape[1]
            self.origin, self.total = x.mean(0), x.new_zeros(n)
            self.square = x.new_zeros(n, n)
        x = x - self.origin
        self.count += x.shape[0]
        self.total += x.sum(0)
        self.square.addmm_(x.T, x)

    def flat(self, kvs: Mapping[int, KV], turn: Callable[[Rope, Tensor, Tensor], Tensor]) -> Tensor:
        """(T, N) without the sinks."""
        unrotated = []
        for slot, i in enumerate(self.layers):
            kv, rope = self._mine(slot, kvs[i]), self.ropes[i]
            if rope is not None:
                positions = rope.marked(torch.arange(kv.tokens, device=kv.keys.device)[None, None])
                kv = KV(turn(rope, kv.keys, positions), kv.values)
            unrotated.append(kv)
        return flat(unrotated)[0, SINKS:]

    def weight(self) -> Tensor:
        """(N,) mean square of the gradient, never far below the mean of the same layer's keys or values."""
        assert isinstance(self.gradient, Tensor)
        parts = (self.gradient / self.count).split([h * width for h, *sizes in self.shapes for width in sizes])
        return torch.cat([part + RIDGE * part.mean() for part in parts])

    def found(self, bits: int) -> Found:
        """All axes, in codes of `bits` bits. The sums are given up for them."""
        assert self.origin is not None
        weight, square, mean = self.weight(), self.square, self.total / self.count
        del self.square
        power = float((weight * (square.diagonal() / self.count)).sum())
        factor = len(weight) / power if power > 0 else 1.0
        weight = weight * factor + TINY
        root = weight.sqrt()
        # sqrt(w) (sums / count - mean mean^T) sqrt(w), in the memory of the sums
        square.div_(self.count).addr_(mean, mean, alpha=-1).mul_(root[:, None]).mul_(root)
        energy, vectors = torch.linalg.eigh(square)
        del square
        sizes, unit, n = widths(self.shapes), 1 / root, len(energy)
        fine = fine_rows(n, bits)
        parts = [
            Axes.of(vectors[:, max(0, end - ROWS) : end].T.flip(0), unit, sizes, max(0, fine - n + end))
            for end in range(n, 0, -ROWS)
        ]
        axes = Axes.joined(parts).to(torch.device("cpu"))
        mean, weight, energy = (x.cpu() for x in (self.origin + mean, weight, energy.flip(0)))
        return Found(tuple(self.layers), self.shapes, self.heads, mean, weight, axes, energy, power, factor)


class OneKind(Sums):
    """The keys alone or the values alone of a group of layers, all numbers of one weight."""

    def __init__(self, layers: Sequence[int], kind: str) -> None:
        super().__init__(layers, {})
        self.kind = kind

    def add(self, cache: Mapping[int, KV], gradients: Mapping[int, KV]) -> None:
        kvs = [cache[i].only(self.kind) for i in self.layers]  # un-rotated and without sinks already
        self._add(kvs, flat(kvs)[0])

    def weight(self) -> Tensor:
        return torch.ones_like(self.total)


def leading_axes(found: Sequence[Found], share: float) -> list[GroupAxes]:
    """Of all axes of all blocks, the `share` that have the most energy; at least one of each block. Their energies
    are in one unit, where the mean is 1."""
    count = sum(len(each.energy) for each in found)
    unit = count / sum(each.power for each in found)
    # a block whose power is 0 keeps its least weights
    ratios = [unit / each.factor if each.power > 0 else 1.0 for each in found]
    energies = [(each.energy * ratio).clamp_min(LEAST) for each, ratio in zip(found, ratios, strict=True)]
    ranks = leading(energies, int(share * count))
    made = []
    for each, ratio, energy, rank in zip(found, ratios, energies, ranks, strict=True):
        weight = each.weight * ratio
        axes = replace(each.axes, unit=weight.rsqrt()).cloned(rank)
        made.append(GroupAxes(each.layers, each.shapes, each.mean, weight, axes, energy, each.heads))
    return made
