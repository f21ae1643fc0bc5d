"""Numbers of a weight of which each process holds a part (a DTensor), without gathering all of it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["every"]


def every(step: int, x: Tensor) -> Tensor:
    """Every `step`-th number of `x`, flat, in bfloat16 where it has a point. Of a weight that processes share, each of
    them must ask, and all get the same: what one process with the whole weight gets."""
    if not hasattr(x, "full_tensor"):
        return _brief(x.flatten()[::step])
    parted = [axis for axis, placed in enumerate(cast(Any, x).placements) if not placed.is_replicate()]
    if not parted:
        return _brief(cast(Any, x).to_local().flatten()[::step])
    if len(parted) == 1 and type(cast(Any, x).placements[parted[0]]).__name__ == "Shard":
        return _joined(x, step, parted[0])
    return _brief(cast(Any, x).full_tensor().flatten()[::step])  # interleaved, or parted twice: rare


def _brief(numbers: Tensor) -> Tensor:
    return (numbers.to(torch.bfloat16) if numbers.is_floating_point() else numbers).contiguous()


def _joined(x: Any, step: int, axis: int) -> Tensor:
    """`every` of a weight that is cut along one dimension among the processes of one `axis` of its mesh."""
    mesh, dim, part = x.device_mesh, x.placements[axis].dim, x.to_local()
    # torch cuts as `chunk` does: all parts but the last ones are equally long
    first = mesh.get_local_rank(axis) * -(-x.shape[dim] // mesh.size(axis))
    places = list(torch.unravel_index(torch.arange(0, x.numel(), step, device=part.device), x.shape))
    places[dim] = places[dim] - first
    mine = (places[dim] >= 0) & (places[dim] < part.shape[dim])
    own = _brief(part[tuple(place[mine] for place in places)])
    numbers = own.new_zeros(len(mine))
    numbers[mine] = own
    # bytes, since a sum of numbers would make 0.0 of -0.0; every one of them is in one process, and 0 in the others
    told = numbers.view(torch.uint8).int()
    torch.distributed.all_reduce(told, group=mesh.get_group(axis))
    return told.to(torch.uint8).view(numbers.dtype)
