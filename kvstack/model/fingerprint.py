"""Fingerprints: telling models, and tensors that were fitted to them, apart."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BindError
from .adapters import adapter_layers, in_use, is_merged, unwrapped
from .attention import decoder_of, offload_hooks
from .shards import every

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fingerprint", "is_of", "kv_fingerprint", "numbers_of", "sampled"]

MANY = 4096
"""Numbers of each tensor that go into a fingerprint."""
NOT_THE_MODEL = re.compile(
    r"_.*|transformers_version|.*dtype|use_cache|quantization_config|output_.*|.*_token_ids?|architectures"
)
"""Settings of a config that change without the model changing."""


def fingerprint(model: PreTrainedModel) -> str:
    """A fingerprint of a model's config and weights, whatever folder it came from, the same in
    float32 and bfloat16.

    Weights are sampled, 4,096 of each tensor, so that a large model is recognised in a moment. Where processes share
    the weights, each of them must ask, and all get the fingerprint of the whole model. Adapters (PEFT) count while they
    are at work: with all of them disabled a model has the fingerprint it had before it got them.
    """
    return _fingerprint(unwrapped(model))


def kv_fingerprint(model: PreTrainedModel) -> str:
    """A fingerprint of what decides a model's keys and values: its decoder with the embeddings, not its head.

    So `model` and `model.model` have the same one, and what is kept for the one serves the other.
    """
    return _fingerprint(decoder_of(unwrapped(model)))


def is_of(known: str | None, model: PreTrainedModel) -> bool:
    """Return True if a kept fingerprint is that of `model`: of its decoder or, as version 0.1 kept it, of all."""
    return known == kv_fingerprint(model) or known == fingerprint(model)


def _fingerprint(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True).to_dict()
    plain = {name: value for name, value in config.items() if not NOT_THE_MODEL.fullmatch(name)}
    head = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(f"{head} {sampled(weights(model))}{_factors(model)}".encode()).hexdigest()[:24]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and saved buffers by name, as `state_dict` names them, those of adapters that are not at work
    left out. `state_dict` is not asked: with 4-bit weights of bitsandbytes it unpacks them in place on some
    processors, and the model is damaged."""
    adapted = dict(adapter_layers(model))
    by_name: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        passing: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        named = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        named += [(name, x) for name, x in module.named_buffers(recurse=False) if name not in passing]
        for name, x in named:
            full: str | None = f"{prefix}.{name}" if prefix else name
            if adapted:
                full = _as_without(adapted, full)
            if full is not None:
                by_name[full] = numbers_of(module, name, x)
    return by_name


WRAPPED = ("base_layer", "original_module")
"""The names of peft for the layer in whose place it has put its own."""


def _as_without(adapted: Mapping[str, Any], name: str | None) -> str | None:
    """The name of a weight in a model with adapters: what the model itself calls it, and for those of adapters their
    number instead of their name, which the user has chosen. None where the weight is not at work."""
    assert name is not None
    parts, kept = name.split("."), list[str]()
    i = 0
    while i < len(parts):
        layer, part = adapted.get(".".join(parts[:i])), parts[i]
        i += 1
        if layer is None or part not in WRAPPED:
            kept.append(part)
        if layer is None or part in WRAPPED:
            continue
        container = getattr(layer, part, None)
        if i < len(parts) and hasattr(container, "keys"):  # adapters by name
            at_work = [] if is_merged(layer) else [adapter for adapter, _ in in_use(layer)]
            if parts[i] not in at_work:
                return None
            kept.append(str(at_work.index(parts[i])))
            i += 1
    return ".".join(kept)


def _factors(model: nn.Module) -> str:
    """Return the factor of each adapter in each layer that has it; empty if none is at work."""
    adapted, found = dict(adapter_layers(model)), list[str]()
    for name, layer in adapted.items():
        containers = [child for child in layer.children() if hasattr(child, "keys")]
        at_work = [] if is_merged(layer) else in_use(layer)
        held = [factor for adapter, factor in at_work if any(adapter in container for container in containers)]
        if held:
            found.append(f"{_as_without(adapted, name)} {type(layer).__name__} {held}")
    return " ".join(sorted(found))


def numbers_of(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """The numbers of `x`, the weight `name` of `module`, wherever they are kept.

    Raises:
        BindError: they are nowhere.
    """
    state = getattr(x, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # 4 bits of bitsandbytes: some processors repack them in place at the first forward
        from bitsandbytes import functional

        plain: Tensor = functional._convert_weight_packed_for_cpu_inverse(x.data, copy.copy(state))[0]
        return plain
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
        sample = every(max(1, x.numel() // MANY), x.detach())
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
