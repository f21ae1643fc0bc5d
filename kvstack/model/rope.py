"""Rotary position embedding of one model, forwards and backwards.

Keys are cached after rotation. A transform that looks for structure across tokens wants them without it, and
`expected` attention wants to know how queries of the future will be rotated. Both use the model's own functions:
its rotary module for the tables and its modelling file's `apply_rotary_pos_emb` for the rotation, so partial,
scaled and interleaved variants come out as the model has them. Rotating by minus the angle undoes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Rope", "find_ropes"]


class Rope:
    """Rotates keys of one layer to given positions and back."""

    def __init__(self, rotary: nn.Module, apply: Any, layer_type: str | None, at_the_end: bool = False) -> None:
        self._rotary, self._apply, self._layer_type = rotary, apply, layer_type
        self._at_the_end = at_the_end
        self._whole: bool | None = None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def remember(self, positions: Tensor) -> None:
        """Compute the tables of `positions` (B or 1, 1, T) once, for all calls with this very tensor until `forget`."""
        if positions.shape[1] == 1 and (self._last is None or self._last[0] is not positions):
            self._last = None
            self._last = (positions, *self._tables_of(positions, torch.empty(0, device=positions.device)))

    def forget(self) -> None:
        self._last = None

    def _tables_of(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        last = self._last  # read once: a copy of the stack in another thread may forget it
        if last is not None and last[0] is positions:
            return last[1:]
        cos, sin = self.tables(positions[:, 0], like)
        return cos.float(), sin.float()

    def tables(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, rotated channels) for `positions` (B, T)."""
        extra = (self._layer_type,) if self._layer_type is not None else ()
        cos, sin = self._rotary(like, positions.long(), *extra)
        return cos, sin

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` (B, H, T, D) to `positions` (B or 1, H or 1, T)."""
        return self._turn(x, positions, backwards=False)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return self._turn(x, positions, backwards=True)

    def pull(self, gradient: Tensor, positions: Tensor) -> Tensor:
        """The gradient with regard to un-rotated keys, from that with regard to rotated ones: the transpose of
        `rotate`."""
        with torch.enable_grad():
            start = torch.zeros_like(gradient, requires_grad=True)
            pulled: Tensor = torch.autograd.grad(self.rotate(start, positions), start, gradient)[0]
        return pulled

    def _turn(self, x: Tensor, positions: Tensor, backwards: bool) -> Tensor:
        b, h, t, d = x.shape
        if positions.shape[1] > 1:  # every head has its own positions: heads become rows
            flat = positions.expand(b, h, t).reshape(b * h, t)
            return self._turn(x.reshape(b * h, 1, t, d), flat.unsqueeze(1), backwards).view(b, h, t, d)
        cos, sin = self._tables_of(positions, x.float())
        if backwards:
            # cos and sin carry the model's attention scaling a: undo a * rotation, not only the rotation
            square = (cos[..., :1] ** 2 + sin[..., :1] ** 2).clamp_min(1e-12)
            cos, sin = cos / square, -sin / square
        x32, rotated = x.float(), cos.shape[-1]
        if rotated < d and not self._takes_whole_heads(cos, sin):
            # the attention module rotates a part of each head, and its function is only ever given that part
            at = d - rotated if self._at_the_end else 0
            part = x32[..., at : at + rotated]
            x32 = x32.clone()
            x32[..., at : at + rotated] = self._apply(part[:, :1], part, cos, sin)[1]
            return x32.to(x.dtype)
        # it rotates queries and keys at once, and there are no queries: one head of them is the least to pass
        turned: Tensor = self._apply(x32[:, :1], x32, cos, sin)[1]
        return turned.to(x.dtype)

    def _takes_whole_heads(self, cos: Tensor, sin: Tensor) -> bool:
        """Whether the model's function leaves the channels behind the rotated ones alone, or cannot take them."""
        if self._whole is None:
            wide = cos.new_zeros(1, 1, 1, 2 * cos.shape[-1])
            try:
                self._whole = self._apply(wide, wide, cos[:1, :1], sin[:1, :1])[1].shape == wide.shape
            except RuntimeError:
                self._whole = False
        return self._whole


def find_ropes(
    model: PreTrainedModel, modules: Mapping[int, nn.Module], types: Sequence[str]
) -> dict[int, Rope | None]:
    """The rotary embedding of every layer; layers that rotate alike share one."""
    ropes: dict[int, Rope | None] = {}
    alike: dict[Any, Rope | None] = {}
    for layer, attention in modules.items():
        key = (type(attention), types[layer])
        if key not in alike:
            alike[key] = find_rope(model, attention, types[layer])
        ropes[layer] = alike[key]
    return ropes


def find_rope(model: PreTrainedModel, attention: nn.Module, layer_type: str) -> Rope | None:
    """The rotary embedding `attention` uses, or None where the model has none of the usual form."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None or "cos" not in inspect.signature(apply).parameters:
        return None
    for module in model.modules():
        rotary = getattr(module, "rotary_emb", None)
        if isinstance(rotary, nn.Module):
            takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
            # multi-head latent attention puts the rotated channels last, all others first
            return Rope(rotary, apply, layer_type if takes_type else None, hasattr(attention, "qk_rope_head_dim"))
    return None
