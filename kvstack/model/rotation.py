"""The rotation of one layer's keys, forwards and backwards.

Keys are cached after rotation. A transform that looks for structure across tokens wants them without it, and
`expected` attention wants to know how queries of the future will be rotated. Both use the model's own functions:
its rotary module for the tables and its modelling file's function for the rotation, so partial, scaled, interleaved and
complex variants come out as the model has them. Rotating by minus the angle undoes it.

Positions are what the rotary module was given: the indices of tokens (B or 1, H or 1, T) where these are the positions,
otherwise (B, axes, H or 1, T), with several axes for images and video.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UseError
from ..floats import wide
from ..turns import Pairs, Turns, find_pairs
from ..types import LONG

__all__ = ["Form", "Move", "Rope", "RotaryCall", "Tables"]

Tables = tuple[Tensor, ...]
"""cos and sin (B, T, rotated channels), or one complex tensor."""


@dataclass(frozen=True)
class RotaryCall:
    """The way a model calls one of its rotary modules.

    Attributes:
        module: the rotary module.
        extra: its arguments besides hidden states and positions, such as the layer type.
        axes: dimensions of a position; 0 where positions are (B, T) instead of (axes, B, T).
        dtype: of the tables.
    """

    module: nn.Module
    extra: Mapping[str, Any]
    axes: int
    dtype: torch.dtype

    def tables(self, module: nn.Module, positions: Tensor) -> Tables:
        """Return the tables that the rotary `module`, this one or a copy, makes of `positions` (B, axes, T), without
        any update of its frequencies."""
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        positions = positions.long()
        if self.axes:
            positions = positions.expand(-1, self.axes, -1).permute(1, 0, 2)
        elif positions.shape[1] == 1:
            positions = positions[:, 0]
        else:  # given with several dimensions to a module that usually has one
            positions = positions.permute(1, 0, 2)
        # below the decorators: one updates the frequencies, in place and for all
        made = inspect.unwrap(type(module).forward)(module, like, position_ids=positions, **self.extra)
        return (made,) if isinstance(made, Tensor) else tuple(made)


@dataclass(frozen=True)
class Form:
    """The function that rotates, and the channels it is given.

    Attributes:
        apply: the modelling file's function.
        takes: `pair` (queries, keys, cos, sin), `single` (keys, cos, sin) or `complex` (queries, keys, tables), whose
            heads come after the tokens.
        part: the channels of a head it is given: the `whole` head, or the `first` or `last` ones.
    """

    apply: Callable[..., Any]
    takes: Literal["pair", "single", "complex"]
    part: Literal["whole", "first", "last"]

    def turn(self, x: Tensor, tables: Tables) -> Tensor:
        """`x` (B, H, T, D), rotated by `tables`."""
        width = tables[0].shape[-1] * (2 if self.takes == "complex" else 1)
        if self.part == "whole" or width == x.shape[-1]:
            return self._turn(x, tables)
        at = x.shape[-1] - width if self.part == "last" else 0
        before, mine, after = x.tensor_split([at, at + width], dim=-1)
        turned = self._turn(mine, tables)
        return torch.cat([before.expand(*turned.shape[:3], -1), turned, after.expand(*turned.shape[:3], -1)], dim=-1)

    def _turn(self, x: Tensor, tables: Tables) -> Tensor:
        turned: Tensor
        if self.takes == "single":
            turned = self.apply(x, *tables)
        elif self.takes == "pair":  # there are no queries: one head of keys is the least to pass
            turned = self.apply(x[:, :1], x, *tables)[1]
        else:
            x = x.transpose(1, 2)
            turned = self.apply(x[:, :, :1], x, *tables)[1].transpose(1, 2)
        return turned


@dataclass(frozen=True, eq=False)
class Move:
    """Rotates keys from the positions that they have to others, in one rotation.

    Attributes:
        form: how the model rotates.
        tables: (B or 1, H or 1, T, rotated channels) each.
    """

    form: Form
    tables: Tables

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (B, H, T, D), rotated."""
        b, h, t, d = x.shape
        if self.tables[0].shape[1] == 1:
            return self.form.turn(wide(x), tuple(table[:, 0] for table in self.tables)).to(x.dtype)
        tables = tuple(table.expand(b, h, t, -1).flatten(0, 1) for table in self.tables)  # heads become rows
        return self.form.turn(wide(x.reshape(b * h, 1, t, d)), tables).to(x.dtype).view(b, h, t, d)


@dataclass(eq=False)
class _Known:
    """Results that were computed for some positions."""

    positions: Tensor
    tables: Tables
    turns: Turns | None = None

    def knows(self, positions: Tensor) -> bool:
        """Return True if they are these: groups of layers may hold tensors of their own, of the same numbers. A GPU is
        not asked, since Python would wait for it."""
        if not (self.positions.device.type == positions.device.type == "cpu"):
            return False
        return torch.equal(self.positions, positions)


