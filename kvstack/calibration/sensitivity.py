"""The importance of each layer's keys: weights for the paper's way to merge layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.attention import device_of
from ..model.layers import LayerGroups
from ..model.probing import at_rest
from .windows import PROMPT, windows_of

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["sensitivity"]


def sensitivity(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None = None,
    tokens: int = PROMPT,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[float, ...]:
    """Measure the importance of each full-attention layer's keys: the nats per token that are lost if they are replaced
    by noise of the same mean and spread. Never below 0.

    Weights for the paper's merge: `CommonKV(basis="weights", merge="mean", weights=sensitivity(model))`. Arguments are
    those of `calibrate`.

    Source: CommonKV's published code. Differs from it: text of its own, never the text that is compressed later.
    """
    from transformers import DynamicCache

    groups = LayerGroups(model, 1)
    windows, _ = windows_of(model, texts, tokens, tokenizer)
    lost = torch.zeros(len(groups.full), dtype=torch.float64)
    with at_rest(model):
        for number, (window, prompt) in enumerate(windows):
            ids = window.to(device_of(model))
            cache = DynamicCache(config=model.config)
            model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
            exact = _likelihood(model, ids, prompt, cache)
            generator = torch.Generator().manual_seed(number)
            for n, i in enumerate(groups.full):
                layer: Any = cache.layers[i]
                keys = layer.keys
                noise = torch.randn(keys.shape, generator=generator).to(keys)
                layer.keys = noise * keys.std(2, keepdim=True) + keys.mean(2, keepdim=True)
                lost[n] += exact - _likelihood(model, ids, prompt, cache)
                layer.keys = keys
    return tuple((lost / len(windows)).clamp_min(0).tolist())


def _likelihood(model: PreTrainedModel, ids: Tensor, prompt: int, cache: DynamicCache) -> float:
    """Mean log likelihood of what follows the prompt; the cache stays as it was."""
    again = copy.deepcopy(cache)
    logits = model(ids[:, prompt:-1], past_key_values=again, use_cache=True).logits[0].float()
    return -float(torch.nn.functional.cross_entropy(logits, ids[0, prompt + 1 :]))
