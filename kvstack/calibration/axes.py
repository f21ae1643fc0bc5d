"""One latent for all keys and values of a group of layers: the arithmetic, whatever the axes come from.

    x (T, N)   keys and values of a group, side by side:   [ K of layer 0 | V of layer 0 | K of layer 1 | ... ]
    D (R, N)   axes, a row each                             x ~ z D + mean
    w (N,)     how much an error in each number matters     z = argmin sum_n w_n (x - mean - z D)_n^2

Rows of D are orthonormal under w (D diag(w) D^T = 1), so the least squares are one product: z = (x - mean) diag(w) D^T.

Axes are the largest thing that is fitted to a model, so they are held as whole numbers and are numbers again only where
a product needs them:

    codes (R, N), fine (K, N)   8 bits each     row r, head h:   (codes + fine / 256) * scale[r, h] / sqrt(w)

The K leading axes, along which numbers are largest, have a fine part: 16 bits in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

from ..abilities import FINE, PackedAxes, with_fine
from ..floats import fitting, saturated
from ..types import KV

__all__ = ["ROWS", "Axes", "Basis", "Shapes", "by_basis", "fine_rows", "flat", "slice_of", "split", "widths"]

Shapes = tuple[tuple[int, int, int], ...]
"""(H, D of keys, D of values) of each layer of a group."""
MOST = 127
"""The largest code."""
LEADING = 32
"""One in so many of a block's axes has a fine part, where axes are kept in 8 bits."""
ROWS = 1024
"""Rows that are worked on at once, where all of them would take several times the memory of the codes."""


def widths(shapes: Shapes) -> tuple[int, ...]:
    """Numbers of the heads of a group, in their order: keys of the first layer, its values, keys of the second, ..."""
    return tuple(width for heads, *sizes in shapes for width in sizes for _ in range(heads if width else 0))


def flat(group: Sequence[KV]) -> Tensor:
    """Keys and values of a group of layers side by side, (B, T, N), float32."""
    parts = [x.transpose(1, 2).flatten(2).float() for kv in group for x in (kv.keys, kv.values)]
    return torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


