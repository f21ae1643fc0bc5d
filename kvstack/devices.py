"""Devices by the names that people give them."""

from __future__ import annotations

import torch

from .errors import KVStackError

__all__ = ["usable"]


def usable(name: object) -> torch.device:
    """The device of this name, with its number where it has one: `cuda` is the current GPU.

    Raises:
        KVStackError: no tensors can lie there, on this machine or with this build of torch.
    """
    if not isinstance(name, str | torch.device):
        raise KVStackError(f"device {name!r} cannot be used: it is not a name such as 'cpu' or 'cuda:0'.")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # torch built without it raises any of these
        raise KVStackError(f"device {str(name)!r} cannot be used: {str(error).splitlines()[0].rstrip('.')}.") from None
    if device.type == "meta":
        raise KVStackError("device 'meta' cannot be used: tensors there have no numbers.")
    return device
