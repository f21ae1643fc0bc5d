"""The caches under test, by name.

dense                     transformers' DynamicCache, which all else is compared with
empty                     a stack without stages
quant:2+evict:0.2         a stack, as everywhere
quant:4@fused=False       a stack with other settings than its stages
hqq:4   hqq:2,group=32    a peer (`kvstack.bench.peers`)
nothing                   no context at all: what the text is worth
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from ... import KVStack, registry
from ...errors import KVStackError, SpecError
from ...packed import storage_bytes
from ...spec import parse as parse_spec
from .. import peers
from ..show import tables as show

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "DENSE",
    "NOTHING",
    "Variant",
    "available",
    "dense_bfloat16",
    "held_bytes",
    "parse",
    "share_of_bfloat16",
    "skipped",
    "split",
    "without_presses",
]

DENSE, EMPTY, NOTHING = "dense", "empty", "nothing"
Kind = Literal["dense", "kvstack", "peer", "control"]


@dataclass(frozen=True)
class Variant:
    """A cache under test: its label, and what makes an empty one for a model, or a peer that runs elsewhere."""

    label: str
    kind: Kind
    make: Callable[[PreTrainedModel], Cache] | None = None
    peer: peers.Peer | None = None

    @property
    def family(self) -> str:
        """Whose it is."""
        return self.peer.family if self.peer else "DynamicCache" if self.kind == "dense" else "kvstack"

    @property
    def press(self) -> peers.Press | None:
        """What is asked of kvpress, where that is who runs it."""
        return self.peer.press if self.peer else None

    @property
    def missing(self) -> str | None:
        """What is not installed, and how to get it; None where nothing is."""
        return self.peer.missing() if self.peer else None

    def cache(self, model: PreTrainedModel) -> Cache:
        assert self.make is not None, f"{self.label} has no cache in this process"
        return self.make(model)


# ---- names


def parse(specs: Sequence[str]) -> list[Variant]:
    """The dense cache, then one variant for each spec; a spec may hold several, separated by commas or spaces."""
    every = [spec for text in specs for spec in split(text)]
    return [_variant(spec) for spec in dict.fromkeys((DENSE, *every))]


def split(text: str) -> list[str]:
    """The specs in a list. A comma also parts the settings of a stage: one begins a new spec where a name of a cache
    or stage follows it that is no setting's value."""
    names = {DENSE, EMPTY, NOTHING, *registry.stage_names(), *peers.NAMES}
    found, depth = [""], 0
    for part in re.split(r"([,;()\[\]]|\s+)", text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(part, 0)
        if depth == 0 and (part == ";" or part.isspace()):
            found.append("")
        elif depth == 0 and found[-1].endswith(",") and re.split(r"[:+@]", part)[0].lower() in names:
            found[-1] = found[-1][:-1]
            found.append(part)
        else:
            found[-1] += part
    return [spec.strip(", ") for spec in found if spec.strip(", ")]


def available(
    variants: Sequence[Variant], model: PreTrainedModel | None = None, caches_only: bool = False
) -> list[Variant]:
    """The variants that can be measured here; why the others cannot is said.

    `model`: those that cannot be bound to it are left out too. `caches_only`: so are peers that run in a process of
    their own, and `nothing`.
    """
    found = []
    for variant in variants:
        reason = variant.missing or _unfit(variant, model)
        if reason is None and variant.make is None and caches_only:
            reason = "there is no cache in this process."
        if reason is None:
            found.append(variant)
        else:
            skipped(variant.label, reason)
    return found


def without_presses(variants: Sequence[Variant], reason: str) -> list[Variant]:
    """The variants that kvpress does not run; why the others are left out is said."""
    for variant in variants:
        if variant.press is not None:
            skipped(variant.label, reason)
    return [variant for variant in variants if variant.press is None]


def skipped(label: str, reason: object) -> None:
    """Say that something is not measured, and why."""
    show.console().print(f"{label}: skipped, {reason}", highlight=False)


def _unfit(variant: Variant, model: PreTrainedModel | None) -> str | None:
    """Why a cache cannot be that of `model`."""
    if model is None or variant.make is None:
        return None
    try:
        variant.cache(model)
    except KVStackError as error:
        return str(error)
    return None


def _variant(spec: str) -> Variant:
    if spec == DENSE:
        return Variant(spec, "dense", lambda model: DynamicCache(config=model.config))
    if spec == NOTHING:
        return Variant(spec, "control")
    if re.split(r"[:,]", spec)[0] in peers.NAMES:
        peer = peers.parse(spec)
        return Variant(spec, "peer", peer.make, peer)
    stages_spec, _, settings_spec = spec.partition("@")
    stages, settings = parse_spec("" if stages_spec == EMPTY else stages_spec)
    settings |= peers.settings_in(spec, filter(None, settings_spec.split(",")), "quant:4@fused=False")
    try:
        KVStack(stages, **settings)  # says now what cannot work, not after the first minutes
    except TypeError as error:
        raise SpecError(f"{spec!r}: {error}.") from None
    kind: Kind = "control" if "score=random" in spec else "kvstack"
    return Variant(spec, kind, lambda model: KVStack(stages, model=model, **settings))


# ---- bytes


def held_bytes(cache: Cache) -> int:
    """Bytes of the storages of all tensors a cache holds, scales and zeros included."""
    return cache.nbytes if isinstance(cache, KVStack) else storage_bytes(list(peers.plain(_tensors_in(cache.layers))))


PLAIN = ("recent queries", "uncompressed layers", "bases")


def share_of_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes held, as a share of what a dense bfloat16 cache of the same tokens holds.

    Numbers of the model's dtype count two bytes each, also where the model runs in float32: raw tokens, latents that no
    encoder packs, bases, a dense cache's all, and, to the advantage of peers, scales that they hold in it. Codes,
    positions and the scales of stacks count what they are. Not counted: what was fitted to the model and serves all
    its caches.
    """
    if isinstance(cache, KVStack):
        parts = cache._parts()
        tensors = [x for *_, x in parts]
        wide = [x for payer, part, x in parts if payer == RAW[0] or part in PLAIN or part.endswith(": data")]
        wide = [x for x in wide if x.dtype == model.dtype]
    else:
        tensors = list(peers.plain(_tensors_in(cache.layers)))
        wide = [x for x in tensors if x.dtype == model.dtype]
    held = storage_bytes(tensors) - storage_bytes(wide) + storage_bytes(wide) * 2 / model.dtype.itemsize
    return (held - _views(cache, model)) / dense_bfloat16(cache, model)


def dense_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes of a dense bfloat16 cache of the same tokens; layers with a sliding window hold no more than that."""
    rows, seen = max(1, cache.batch_size), cache.get_seq_length()
    held = (numbers * (seen if window is None else min(seen, window - 1)) for numbers, window in _per_token(model))
    return float(rows * sum(held) * 2)


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


def _tensors_in(thing: object) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, CacheLayerMixin):
        thing = vars(thing)
    if isinstance(thing, Mapping):
        thing = list(thing.values())
    return [x for part in thing for x in _tensors_in(part)] if isinstance(thing, list | tuple) else []
