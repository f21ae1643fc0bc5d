"""Finding a model's attention modules, and what they can do."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn

__all__ = [
    "CACHE_ARGUMENTS",
    "attention_modules",
    "device_of",
    "expands",
    "gives_queries",
    "implementation",
    "interface",
    "offload_hooks",
    "parameters",
    "reuses",
]

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


def parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> the innermost module of that layer that takes a cache."""
    by_layer: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and any(name in parameters(module) for name in CACHE_ARGUMENTS):
            by_layer[layer] = module  # modules() goes from the outside in
    return by_layer


def interface(module: nn.Module) -> Any:
    """The registry of attention functions that this module's file looks into, or None."""
    return getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)


def gives_queries(module: nn.Module) -> bool:
    """Whether this module calls its attention through transformers' interface."""
    return interface(module) is not None


def expands(module: nn.Module) -> bool:
    """Whether this module caches latents and makes keys and values of them after reading (DeepSeek V2 and V3)."""
    return hasattr(module, "expand_kv")


def reuses(module: nn.Module) -> bool:
    """Whether this module attends to the keys and values of an earlier layer (Gemma 3n and 4)."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def implementation(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


def offload_hooks(module: nn.Module) -> list[Any]:
    """What accelerate has put on a module whose weights are kept elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, though its weights may be kept elsewhere between its calls."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    places = [getattr(hook, "execution_device", None) for inner in module.modules() for hook in offload_hooks(inner)]
    return torch.device(next((place for place in places if place is not None), device))
