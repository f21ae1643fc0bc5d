"""Finding the processes that share the heads of a model (tensor parallelism): its weights tell.

transformers parts projections among processes as DTensors on a mesh whose dimension is called "tp". Every process runs
the whole model on the same tokens; of each layer it computes, and caches, its own heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BindError
from ..heads import ALONE, Heads
from .layers import find_layers
from .probing import cached_keys, token_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["heads_of", "whole_shapes"]

SPLITS = "tp"
OTHERS = ("fsdp", "dp", "dp_replicate", "dp_shard", "ep", "efsdp")
"""Dimensions of a mesh along which processes read different texts, or hold different experts: no heads are split."""

_known: weakref.WeakKeyDictionary[Any, Heads] = weakref.WeakKeyDictionary()


def heads_of(model: PreTrainedModel) -> Heads:
    """The processes among which the heads of `model` are split; `ALONE` where it is not split.

    The first call runs some tokens through a model that is split, in all of its processes.

    Raises:
        BindError: the model is spread in a way that kvstack does not know.
    """
    if model not in _known:
        group = _group(model)
        _known[model] = ALONE if group is None else _compared(model, group)
    return _known[model]


def whole_shapes(model: PreTrainedModel) -> dict[int, tuple[int, int, int]]:
    """Full-attention layer -> (H, D of keys, D of values) of what all processes cache together."""
    heads = heads_of(model)
    return {
        i: (held if i in heads.whole else held * heads.size, keys, values)
        for i, (held, keys, values) in token_shapes(model).items()
    }


def _group(model: PreTrainedModel) -> Any:
    """The process group that splits heads; None where none does."""
    for mesh in _meshes(model):
        names = mesh.mesh_dim_names
        for axis in range(mesh.ndim):
            name = names[axis] if names else None
            if mesh.size(axis) > 1 and name not in (SPLITS, *OTHERS):
                raise BindError(
                    f"{type(model).__name__} is spread over processes along a mesh dimension named {name!r}, and "
                    "kvstack cannot tell what each of them holds. Load it with transformers' "
                    'distributed_config=DistributedConfig(tp_plan="auto"), or whole.'
                )
            if name == SPLITS and mesh.size(axis) > 1:
                return mesh.get_group(axis)
    return None


def _meshes(model: PreTrainedModel) -> Iterator[Any]:
    """The device meshes that `model` is on: transformers' note of it, since quantized shards are plain tensors, and
    those of its weights."""
    noted = getattr(model, "_device_mesh", None)
    if noted is not None:
        yield noted
    seen = set[int]()
    for weight in model.parameters():
        mesh = getattr(weight, "device_mesh", None)
        if mesh is not None and id(mesh) not in seen:
            seen.add(id(mesh))
            yield mesh


def _compared(model: PreTrainedModel, group: Any) -> Heads:
    """Find the layers that are whole: not every plan splits keys, and latents that all heads share (DeepSeek) are in
    each process. If a layer's keys are the same in all processes, they are not split."""
    heads = Heads(torch.distributed.get_rank(group), torch.distributed.get_world_size(group), group=group)
    whole = set[int]()
    full = find_layers(model).full
    for layer, keys in cached_keys(model, full).items():
        flat = keys.float().flatten()[None, None]
        if torch.equal(heads.max(flat), -heads.max(-flat)):
            whole.add(layer)
    return Heads(heads.rank, heads.size, frozenset(whole), group)
