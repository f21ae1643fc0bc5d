"""Fingerprints: telling models, and tensors that were fitted to them, apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BindError
from .attention import offload_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fingerprint", "sampled"]

MANY = 4096
"""Numbers of each tensor that go into a fingerprint."""
NOT_THE_MODEL = re.compile(
    r"_.*|transformers_version|.*dtype|use_cache|quantization_config|output_.*|.*_token_ids?|architectures"
)
"""Settings of a config that change without the model changing."""


def fingerprint(model: PreTrainedModel) -> str:
    """A fingerprint of a model's config and weights, whatever folder it came from, the same in
    float32 and bfloat16.

    Weights are sampled, 4,096 of each tensor, so that a large model is recognised in a moment.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    plain = {name: value for name, value in config.items() if not NOT_THE_MODEL.fullmatch(name)}
    head = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(f"{head} {sampled(weights(model))}".encode()).hexdigest()[:24]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and saved buffers by name, as `state_dict` names them. It is not asked: with 4-bit weights of
    bitsandbytes it unpacks them in place on some processors, and the model is damaged."""
    by_name: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        passing: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        named = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        named += [(name, x) for name, x in module.named_buffers(recurse=False) if name not in passing]
        for name, x in named:
            by_name[f"{prefix}.{name}" if prefix else name] = _there(module, name, x)
    return by_name


def _there(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """The numbers of a weight, wherever they are kept.

    Raises:
        BindError: they are nowhere.
    """
    if hasattr(x, "full_tensor"):  # a shard of a DTensor: the same fingerprint on every rank
        whole: Tensor = x.full_tensor()
        return whole
    if x.device.type != "meta":
        return x
    for hook in offload_hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            kept: Tensor = hook.weights_map[name]
            return kept
    raise BindError(f"the weight {name} of a {type(module).__name__} is on the meta device. Load the model's weights.")


def sampled(tensors: Mapping[Any, Tensor]) -> str:
    """A fingerprint of 4,096 numbers of each tensor, in bfloat16 whatever type they have."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {tuple(x.shape)}".encode())
        flat = x.detach().flatten()
        sample = flat[:: max(1, flat.numel() // MANY)]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
