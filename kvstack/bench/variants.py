"""The caches under test, by name.

dense                     transformers' DynamicCache, which all else is compared with
empty                     a stack without stages
quant:2+evict:0.2         a stack, as everywhere
quant:4@fused=False       a stack with other settings than its stages
hqq:4   hqq:2,group=32    a peer (`kvstack.bench.peers`)
nothing                   no context at all: what the text is worth
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from .. import KVStack, registry
from ..errors import KVStackError, SpecError
from ..packed import storage_bytes
from ..store import RAW
from . import peers, show

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
    "split",
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


def available(variants: Sequence[Variant], model: PreTrainedModel | None = None, alone: bool = True) -> list[Variant]:
    """The variants that can be measured here; why the others cannot is said.

    `model`: those that cannot be bound to it are left out too. `alone`: peers that run in a process of their own count.
    """
    found = []
    for variant in variants:
        reason = variant.missing or _unfit(variant, model)
        if reason is None and variant.press is not None and not alone:
            reason = "it does not run in this process."
        if reason is None:
            found.append(variant)
        else:
            show.console().print(f"{variant.label}: skipped, {reason}", highlight=False)
    return found


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
    stages, settings = registry.parse("" if stages_spec == EMPTY else stages_spec)
    settings |= _settings(settings_spec, spec)
    try:
        KVStack(stages, **settings)  # says now what cannot work, not after the first minutes
    except TypeError as error:
        raise SpecError(f"{spec!r}: {error}.") from None
    kind: Kind = "control" if "score=random" in spec else "kvstack"
    return Variant(spec, kind, lambda model: KVStack(stages, model=model, **settings))


def _settings(text: str, spec: str) -> dict[str, Any]:
    settings = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            settings[name.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            raise SpecError(f"{spec!r}: {pair!r} is no setting. Write it as 'quant:4@fused=False'.") from None
    return settings


# ---- bytes


def held_bytes(cache: Cache) -> int:
    """Bytes of the storages of all tensors a cache holds, scales and zeros included."""
    return cache.nbytes if isinstance(cache, KVStack) else storage_bytes(list(peers.plain(_tensors_in(cache.layers))))


PLAIN = ("recent queries", "uncompressed layers")


def share_of_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes held, as a share of what a dense bfloat16 cache of the same tokens holds.

    Numbers a cache holds as the model made them (raw tokens, unquantized latents, a dense cache's all) count two
    bytes each, also where the model runs in float32; everything else counts what it is.
    """
    if isinstance(cache, KVStack):
        parts = cache._parts()
        raw = [x for payer, part, x in parts if payer == RAW[0] or part in PLAIN or part.endswith(": data")]
        wide = [x for x in raw if x.dtype == model.dtype]
        narrow = storage_bytes([x for *_, x in parts]) - storage_bytes(wide)
        size = model.dtype.itemsize
        return (narrow + storage_bytes(wide) * 2 / size) / dense_bfloat16(cache, model)
    tensors = list(peers.plain(_tensors_in(cache.layers)))
    wide = [x for x in tensors if x.dtype == model.dtype]
    held = storage_bytes(tensors) - storage_bytes(wide) + storage_bytes(wide) * 2 / model.dtype.itemsize
    return held / dense_bfloat16(cache, model)


def dense_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes of a dense cache of the same tokens: that of a DynamicCache, worked out from a layer's shape."""
    if isinstance(cache, KVStack):
        return cache.dense_nbytes * 2 / model.dtype.itemsize
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    seen = cache.get_seq_length()
    windows = (getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers)
    tokens = sum(seen if window is None else min(seen, window - 1) for window in windows)
    return float(tokens * heads * width * 2 * 2)


def _tensors_in(thing: object) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, CacheLayerMixin):
        thing = vars(thing)
    if isinstance(thing, Mapping):
        thing = list(thing.values())
    return [x for part in thing for x in _tensors_in(part)] if isinstance(thing, list | tuple) else []
