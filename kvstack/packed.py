"""The result of an encoder: a few tensors whose third axis runs along the tokens.

Because every part has the layout (B, H, units, ...), where a unit is a fixed number of tokens, the store can
append, crop, evict and reorder encoded tokens without knowing the encoder:

    tokens    | t0 t1 t2 t3 | t4 t5 t6 t7 | ...       granule = 4: these four stay together
    codes     |      u0     |      u1     | ...       one unit per granule
    scale     |      u0     |      u1     | ...
    (values)  | u0 u1 u2 u3 | u4 u5 u6 u7 | ...       one unit per token

While decoding, tokens are sealed a few at a time. If all that are sealed were copied each time, a long text would cost
the square of its length. So parts may be views of buffers with room for more tokens behind those of every head:

    head 0  | u0 | u1 | room |  head 1  | u0 | u1 | room |        `apart`: tokens from one head to the next
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .types import take_tokens

__all__ = ["Packed", "Room", "storage_bytes"]

SPARE = 32
"""A buffer that grows gets room for 1 / SPARE more tokens. So it never holds more than that share in reserve, and a new
token costs at most about SPARE copies of a token: little, as all of them are read at every step."""


_writing = threading.Lock()
"""Caches that share a room may grow in several threads."""


class Room:
    """Buffers with room for more tokens than are written. Parts of `Packed` are views of them.

    What is written never changes. So a view of the first tokens stays right, whoever writes behind them; and only those
    who hold all that is written may write (`takes`): of two caches that grow from the same tokens, one gets a copy.

    Args:
        like, newer: examples of what will be written: shapes, and types that hold both (newer tokens may be too large
            for a half).
        most: tokens that there is room for.
    """

    def __init__(self, like: Packed, newer: Packed, most: int) -> None:
        self.written, self.most = 0, most
        self.buffers = {
            name: part.new_empty(
                (*part.shape[:2], part.shape[2] * most // like.tokens, *part.shape[3:]),
                dtype=torch.promote_types(part.dtype, newer.parts[name].dtype),
            )
            for name, part in like.parts.items()
        }

    def holds(self, packed: Packed) -> bool:
        """Return True if the parts are views of these buffers: nobody has put others in their place."""
        return all(packed.parts[name].data_ptr() == buffer.data_ptr() for name, buffer in self.buffers.items())

    def takes(self, packed: Packed, newer: Packed) -> bool:
        """Return True if `packed` is all that is written, and `newer` may be written behind it."""
        if packed.tokens != self.written or self.written + newer.tokens > self.most or not self.holds(packed):
            return False
        for name, buffer in self.buffers.items():
            # a tensor made under inference_mode cannot be written to outside of it
            frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
            if frozen or torch.promote_types(buffer.dtype, newer.parts[name].dtype) != buffer.dtype:
                return False
        return True

    def add(self, packed: Packed, newer: Packed) -> dict[str, Tensor] | None:
        """Write `newer` behind `packed`; returns views of both, or None where it takes none of them."""
        with _writing:
            return self.write(newer) if self.takes(packed, newer) else None

    def write(self, packed: Packed) -> dict[str, Tensor]:
        """Write `packed` behind the others; returns views of all."""
        total, parts = self.written + packed.tokens, {}
        for name, buffer in self.buffers.items():
            first, last = (buffer.shape[2] * tokens // self.most for tokens in (self.written, total))
            buffer[:, :, first:last] = packed.parts[name]
            parts[name] = buffer[:, :, :last]
        self.written = total
        return parts


@dataclass(frozen=True)
class Packed:
    """Encoded tokens.

    Attributes:
        parts: named tensors (B, H or 1, units, ...); `tokens` must be a multiple of every part's unit count.
        tokens: tokens held.
        width: channels of the decoded tensor.
        dtype: type of the decoded tensor.
        exact: True if they are stored as they were, without an encoder.
        room: the buffers that `parts` are views of, where they have room for more tokens.
        home: the device on which `parts` are read, if they are stored on another one.
    """

    parts: dict[str, Tensor]
    tokens: int
    width: int
    dtype: torch.dtype
    exact: bool = False
    room: Room | None = field(default=None, repr=False, compare=False)
    home: torch.device | None = None

    def mapped(self, change: Callable[[Tensor], Tensor], tokens: int | None = None) -> Packed:
        """This with `change` made to each part, of another number of `tokens` if it makes that."""
        parts = {name: change(part) for name, part in self.parts.items()}
        return replace(self, parts=parts, tokens=self.tokens if tokens is None else tokens, room=None)

    def stored(self, device: torch.device | None) -> Packed:
        """This on `device`, until it is `fetched`; None: where it is."""
        home = next(iter(self.parts.values())).device
        if device is None or device == home:
            return self
        return replace(self.mapped(lambda part: part.to(device)), home=home)

    def fetched(self) -> Packed:
        """This where it is read: a copy, if it is stored elsewhere."""
        home, room = self.home, self.room
        if home is None:
            return self
        if room is not None and room.holds(self):  # whole buffers: to leave out their room would be one more copy
            parts = {name: room.buffers[name].to(home)[:, :, : part.shape[2]] for name, part in self.parts.items()}
        else:
            parts = {name: part.to(home) for name, part in self.parts.items()}
        return replace(self, parts=parts, room=None, home=None)

    def compact(self) -> Packed:
        """With parts whose memory has the order of their axes."""
        return self.mapped(Tensor.contiguous)

    @cached_property
    def apart(self) -> int:
        """Tokens from one head to the next in memory, as kernels want them: as many for all parts, with the numbers of
        a head side by side. 0: they lie in another way."""
        found = {_apart(part) * self.tokens // max(1, part.shape[2]) for part in self.parts.values()}
        return found.pop() if len(found) == 1 else 0

    def apart_evenly(self) -> Packed:
        """This, or a copy for kernels where it lies in another way (`apart`)."""
        return self if self.apart else self.compact()

    def append(self, newer: Packed, *, spare: bool = False) -> Packed:
        """This, followed by `newer` tokens of the same encoder. `spare` (default False): where there are many tokens,
        leave room behind those of every head for the next ones; readers must cope with it (`Encoder.reads_room`)."""
        total, dtype = self.tokens + newer.tokens, torch.promote_types(self.dtype, newer.dtype)
        parts = None if self.room is None else self.room.add(self, newer)
        if parts is not None:
            return replace(self, parts=parts, tokens=total, dtype=dtype)
        # for as many blocks like this one as are a small share of all
        left = total // SPARE // max(1, newer.tokens) * newer.tokens if spare else 0
        if left:
            return self.with_room(newer.tokens + left, newer).append(newer)
        parts = {name: torch.cat([part, newer.parts[name]], dim=2) for name, part in self.parts.items()}
        return replace(self, parts=parts, tokens=total, dtype=dtype, room=None)

    def with_room(self, tokens: int, newer: Packed | None = None) -> Packed:
        """A copy in buffers with room for so many more tokens, of the types of `newer`."""
        room = Room(self, newer or self, self.tokens + tokens)
        return replace(self, parts=room.write(self), room=room)

    def rows(self, index: Tensor) -> Packed:
        """Batch rows at `index`."""
        return self.mapped(lambda part: part.index_select(0, index.to(part.device)))

    def first(self, tokens: int) -> Packed:
        """The oldest `tokens` tokens, whole granules."""
        # clone: a view would keep the storage of all tokens alive
        return self.mapped(lambda part: part[:, :, : part.shape[2] * tokens // self.tokens].clone(), tokens)

    def take(self, granules: Tensor, size: int) -> Packed:
        """Whole granules of `size` tokens at `granules` (B or 1, H or 1, n), in that order."""

        def gather(part: Tensor) -> Tensor:
            per = part.shape[2] * size // self.tokens
            steps = torch.arange(per, device=granules.device)
            index = (granules.unsqueeze(-1) * per + steps).flatten(-2)
            return take_tokens(part, index)

        return self.mapped(gather, granules.shape[-1] * size)


def _apart(part: Tensor) -> int:
    """Units from one head to the next in the memory of a part (B, H, units, ...); 0: these lie in another way."""
    rows, heads, units = part.shape[:3]
    if part.is_contiguous():
        return units
    unit, step = math.prod(part.shape[3:]), part.stride(1 if heads > 1 else 0)
    even = rows == 1 or heads == 1 or part.stride(0) == heads * step
    return step // unit if even and part[0, 0].is_contiguous() and step % unit == 0 and step >= units * unit else 0


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`; storage that several tensors share counts once."""
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
