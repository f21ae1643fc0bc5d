"""One latent for all keys and values of a group of layers: the arithmetic, whatever the axes come from.

    x (T, N)   keys and values of a group, side by side:   [ K of layer 0 | V of layer 0 | K of layer 1 | ... ]
    D (R, N)   axes, a row each                             x ~ z D + mean
    w (N,)     how much an error in each number matters     z = argmin sum_n w_n (x - mean - z D)_n^2

Rows of D are orthonormal under w (D diag(w) D^T = 1), so the least squares are one product: z = (x - mean) diag(w) D^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..floats import fitting, saturated
from ..types import KV

__all__ = ["Basis", "flat"]


def flat(group: Sequence[KV]) -> Tensor:
    """Keys and values of a group of layers side by side, (B, T, N), float32."""
    parts = [x.transpose(1, 2).flatten(2).float() for kv in group for x in (kv.keys, kv.values)]
    return torch.cat([part.to(parts[0].device) for part in parts], dim=-1)


@dataclass(frozen=True, eq=False)
class Basis:
    """Axes of one group of layers, float32.

    Attributes:
        axes: (R, N), most important first.
        dtype: type that rebuilding is computed in.
        mean: (N,).
        weight: (N,), or None where every number counts the same.
        shapes: (H, D of keys, D of values) of every layer.
    """

    axes: Tensor
    mean: Tensor
    weight: Tensor | None
    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype = torch.float32

    @cached_property
    def back(self) -> Tensor:
        """The axes, (R, N), to rebuild with."""
        return fitting(self.axes, self.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.axes, self.mean, self.weight, self.back) if x is not None]

    def project(self, x: Tensor) -> Tensor:
        """Numbers (..., N) -> the latent (..., R) that leaves the least weighted error."""
        x = x - self.mean
        return (x if self.weight is None else x * self.weight) @ self.axes.T

    def keys(self, z: Tensor, layer: int) -> Tensor:
        """Latents (B, T, R) -> keys of the group's layer number `layer` (B, H, T, D)."""
        heads, width, _ = self.shapes[layer]
        return self._rebuilt(z, self._slice(layer, keys=True)).unflatten(-1, (heads, width)).transpose(1, 2)

    def values(self, z: Tensor, layer: int) -> Tensor:
        """Latents (B, T, R) -> values (B, H, T, D)."""
        heads, _, width = self.shapes[layer]
        return self._rebuilt(z, self._slice(layer, keys=False)).unflatten(-1, (heads, width)).transpose(1, 2)

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Weighed squared error (...) that latents (..., R) leave in numbers (..., N)."""
        square = (x - self.mean - z @ self.axes).square()
        return (square if self.weight is None else square * self.weight).sum(-1)

    def split(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) of one layer out of `flat` numbers (B, T, N)."""
        heads, *widths = self.shapes[layer]
        keys, values = (
            x[..., self._slice(layer, keys=i == 0)].unflatten(-1, (heads, width)).transpose(1, 2)
            for i, width in enumerate(widths)
        )
        return keys, values

    def cut(self, layer: int, keys: bool) -> tuple[Tensor, Tensor]:
        """Axes (1, R, H, D) and mean (H, D) of the keys or the values of one layer."""
        if (layer, keys) not in self._cuts:
            heads, *widths = self.shapes[layer]
            part, shape = self._slice(layer, keys), (heads, widths[not keys])
            axes, mean = self.axes[:, part].unflatten(1, shape).unsqueeze(0), self.mean[part].unflatten(0, shape)
            self._cuts[layer, keys] = axes, mean
        return self._cuts[layer, keys]

    @cached_property
    def _cuts(self) -> dict[tuple[int, bool], tuple[Tensor, Tensor]]:
        """Views that every step of decoding asks for."""
        return {}

    def weigh(self, weights: Tensor, z: Tensor, layer: int) -> Tensor:
        """`weights` (B, H, G, T) times the values, without rebuilding them: first over the tokens of the latents,
        then one small product per head (the paper's matrix fusion)."""
        heads, _, width = self.shapes[layer]
        part = self._slice(layer, keys=False)
        mixed = torch.einsum("bhgt,btr->bhgr", weights, z.to(weights.dtype))
        axes = self.back[:, part].unflatten(1, (heads, width)).to(weights.dtype)  # (R, H, D)
        mean = self.mean[part].view(heads, 1, width).to(weights.dtype)
        return torch.einsum("bhgr,rhd->bhgd", mixed, axes) + weights.sum(-1, keepdim=True) * mean

    def _rebuilt(self, z: Tensor, part: slice) -> Tensor:
        half = self.dtype == torch.float16
        # what does not fit into halves is not in halves
        dtype = torch.promote_types(z.dtype, self.back.dtype) if half else self.dtype
        x = z.flatten(0, 1).to(dtype) @ self.back[:, part].to(dtype) + self.mean[part].to(dtype)
        return (saturated(x, dtype) if half else x).unflatten(0, z.shape[:2])

    def _slice(self, layer: int, keys: bool) -> slice:
        sizes = [heads * width for heads, *widths in self.shapes for width in widths]
        at = 2 * layer + (not keys)
        start = sum(sizes[:at])
        return slice(start, start + sizes[at])
