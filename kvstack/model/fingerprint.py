"""Fingerprints: telling models, and tensors that were fitted to them, apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    return hashlib.sha256(f"{head} {sampled(model.state_dict())}".encode()).hexdigest()[:24]


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
