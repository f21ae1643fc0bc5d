"""Checks of what a file says, before anything is done with it.

A checksum tells that a file is as it was written, not that its parts fit together, nor that they fit the stack it is
loaded into. So whoever holds something checks its own part when it is restored (`Track.restore`), with what is here:
which entries there are, of which types, and how large every tensor must be. What is expected comes from the bound stack
and from the model, never from the file. All of these raise `UseError`
with the problem, and who opened the file adds its name and the fix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import UseError
from .types import Layout

__all__ = [
    "FLOATS",
    "Get",
    "Misfit",
    "Tensors",
    "check_numbers",
    "check_places",
    "count",
    "entries",
    "items",
    "misfit",
    "pairs",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 1e15
"""No key, value or scale of a model comes near this, and products of two such numbers fit into float32."""


class Misfit(UseError):
    """Something that a file says cannot be. Who opened the file catches it, and adds the file's name and the fix."""


def misfit(problem: str) -> Misfit:
    """The error for something that a file says and that cannot be."""
    return Misfit(problem)


def entries(x: object, what: str, needed: Iterable[str], known: Iterable[str] = ()) -> dict[str, Any]:
    """`x`, a mapping that has all of the `needed` keys, and no others than these and the `known` ones."""
    if not isinstance(x, dict):
        raise misfit(f"{what} is not a dict.")
    needed = list(needed)
    if lost := [key for key in needed if key not in x]:
        raise misfit(f"{what} lacks {lost}.")
    if more := [key for key in x if key not in needed and key not in known]:
        raise UseError(
            f"{what} holds {more}, which a newer kvstack wrote. Update kvstack, or save it again with this one."
        )
    return x


def items(x: object, what: str, length: int | None = None) -> list[Any]:
    """`x`, a list, with `length` entries where that is given."""
    if not isinstance(x, list) or length not in (None, len(x)):
        raise misfit(f"{what} is not a list{'' if length is None else f' of {length} entries'}.")
    return x


def pairs(x: object, what: str, each: int = 1) -> dict[int, Any]:
    """A mapping by layer, which JSON holds as a list of [layer, value] or, with `each` values, [layer, value, ...]."""
    found: dict[int, Any] = {}
    for entry in items(x, what):
        layer, *values = items(entry, what, 1 + each)
        if count(layer, f"a layer in {what}") in found:
            raise misfit(f"{what} has layer {layer} twice.")
        found[layer] = values[0] if each == 1 else values
    return found


def count(x: object, what: str, least: int = 0, most: int | None = None) -> int:
    """`x`, a whole number within bounds."""
    if type(x) is not int or x < least or (most is not None and x > most):
        wanted = f"{least} or more" if most is None else f"from {least} to {most}"
        raise misfit(f"{what} is {_short(x)}, not a whole number, {wanted}.")
    return x


def check_numbers(x: Tensor, what: str, largest: float = LARGEST) -> None:
    """Refuse NaN, infinity, and numbers above `largest`, which are so large that attention would overflow."""
    if x.is_floating_point() and x.numel():
        low, high = (float(bound) for bound in torch.aminmax(x if x.dtype in FLOATS else x.float()))
        if not (math.isfinite(low) and math.isfinite(high) and max(-low, high) <= largest):
            raise misfit(f"{what} hold NaN, infinity or numbers above {largest:g}.")


def check_places(places: Tensor, each: int, size: int, what: str) -> None:
    """Refuse `places` (..., n) of tokens in granules of `size`, `each` of them, that are not ascending or not in it."""
    within = places.long().unflatten(-1, (-1, each))
    if within.numel() and not bool((within.diff(dim=-1) > 0).all() and (within >= 0).all() and (within < size).all()):
        raise misfit(f"the places of {what} are not ascending, or not below {size}.")


def _short(x: object) -> str:
    text = repr(x)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True)
