"""One compressed layer, as transformers asks a cache for its layers: what it holds, and who does its work."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .errors import UseError
from .lazy import Lazy

if TYPE_CHECKING:
    from .cache import KVStack

__all__ = ["StackLayer"]


class StackLayer(CacheLayerMixin):
    """Stands for one compressed layer where transformers asks a layer what it is; the stack does its work."""

    is_croppable = True
    is_sliding = False

    def __init__(self, stack: KVStack, layer: int) -> None:
        self._stack, self._layer = weakref.ref(stack), layer

    @property
    def stack(self) -> KVStack:
        stack = self._stack()
        if stack is None:
            raise UseError("the KVStack of this layer no longer exists. Keep the stack, not its layers.")
        return stack

    # ---- what it holds

    @property
    def keys(self) -> Tensor | None:
        """The keys held, (B, H, held, D), decoded when they are looked at, which is refused where rows hold different
        tokens; None before the first forward."""
        return self._read("keys")

    @property
    def values(self) -> Tensor | None:
        """The values held, (B, H, held, D), decoded when they are looked at; None before the first forward."""
        return self._read("values")

    def _read(self, kind: str) -> Tensor | None:
        if not self.is_initialized:
            return None
        stack, layer = self.stack, self._layer

        def decode() -> Tensor:
            return cast(Tensor, getattr(stack.decoded(layer), kind))

        if not stack.batch.running and stack.batch.is_even:
            return decode()
        # some models ask every layer whether it holds anything: in the middle of a forward, or of padded rows
        return Lazy(*stack.batch.shape_of(layer, kind), decode)

    @property
    def is_initialized(self) -> bool:
        return self.stack.batch.columns.get(self._layer, 0) > 0

    @property
    def record_past(self) -> bool:
        return self.stack.batch.recording

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stack.get_mask_sizes(query_length, self._layer)

    def get_seq_length(self) -> int:
        return self.stack.get_seq_length(self._layer)

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: memory is taken with the first tokens."""

    # ---- what only the whole stack can do

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise self._whole("update")

    def reset(self) -> None:
        raise self._whole("reset")

    def crop(self, tokens_to_remove: int) -> None:
        raise self._whole("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise self._whole("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise self._whole("batch_repeat_interleave")

    def batch_select_indices(self, indices: Any) -> None:
        raise self._whole("batch_select_indices")

    def offload(self) -> None:
        raise self._whole("offload")

    def prefetch(self) -> None:
        raise self._whole("prefetch")

    def _whole(self, method: str) -> UseError:
        return UseError(
            f"a KVStack stores groups of layers together: call {method} on the stack, not on its layer {self._layer}."
        )
