"""Bytes of any cache: of a stack, of transformers' own, of a peer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache

from ...accounting import STACK
from ...cache import KVStack
from ...packed import storage_bytes
from ...report import break_even
from ..peers.caches import tensors_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["dense_bfloat16", "fitted", "held_bytes", "of_bfloat16", "share_of_bfloat16"]


def held_bytes(cache: Cache) -> int:
    """Bytes of the storages of all tensors a cache holds, scales and zeros included."""
    return cache.nbytes if isinstance(cache, KVStack) else storage_bytes(tensors_in(cache.layers))


def fitted(cache: Cache) -> dict[str, Any]:
    """Figures of what was fitted to the model and serves all its caches: its bytes, and the tokens from which on a
    stack with it holds less than a dense cache, in the model's dtype. Other caches have nothing of the kind."""
    if not isinstance(cache, KVStack):
        return {"model_nbytes": 0, "break_even": 0}
    report = cache.report()
    return {"model_nbytes": report.model_nbytes, "break_even": report.break_even}


def of_bfloat16(cache: Cache, model: PreTrainedModel) -> dict[str, Any]:
    """Figures of `share_of_bfloat16` and of what was fitted to the model, which counts what it is."""
    share = share_of_bfloat16(cache, model)
    nbytes = cache.model_nbytes if isinstance(cache, KVStack) else 0
    tokens = _rows(cache) * cache.get_seq_length()
    saved = (1 - share) * dense_bfloat16(cache, model)
    return {"share": share, "model_nbytes": nbytes, "break_even": break_even(nbytes, tokens, saved)}


OF_THE_MODEL = ("recent queries", "uncompressed layers", "bases")
"""Parts of a stack, other than raw tokens and latents, whose numbers are of the model's dtype."""


def share_of_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes held, as a share of what a dense bfloat16 cache of the same tokens holds.

    Numbers of the model's dtype count two bytes each, also where the model runs in float32: raw tokens, latents that no
    encoder packs, bases, a dense cache's all, and, to the advantage of peers, scales that they hold in it. Codes,
    positions and the scales of stacks count what they are. Not counted: what was fitted to the model and serves all
    its caches.
    """
    if isinstance(cache, KVStack):
        parts = cache.parts()
        tensors = [x for *_, x in parts]
        wide = [x for payer, part, x in parts if payer == STACK or part in OF_THE_MODEL or part.endswith(": data")]
        wide = [x for x in wide if x.dtype == model.dtype]
    else:
        tensors = tensors_in(cache.layers)
        wide = [x for x in tensors if x.dtype == model.dtype]
    held = storage_bytes(tensors) - storage_bytes(wide) + storage_bytes(wide) * 2 / model.dtype.itemsize
    return (held - _views(cache, model)) / dense_bfloat16(cache, model)


def dense_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes of a dense bfloat16 cache of the same tokens; layers with a sliding window hold no more than that."""
    rows, seen = _rows(cache), cache.get_seq_length()
    held = (numbers * (seen if window is None else min(seen, window - 1)) for numbers, window in _per_token(model))
    return float(rows * sum(held) * 2)


def _rows(cache: Cache) -> int:
    """Texts that a cache holds: transformers' dense layers know only by their tensors."""
    if isinstance(cache, KVStack):
        return max(1, cache.batch_size)
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return max([1, *(x.shape[0] for x in keys if x is not None)])


def _views(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes that layers with a sliding window seem to hold, in bfloat16: behind a prompt, and until the next token,
    they are views of all of it."""
    spare = 0
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False) and getattr(layer, "keys", None) is not None:
            tensors = [layer.keys, layer.values]
            spare += storage_bytes(tensors) - sum(x.numel() * x.element_size() for x in tensors)
    return spare * 2 / model.dtype.itemsize


_known: weakref.WeakKeyDictionary[Any, list[tuple[int, int | None]]] = weakref.WeakKeyDictionary()


def _per_token(model: PreTrainedModel) -> list[tuple[int, int | None]]:
    """Numbers that each layer of a dense cache holds for a token of a row, and its window where it slides."""
    if model not in _known:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([[1]], device=model.device), past_key_values=cache, logits_to_keep=1)
        layers: list[Any] = cache.layers
        _known[model] = [
            (layer.keys.numel() + layer.values.numel(), getattr(layer, "sliding_window", None)) for layer in layers
        ]
    return _known[model]
