"""Files that were changed after they were saved, with a valid checksum: any one thing of a description or a tensor."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
File = tuple[dict[str, Any], dict[str, Tensor]]
"""A description and the tensors."""

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -1.0, 1e308, float("nan"), float("inf"),
    "", "0", "1", "nothing", "float16", "int64", "cuda:0", "__class__", [], [[]], [0], [None], [-1], ["0"], {},
    {"tensor": "0"}, {"items": []}, {"tensor": "0", "device": "cuda:7"}, [[[[[[]]]]]], {"a": {"b": {}}},
]  # fmt: skip


def places(x: Any, path: Path = ()) -> Iterator[Path]:
    """The path of everything in a description, the whole left out."""
    entries = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(x: Any, path: Path) -> Any:
    for key in path:
        x = x[key]
    return x


def describe(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 60 else f"{text[:57]}..."


def mutated(file: File, random: random.Random) -> tuple[str, File]:
    """What was changed, and the file with it."""
    described, tensors = json.loads(json.dumps(file[0])), dict(file[1])
    if random.random() < 0.3:
        return change_tensor(tensors, described, random), (described, tensors)
    every = [path for path in places(described) if path[0] != "stack" or random.random() < 0.1]
    # most of a description is a long list of stores: pick a key of the top first, so that all are tried
    top = random.choice(sorted({path[0] for path in every}))
    path = random.choice([path for path in every if path[0] == top])
    return change_entry(described, path, sorted(tensors), random), (described, tensors)


def change_entry(described: dict[str, Any], path: Path, names: list[str], random: random.Random) -> str:
    holder, key = at(described, path[:-1]), path[-1]
    old, what = holder[key], random.choice(["drop", "value", "value", "near", "twice", "more", "swap", "tensor"])
    if what == "drop":
        del holder[key]
        return f"{path} dropped"
    if what == "twice" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
        return f"{path} twice"
    if what == "more":
        if isinstance(old, dict):
            old[random.choice(["more", "keys", "", "0"])] = random.choice(VALUES)
        elif isinstance(old, list):
            old.append(random.choice([*old, *VALUES]) if old else random.choice(VALUES))
        return f"{path} has more"
    if what == "swap" and isinstance(holder, list) and len(holder) > 1:
        other = random.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
        return f"{path} and {other} swapped"
    if what == "near" and isinstance(old, int):
        holder[key] = old + random.choice([-1, 1, -8, 8, 32, -old, old])
    elif what == "tensor" and isinstance(old, str) and names:
        holder[key] = random.choice(names)
    elif isinstance(holder, dict) and random.random() < 0.1:
        holder[str(random.choice(["keys", "update", "__dict__"]))] = holder.pop(key)
        return f"{path} renamed"
    else:
        holder[key] = random.choice(VALUES)
    return f"{path}: {describe(old)} -> {describe(holder[key])}"


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]


def change_tensor(tensors: dict[str, Tensor], described: dict[str, Any], random: random.Random) -> str:
    name = random.choice(sorted(tensors))
    x = tensors[name].clone()
    what = random.choice(
        ["cut", "cut", "longer", "empty", "type", "fill", "fill", "bytes", "turn", "flat", "gone", "axis"]
    )
    axis = random.randrange(max(1, x.dim()))
    if what == "gone":
        del tensors[name]
        return f"tensor {name} gone"
    if what == "bytes" and x.numel():
        flat = x.flatten().contiguous().view(torch.uint8)
        flat[random.randrange(len(flat))] = random.choice([0, 255, 127])
        x = flat.view(x.dtype).view(x.shape)
    elif what == "type":
        x = x.to(random.choice(DTYPES))
    elif what == "fill" or not x.dim():
        what = f"filled with {fill(x, random)} at one place or all"
    else:
        x = reshaped(x, what, axis, random)
    tensors[name] = x
    return f"tensor {name} ({where(described, name)}): {what} along {axis}, now {tuple(x.shape)} {x.dtype}"


def reshaped(x: Tensor, what: str, axis: int, random: random.Random) -> Tensor:
    if what == "cut":
        return x.narrow(axis, 0, random.randrange(max(1, x.shape[axis]))).contiguous()
    if what == "longer":
        return torch.cat([x, x], dim=axis)
    if what == "turn":
        return x.transpose(axis, random.randrange(x.dim())).contiguous()
    if what == "empty":
        return x.flatten()[:0]
    return x.unsqueeze(0) if what == "axis" else x.flatten()


def fill(x: Tensor, random: random.Random) -> float:
    limits: Any = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
    number = random.choice([limits.max, limits.min, 0, 1])
    if x.is_floating_point():
        number = random.choice([number, float("nan"), float("inf"), float("-inf"), limits.tiny])
    if random.random() < 0.5 or not x.numel():
        x.fill_(number)
    else:
        x.view(-1)[random.randrange(x.numel())] = number
    return number


def where(described: dict[str, Any], name: str) -> Path | None:
    return next((path for path in places(described) if at(described, path) == name and path[0] != "stack"), None)