class Get:
    """Reads the tensors of one track, and knows what they must fit.

    Attributes:
        read: `Tensors.read`.
        layers: indices in the model of the layers that the track is for.
        layouts: the layout of a token in the model's cache, in each of them.
        rows: of the cohort.
        seen: tokens that the model saw.
        sealed: the number of them that are sealed.
    """

    read: Callable[[Any, Sequence[int | None] | None, Sequence[torch.dtype], torch.device, str, int], Tensor]
    layers: Sequence[int]
    layouts: Sequence[Layout]
    rows: int
    seen: int
    sealed: int

    def __call__(
        self, name: Any, what: str = "tensors", shape: Sequence[int | None] | None = None, *dtypes: torch.dtype
    ) -> Tensor:
        """The tensor `name`, on the device of the first layer. It has the shape (None: any length) and one of the types
        that are given, and ordinary numbers, or a `UseError` says that `what` does not fit."""
        each = sum(layout.numbers for layout in self.layouts)
        # as long as the text, and not larger than what all of it and all axes of these layers take
        most = max(self.seen, each) if shape is not None else self.rows * each * (each + self.seen)
        return self.read(name, shape, dtypes, self.layouts[0].device, self.where(what), most)

    def where(self, what: str) -> str:
        """`what`, and of which layers."""
        first, last = self.layers[0], self.layers[-1]
        return f"{what} of layer {first}" if first == last else f"{what} of layers {first} to {last}"

    def part(self, first: int, number: int) -> Get:
        """The same for `number` of its layers, from place `first` on."""
        span = slice(first, first + number)
        return replace(self, layers=self.layers[span], layouts=self.layouts[span])


class Tensors:
    """The tensors of a file by name, each inflated when it is asked for, and not before its size is known to fit.

    Args:
        plain: as they are in the file.
        deflated: name -> (type, shape) of those that are deflated.
    """

    def __init__(self, plain: Mapping[str, Tensor], deflated: Mapping[str, tuple[torch.dtype, list[int]]]) -> None:
        self._plain, self._deflated = plain, deflated
        self._given: set[str] = set()

    def read(
        self,
        name: Any,
        shape: Sequence[int | None] | None,
        dtypes: Sequence[torch.dtype],
        device: torch.device,
        what: str,
        most: int | None = None,
    ) -> Tensor:
        """The tensor `name`, on `device`.

        Args:
            shape: with None for lengths that are free; None: any shape.
            dtypes: those it may have; none: any.
            what: its name in messages.
            most: the largest length that is free or, where the shape is, how many numbers it may hold.

        Raises:
            UseError: there is no such tensor, it is another one, or its numbers are not ordinary ones.
        """
        if not isinstance(name, str) or name not in self._plain:
            raise misfit(f"{what} are missing.")
        plain = self._plain[name]
        dtype, size = self._deflated.get(name, (plain.dtype, list(plain.shape)))
        if shape is None:
            fits = most is None or math.prod(size) <= most
        else:
            free = size if most is None else [min(n, most) for n in size]
            wanted_size = [m if n is None else n for n, m in zip(shape, free, strict=False)]
            fits = len(size) == len(shape) and wanted_size == size
        if not fits or (dtypes and dtype not in dtypes):
            wanted = "of another size" if shape is None else str(tuple("any" if n is None else n for n in shape))
            types = " or ".join(str(each) for each in dtypes)
            bound = f" with at most {most} in place of any" if None in (shape or ()) and most is not None else ""
            problem = f"{what} are {tuple(size)} {dtype}, not {wanted} {types}".replace("'any'", "any") + bound
            raise misfit(f"{problem.replace('torch.', '').rstrip()}.")
        x = _inflated(plain, dtype, size, what) if name in self._deflated else plain
        # tensors that were one when they were saved must not be changed together
        x = x.clone() if name in self._given and x.device == device else x
        self._given.add(name)
        check_numbers(x, what)
        return x.to(device)


def _inflated(x: Tensor, dtype: torch.dtype, shape: list[int], what: str) -> Tensor:
    """Inflate a tensor into just the bytes that it declares."""
    import zlib

    plain, end, packed = bytearray(math.prod(shape) * dtype.itemsize), 0, x.numpy().data
    stream = zlib.decompressobj()
    try:
        for start in range(0, len(packed), CHUNK):
            piece = stream.decompress(packed[start : start + CHUNK], len(plain) - end + 1)  # never far beyond
            if end + len(piece) > len(plain):
                break
            plain[end : end + len(piece)] = piece
            end += len(piece)
    except zlib.error:
        end = -1
    if end != len(plain) or not stream.eof or stream.unused_data:
        raise misfit(f"{what} do not inflate to the size that is declared.")
    return torch.frombuffer(plain, dtype=dtype).view(shape)


CHUNK = 1 << 16
"""Deflated bytes that are read at a time."""