def fine_rows(numbers: int, bits: int) -> int:
    """Return the number of axes with a fine part in a block of so many numbers, if axes are kept in 8 or 16 bits."""
    return numbers if bits == 16 else max(1, numbers // LEADING)


def slice_of(shapes: Shapes, layer: int, keys: bool) -> slice:
    """Return the place of the keys or the values of a layer in `flat` numbers."""
    sizes = [heads * width for heads, *each in shapes for width in each]
    at = 2 * layer + (not keys)
    start = sum(sizes[:at])
    return slice(start, start + sizes[at])


def split(x: Tensor, shapes: Shapes, layer: int) -> KV:
    """Keys and values (B, H, T, D) of one layer out of `flat` numbers (B, T, N)."""
    heads, *sizes = shapes[layer]
    keys, values = (
        x[..., slice_of(shapes, layer, i == 0)].unflatten(-1, (heads, width)).transpose(1, 2)
        for i, width in enumerate(sizes)
    )
    return KV(keys, values)


def by_basis(group: Sequence[KV], bases: Sequence[Basis]) -> Sequence[Sequence[KV]]:
    """The kv heads of each of some bases, whose heads side by side are those of the group."""
    if len(bases) == 1:
        return [group]
    runs = []
    for layer, kv in enumerate(group):
        heads = [basis.shapes[layer][0] for basis in bases]
        runs.append([KV(*part) for part in zip(kv.keys.split(heads, 1), kv.values.split(heads, 1), strict=True)])
    return list(zip(*runs, strict=True))


@dataclass(frozen=True, eq=False)
class Axes:
    """Axes as they are held.

    Attributes:
        codes: (R, N) int8.
        fine: (K, N) int8, 256ths of a code, of the leading axes.
        scale: (R, heads of all layers, first those of keys, then those of values) float32.
        unit: (N,) float32, what every number of an axis is multiplied with: 1 / sqrt(weight).
        widths: of the heads, see `widths`.
    """

    codes: Tensor
    fine: Tensor
    scale: Tensor
    unit: Tensor
    widths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor, unit: Tensor, widths: tuple[int, ...], fine: int) -> Axes:
        """Axes `rows` (R, N) times `unit` (N,) in codes, the first `fine` of them with a fine part."""
        codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        parts, scales = codes.new_empty(min(fine, len(rows)), rows.shape[1]), []
        split = (x.split(widths, dim=1) for x in (rows, codes, parts))
        for heads, into, into_fine in zip(*split, strict=True):
            largest = heads.float().abs().amax(1, keepdim=True)
            scale = (largest / MOST).clamp_min(torch.finfo(torch.float32).tiny)
            exact = heads.float() / scale
            into.copy_(exact.round())
            rest = (exact[:fine] - exact[:fine].round()) * FINE
            into_fine.copy_(rest.round_().clamp_(-MOST, MOST))
            scales.append(scale)
        return cls(codes, parts, torch.cat(scales, dim=1), unit, widths)

    @classmethod
    def joined(cls, parts: Sequence[Axes]) -> Axes:
        """One after the other, axes with the same unit; only those of the first parts have fine ones."""
        first = parts[0]
        codes, fine, scale = (torch.cat([getattr(x, name) for x in parts]) for name in ("codes", "fine", "scale"))
        return cls(codes, fine, scale, first.unit, first.widths)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.codes, self.fine, self.scale, self.unit]

    def __len__(self) -> int:
        return len(self.codes)

    def leading(self, rank: int) -> Axes:
        """The first `rank` axes, in the same memory."""
        return Axes(self.codes[:rank], self.fine[:rank], self.scale[:rank], self.unit, self.widths)

    def cloned(self, rank: int) -> Axes:
        """The first `rank` axes, in memory of their own."""
        codes, fine, scale = (x[:rank].clone() for x in (self.codes, self.fine, self.scale))
        return Axes(codes, fine, scale, self.unit, self.widths)

    def to(self, device: torch.device) -> Axes:
        codes, fine, scale, unit = (x.to(device) for x in self.tensors)
        return Axes(codes, fine, scale, unit, self.widths)

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """Axes from number `first` to before `last` (R, N), without their unit, float32."""
        rows, scale = with_fine(self.codes[first:last], self.fine[first:last]), self.scale[first:last]
        at = head = 0
        for width, same in groupby(self.widths):  # as few operations as there are runs of heads of one size
            count = len(list(same))
            part = rows[:, at : at + count * width].unflatten(1, (count, width))
            part.mul_(scale[:, head : head + count, None])
            at, head = at + count * width, head + count
        return rows

    def full(self) -> Tensor:
        """All numbers (R, N), float32."""
        return self.rows() * self.unit

    def cut(self, part: slice, width: int) -> PackedAxes:
        """The numbers in `part`, which are heads of `width`."""
        shape = ((part.stop - part.start) // width, width)
        before = list(accumulate(self.widths, initial=0)).index(part.start)
        codes, fine = (x[:, part].unflatten(1, shape) for x in (self.codes, self.fine))
        return PackedAxes(codes, fine, self.scale[:, before : before + shape[0]], self.unit[part].unflatten(0, shape))


@dataclass(frozen=True, eq=False)
class Basis:
    """Axes of one group of layers.

    Attributes:
        axes: (R, N), most important first; in codes, or float32.
        dtype: type that rebuilding is computed in.
        mean: (N,).
        weight: (N,), or None where every number counts the same.
        shapes: (H, D of keys, D of values) of every layer.
    """

    axes: Tensor | Axes
    mean: Tensor
    weight: Tensor | None
    shapes: Shapes
    dtype: torch.dtype = torch.float32

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def full(self) -> Tensor:
        """The axes (R, N), float32."""
        return self.axes.full() if isinstance(self.axes, Axes) else self.axes

    @property
    def tensors(self) -> list[Tensor]:
        axes = self.axes.tensors if isinstance(self.axes, Axes) else [self.axes]
        return [*axes, *(x for x in (self.mean, self.weight) if x is not None)]

    def project(self, x: Tensor) -> Tensor:
        """Numbers (..., N) -> the latent (..., R) that leaves the least weighted error."""
        x = x - self.mean
        if self.weight is not None:
            x = x * self.weight
        if not isinstance(self.axes, Axes):
            return x @ self.axes.T
        # a part of the axes after the other: as numbers they take four times the memory of codes
        x, some = x * self.axes.unit, range(0, self.rank, ROWS)
        return torch.cat([x @ self.axes.rows(first, first + ROWS).T for first in some], dim=-1)

    def keys(self, z: Tensor, layer: int) -> Tensor:
        """Latents (B, T, R) -> keys of the group's layer number `layer` (B, H, T, D)."""
        heads, width, _ = self.shapes[layer]
        return self._rebuilt(z, layer, keys=True).unflatten(-1, (heads, width)).transpose(1, 2)

    def values(self, z: Tensor, layer: int) -> Tensor:
        """Latents (B, T, R) -> values (B, H, T, D)."""
        heads, _, width = self.shapes[layer]
        return self._rebuilt(z, layer, keys=False).unflatten(-1, (heads, width)).transpose(1, 2)

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Weighed squared error (...) that latents (..., R) leave in numbers (..., N)."""
        square = (x - self.mean - z @ self.full).square()
        return (square if self.weight is None else square * self.weight).sum(-1)

    def cut(self, layer: int, keys: bool) -> tuple[Tensor | PackedAxes, Tensor]:
        """Axes (1, R, H, D) and mean (H, D) of the keys or the values of one layer."""
        if (layer, keys) not in self._cuts:
            heads, *widths = self.shapes[layer]
            part, shape = self._slice(layer, keys), (heads, widths[not keys])
            axes: Tensor | PackedAxes
            if isinstance(self.axes, Axes):
                axes = self.axes.cut(part, shape[1])
            else:
                axes = self.axes[:, part].unflatten(1, shape).unsqueeze(0)
            self._cuts[layer, keys] = axes, self.mean[part].unflatten(0, shape)
        return self._cuts[layer, keys]

    @cached_property
    def _cuts(self) -> dict[tuple[int, bool], tuple[Tensor | PackedAxes, Tensor]]:
        """Views that every step of decoding asks for."""
        return {}

    def weigh(self, weights: Tensor, z: Tensor, layer: int) -> Tensor:
        """`weights` (B, H, G, T) times the values, without rebuilding them: first over the tokens of the latents,
        then one small product per head (the paper's matrix fusion)."""
        heads, _, width = self.shapes[layer]
        mixed = torch.einsum("bhgt,btr->bhgr", weights, z.to(weights.dtype))
        axes = self._numbers(layer, keys=False).unflatten(1, (heads, width)).to(weights.dtype)  # (R, H, D)
        mean = self.mean[self._slice(layer, keys=False)].view(heads, 1, width).to(weights.dtype)
        return torch.einsum("bhgr,rhd->bhgd", mixed, axes) + weights.sum(-1, keepdim=True) * mean

    def _rebuilt(self, z: Tensor, layer: int, keys: bool) -> Tensor:
        half = self.dtype == torch.float16
        axes = self._numbers(layer, keys)
        # what does not fit into halves is not in halves
        dtype = torch.promote_types(z.dtype, axes.dtype) if half else self.dtype
        x = z.flatten(0, 1).to(dtype) @ axes.to(dtype) + self.mean[self._slice(layer, keys)].to(dtype)
        return (saturated(x, dtype) if half else x).unflatten(0, z.shape[:2])

    def _numbers(self, layer: int, keys: bool) -> Tensor:
        """The axes (R, H * D) of the keys or the values of one layer, to rebuild with."""
        axes, _ = self.cut(layer, keys)
        numbers = axes.full() if isinstance(axes, PackedAxes) else axes
        return numbers[0].flatten(1).to(self._held)

    @cached_property
    def _held(self) -> torch.dtype:
        """The type that axes are rebuilt with: not halves, where some number is too large for them."""
        return fitting(self.full, self.dtype).dtype if self.dtype == torch.float16 else self.dtype

    def _slice(self, layer: int, keys: bool) -> slice:
        return slice_of(self.shapes, layer, keys)
