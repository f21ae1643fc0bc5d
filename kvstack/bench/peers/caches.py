"""Peers that are caches, and run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.cache_utils import CacheLayerMixin, HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Make", "dense", "hqq", "quanto", "tensors_in", "turboquant"]

Make = Callable[["PreTrainedModel"], Cache]
"""A function that builds an empty cache for a model."""

RESIDUAL = 128
"""Tokens that transformers' and tiny-turboquant's caches gather unquantized: the default of both."""


def dense(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def hqq(bits: int, group: int) -> Make:
    def make(model: PreTrainedModel) -> Cache:
        # axis 0 takes its groups across the whole text, so its error grows with every flush
        return _quantized("hqq", WholeBytes, model, bits, axis_key=1, axis_value=1, q_group_size=group)

    return make


def _quantized(backend: str, layer: type[QuantizedLayer], model: PreTrainedModel, bits: int, **settings: int) -> Cache:
    """transformers' quantized cache, made of layers that take texts of any length."""
    settings["residual_length"] = RESIDUAL
    cache = QuantizedCache(backend, model.config, bits, **settings)
    cache.layers = [layer(bits, **settings) for _ in cache.layers]
    return cache


def _filled(tensor: Tensor, spare: int) -> Tensor:
    """`tensor` (B, H, T, D) and `spare` copies of its last token."""
    return torch.cat([tensor, tensor[..., -1:, :].expand(-1, -1, spare, -1)], dim=-2) if spare else tensor


class WholeBytes(HQQQuantizedLayer):
    """Adds copies of the last token until all groups fill whole bytes: hqq fails on texts of other lengths."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Any, int]:
        tokens, numbers = tensor.shape[-2], tensor[..., :1, :].numel()
        whole = self.q_group_size * 8 // self.nbits
        spare = next((n for n in range(whole) if numbers * (tokens + n) % whole == 0), 0)
        return super()._quantize(_filled(tensor, spare), axis), tokens

    def _dequantize(self, qtensor: tuple[Any, int]) -> Tensor:
        packed, tokens = qtensor
        whole: Tensor = super()._dequantize(packed)
        return whole[..., :tokens, :]


def quanto(bits: int, group: int) -> Make:
    def make(model: PreTrainedModel) -> Cache:
        _unpack_with_torch()
        # one channel's neighbouring tokens share a scale in keys, one token's channels in values, as KIVI has it;
        # transformers' default, channels for both, does much worse at 2 bits
        return _quantized("quanto", WholeGroups, model, bits, axis_key=-1, axis_value=0, q_group_size=group)

    return make


class WholeGroups(QuantoQuantizedLayer):
    """Fills the tokens up to whole groups with copies of the last one: quanto refuses texts of other lengths."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, int]:
        tokens = tensor.shape[-2]
        spare = -tokens % self.q_group_size if axis == -1 else 0
        return super()._quantize(_filled(tensor, spare), axis), tokens

    def _dequantize(self, q_tensor: tuple[Tensor, int]) -> Tensor:
        tensor, tokens = q_tensor
        return super()._dequantize(tensor)[..., :tokens, :]


def _unpack_with_torch() -> None:
    """Spare quanto the compiler.

    On a CPU quanto unpacks with an extension that it compiles at first use, in a minute or two. The extension calls
    the torch operations below and nothing else, so the numbers and the time are the same without it.
    """
    from optimum.quanto.library.extensions import get_extension

    class Unpacker:
        @staticmethod
        def unpack(packed: Tensor, bits: int) -> Tensor:
            return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    get_extension("quanto_cpp")._lib = Unpacker


def turboquant(bits: int, group: int | None) -> Make:
    def make(model: PreTrainedModel) -> Cache:
        from tiny_turboquant import TinyKVCache

        class Owned(TinyKVCache):
            """Its residual window is a view of the whole prompt until the next token comes; here it is a copy."""

            def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
                keys_and_values = super().update(keys, values, layer_idx, *args, **kwargs)
                layer = self.layers[layer_idx]
                layer._residual_keys = layer._residual_keys.clone()
                layer._residual_values = layer._residual_values.clone()
                return keys_and_values

        return Owned.for_model(model, bits=bits, value_group_size=group, residual_len=RESIDUAL)

    return make


def tensors_in(thing: object) -> list[Tensor]:
    """The tensors that really hold numbers in a layer or in nested lists and mappings of them.

    A wrapper such as quanto's counts as the tensors inside it.
    """
    if isinstance(thing, Tensor):
        return list(_unwrapped(thing))
    if isinstance(thing, CacheLayerMixin):
        thing = vars(thing)
    if isinstance(thing, Mapping):
        thing = list(thing.values())
    return [x for part in thing for x in tensors_in(part)] if isinstance(thing, list | tuple) else []


def _unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _unwrapped(getattr(tensor, name))
    else:
        yield tensor
