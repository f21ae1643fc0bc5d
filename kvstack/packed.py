"""What an encoder leaves behind: a few tensors whose third axis runs along the tokens.

Because every part has the layout (B, H, units, ...), where a unit is a fixed number of tokens, the store can
append, crop, evict and reorder encoded tokens without knowing the encoder:

    tokens    | t0 t1 t2 t3 | t4 t5 t6 t7 | ...       granule = 4: these four stay together
    codes     |      u0     |      u1     | ...       one unit per granule
    scale     |      u0     |      u1     | ...
    (values)  | u0 u1 u2 u3 | u4 u5 u6 u7 | ...       one unit per token
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .types import take_tokens

__all__ = ["Packed", "storage_bytes"]


@dataclass(frozen=True)
class Packed:
    """Encoded tokens.

    Attributes:
        parts: named tensors (B, H or 1, units, ...); `tokens` must be a multiple of every part's unit count.
        tokens: tokens held.
        width: channels of the decoded tensor.
        dtype: type of the decoded tensor.
        exact: whether they are stored as they were, without an encoder.
    """

    parts: dict[str, Tensor]
    tokens: int
    width: int
    dtype: torch.dtype
    exact: bool = False

    def _map(self, change: Callable[[Tensor], Tensor], tokens: int | None = None) -> Packed:
        parts = {name: change(part) for name, part in self.parts.items()}
        return replace(self, parts=parts, tokens=self.tokens if tokens is None else tokens)

    def compact(self) -> Packed:
        """With parts whose memory has the order of their axes, as readers want it."""
        return self._map(Tensor.contiguous)

    def append(self, newer: Packed) -> Packed:
        """This, followed by `newer` tokens of the same encoder."""
        parts = {name: torch.cat([part, newer.parts[name]], dim=2) for name, part in self.parts.items()}
        dtype = torch.promote_types(self.dtype, newer.dtype)  # newer tokens may have been too large for a half
        return replace(self, parts=parts, tokens=self.tokens + newer.tokens, dtype=dtype)

    def rows(self, index: Tensor) -> Packed:
        """Batch rows at `index`."""
        return self._map(lambda part: part.index_select(0, index.to(part.device)))

    def first(self, tokens: int) -> Packed:
        """The oldest `tokens` tokens, whole granules."""
        # clone: a view would keep the storage of all tokens alive
        return self._map(lambda part: part[:, :, : part.shape[2] * tokens // self.tokens].clone(), tokens)

    def take(self, granules: Tensor, size: int) -> Packed:
        """Whole granules of `size` tokens at `granules` (B or 1, H or 1, n), in that order."""

        def gather(part: Tensor) -> Tensor:
            per = part.shape[2] * size // self.tokens
            steps = torch.arange(per, device=granules.device)
            index = (granules.unsqueeze(-1) * per + steps).flatten(-2)
            return take_tokens(part, index)

        return self._map(gather, granules.shape[-1] * size)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind `tensors`; storage that several tensors share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