class Rope:
    """Rotates keys of one layer to given positions and back.

    Args:
        call: how the model makes the tables; None where that is not known.
        form: how it rotates by them.
        switch: the number of positions from which on a forward uses tables for long texts (longrope); None: never.
        refusal: why keys cannot be un-rotated; empty: they can.
    """

    def __init__(
        self, call: RotaryCall | None, form: Form | None, switch: int | None = None, refusal: str = ""
    ) -> None:
        self.call, self.form, self.switch, self.refusal = call, form, switch, refusal
        self._short = self._long = call.module if call else None
        if call is not None and switch is not None:
            self._short, self._long = (_frozen(call, at) for at in (0, switch))
        self._last: _Known | None = None
        self._pairs: dict[tuple[int, torch.device], Pairs | None] = {}
        self._reads: dict[tuple[int, torch.device], Tensor | None] = {}

    # ---- tables

    def remember(self, positions: Tensor) -> None:
        """Compute the tables of `positions` once, for all calls with the same ones until `forget`."""
        last = self._last
        if positions.shape[-2] > 1 or (last is not None and last.positions is positions):
            return
        if last is not None and last.knows(positions):
            self._last = replace(last, positions=positions)
            return
        self._last = None
        self._last = _Known(positions, _wide(self.tables(_by_axis(positions)[:, :, 0])))

    def forget(self) -> None:
        self._last = None

    def tables(self, positions: Tensor) -> Tables:
        """The tables of `positions` (B, axes, T), as a forward that was given them computes them."""
        if self.refusal or self.call is None or self._short is None or self._long is None:
            raise UseError(f"keys cannot be rotated: {self.refusal or 'they have no rotary embedding'}.")
        marked = positions >= LONG
        positions = torch.where(marked, positions - LONG, positions)
        if self.switch is None:
            return self.call.tables(self._short, positions)
        long = marked.any(1) | (positions.amax(1) >= self.switch)  # (B, T)
        both = (self.call.tables(module, positions) for module in (self._short, self._long))
        return tuple(torch.where(long[..., None], far, near) for near, far in zip(*both, strict=True))

    def made(self, tables: Tables, positions: Tensor) -> bool:
        """Return True if a forward that was given `positions` (B, axes, T) computes these tables, up to rounding."""
        mine = self.tables(self.marked(positions))
        if len(mine) != len(tables) or any(x.shape[1:] != y.shape[1:] for x, y in zip(mine, tables, strict=True)):
            return False
        loose = max(1e-3, 4 * torch.finfo(mine[0].dtype).eps)
        pairs = zip(mine, tables, strict=True)
        return all(torch.allclose(x, y.to(x.device, x.dtype), atol=loose, rtol=loose) for x, y in pairs)

    def marked(self, positions: Tensor) -> Tensor:
        """`positions` (B, axes, T) of one forward, for the record: those that it rotated by tables for longer texts
        than their own number asks for are marked."""
        if self.switch is None or not positions.numel():
            return positions
        early = (positions.amax(1, keepdim=True) < self.switch) & (positions.max() >= self.switch)
        return positions + early * LONG

    # ---- rotating

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` (B, H, T, D) to `positions`; one row of `x` becomes as many as `positions` has."""
        return self._turn(x, positions, backwards=False)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return self._turn(x, positions, backwards=True)

    def move(self, was: Tensor, now: Tensor) -> Move:
        """Return what rotates keys at the positions `was` to the positions `now`: `unrotate` and `rotate` at once."""
        here, there = _inverse(self._tables_by_head(was)), self._tables_by_head(now)
        assert self.form is not None  # `tables` has refused
        if len(here) == 1:
            return Move(self.form, (there[0] * here[0],))
        (cos, sin), (more_cos, more_sin) = here, there
        return Move(self.form, (more_cos * cos - more_sin * sin, more_sin * cos + more_cos * sin))

    def _tables_by_head(self, positions: Tensor) -> Tables:
        """(B or 1, H or 1, T, rotated channels) each."""
        places = _by_axis(positions).transpose(1, 2)  # (B or 1, H or 1, axes, T)
        made = _wide(self.tables(places.flatten(0, 1)))
        return tuple(table.unflatten(0, places.shape[:2]) for table in made)

    def turns(self, positions: Tensor, width: int) -> Turns | None:
        """Return the turns of heads of `width` channels at positions that are the same for all heads, computed once
        like the tables; None where the rotation is not one of pairs."""
        self.remember(positions)
        last = self._last  # read once: a copy of the stack in another thread may forget it
        known = None if last is None else last.turns
        if known is None:
            known = self._turns(positions, width)
            if last is not None:
                last.turns = known
        return known

    def _turns(self, positions: Tensor, width: int) -> Turns | None:
        pairs = self._pairs_of(width, positions)
        if pairs is None:
            return None
        key = width, positions.device
        if key not in self._reads:
            self._reads[key] = self._columns(positions, pairs, width)
        columns = self._reads[key]
        if columns is None:
            return Turns(pairs, *self._angles_by_rotating(positions, pairs, width))
        return Turns(pairs, *_angles_of(self._tables_of(positions), columns))

    def _columns(self, like: Tensor, pairs: Pairs, width: int) -> Tensor | None:
        """Return the places in the tables that hold the angle of each pair, as most models have it: a number for each
        channel that turns, in order. None where that is not what keys are turned by. It does not change from one
        forward to the next, so it is looked at once, at positions that differ from axis to axis."""
        assert self.form is not None
        axes = like.shape[1] if like.dim() == 4 else 1
        near = torch.arange(axes, device=like.device) * 101 + 3
        positions = torch.stack([near, 7 * near + 1009], dim=1).to(like.dtype)[None, :, None]
        positions = positions if like.dim() == 4 else positions[:, 0]
        tables = self._tables_of(positions)
        if len(tables) != 2 or tables[0].shape != tables[1].shape or not pairs.counts[0]:
            return None
        columns = pairs.first - (width - tables[0].shape[-1] if self.form.part == "last" else 0)
        if int(columns.max()) >= tables[0].shape[-1]:
            return None
        read, turned = _angles_of(tables, columns), self._angles_by_rotating(positions, pairs, width)
        same = all(x.shape == y.shape and torch.allclose(x, y, atol=1e-6) for x, y in zip(read, turned, strict=True))
        return columns if same else None

    def _angles_by_rotating(self, positions: Tensor, pairs: Pairs, width: int) -> tuple[Tensor, Tensor]:
        probe = torch.zeros(1, 1, positions.shape[-1], width, device=positions.device)
        probe[..., pairs.first] = 1.0  # becomes the cosine there, and the sine at the second of a pair
        turned = self.rotate(probe.expand(positions.shape[0], -1, -1, -1), positions)[:, 0].mT  # (B or 1, D, T)
        return turned[:, pairs.first].contiguous(), turned[:, pairs.second].contiguous()

    def _pairs_of(self, width: int, like: Tensor) -> Pairs | None:
        key = width, like.device
        if key not in self._pairs:
            axes = like.shape[1] if like.dim() == 4 else None

            def rotate(x: Tensor, position: int) -> Tensor:
                shape = (1, 1, 1) if axes is None else (1, axes, 1, 1)
                at = torch.full(shape, position, dtype=like.dtype, device=like.device)
                return self._turn(x[None, :, None], at, backwards=False)[0, :, 0]

            self._pairs[key] = find_pairs(rotate, width, like.device)
        return self._pairs[key]

    def _tables_of(self, positions: Tensor) -> Tables:
        """Of the same positions for all heads."""
        last = self._last  # read once: a copy of the stack in another thread may forget it
        if last is not None and last.positions is positions:
            return last.tables
        return _wide(self.tables(_by_axis(positions)[:, :, 0]))

    def pull(self, gradient: Tensor, positions: Tensor) -> Tensor:
        """The gradient with regard to un-rotated keys, from that with regard to rotated ones: the transpose of
        `rotate`."""
        with torch.enable_grad():
            start = torch.zeros_like(gradient, requires_grad=True)
            pulled: Tensor = torch.autograd.grad(self.rotate(start, positions), start, gradient)[0]
        return pulled

    def _turn(self, x: Tensor, positions: Tensor, backwards: bool) -> Tensor:
        b, h, t, d = x.shape
        if positions.shape[-2] > 1:  # every head has its own positions: heads become rows
            places = _by_axis(positions)
            rows, axes = max(b, places.shape[0]), places.shape[1]
            flat = places.expand(rows, axes, h, t).transpose(1, 2).reshape(rows * h, axes, 1, t)
            x = x.expand(rows, h, t, d).reshape(rows * h, 1, t, d)
            return self._turn(x, flat, backwards).view(rows, h, t, d)
        tables = self._tables_of(positions)
        if backwards:
            tables = _inverse(tables)
        assert self.form is not None  # `tables` has refused
        return self.form.turn(wide(x), tables).to(x.dtype)


def _by_axis(positions: Tensor) -> Tensor:
    """(B or 1, axes, H or 1, T)."""
    return positions.unsqueeze(1) if positions.dim() == 3 else positions


def _angles_of(tables: Tables, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, P, T) in these columns of tables."""
    cos, sin = (x[..., columns].mT.contiguous() for x in tables)
    return cos, sin


def _wide(tables: Tables) -> Tables:
    return tuple(x if x.is_complex() else x.float() for x in tables)


def _inverse(tables: Tables) -> Tables:
    """Tables that undo `tables`. They carry the model's attention scaling and the rounding of its type: the inverse
    of the scaled rotation, not only of the rotation."""
    if len(tables) == 1:
        return (tables[0].conj() / tables[0].abs().square().clamp_min(1e-12),)
    cos, sin = tables
    square = (cos.square() + sin.square()).clamp_min(1e-12)
    return cos / square, -sin / square


def _frozen(call: RotaryCall, position: int) -> nn.Module:
    """A copy of the rotary module as it is after a forward that reached `position`."""
    twin = copy.deepcopy(call.module)
    device = next((x.device for x in twin.buffers()), torch.device("cpu"))
    positions = torch.full((call.axes, 1, 1) if call.axes else (1, 1), position, device=device)
    type(twin).forward(twin, torch.empty(0, dtype=call.dtype, device=device), position_ids=positions, **call.extra)
    return twin
