"""The caches under test, by name.

dense                     transformers' DynamicCache, which all else is compared with
empty                     a stack without stages
quant:2+evict:0.2         a stack, as everywhere
quant:4@fused=False       a stack with other settings than its stages
hqq:4   hqq:2,group=32    a peer (`kvstack.bench.peers.spec`)
nothing                   no context at all: what the text is worth
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transformers import Cache, DynamicCache

from ... import KVStack, registry
from ...errors import KVStackError
from ...spec import parse as parse_spec
from ...stage import Stage
from ..peers import spec as peers
from ..peers.kvpress import Press
from ..terminal import say
from . import sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "DENSE",
    "NOTHING",
    "Variant",
    "available",
    "codes",
    "parse",
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
    stages: tuple[Stage, ...] = ()
    code: str = ""
    """The line of Python that makes a stack."""

    @property
    def key(self) -> dict[str, str | None]:
        """Its part of the keys of figures: the label, and the digest of the plugins that its stages come from."""
        return {"cache": self.label, "plugins": sources.plugins(self.stages)}

    @property
    def family(self) -> str:
        """Whose it is."""
        return self.peer.family if self.peer else "DynamicCache" if self.kind == "dense" else "kvstack"

    @property
    def press(self) -> Press | None:
        """The press, if kvpress runs this variant."""
        return self.peer.press if self.peer else None

    @property
    def missing(self) -> str | None:
        """A package that is not installed, and how to get it; None if nothing is missing."""
        return self.peer.missing() if self.peer else None

    def cache(self, model: PreTrainedModel) -> Cache:
        assert self.make is not None, f"{self.label} has no cache in this process"
        return self.make(model)


# ---- names


def parse(specs: Sequence[str]) -> list[Variant]:
    """The dense cache, then one variant for each spec; a spec may hold several, separated by commas or spaces."""
    every = [spec for text in specs for spec in split(text)]
    return [_variant(spec) for spec in dict.fromkeys((DENSE, *every))]


def codes(specs: Sequence[str]) -> dict[str, str]:
    """The text that makes each cache: the Python line of a stack, the spec of another one."""
    every = parse(specs)
    return {one.label: one.code or one.label for one in every}


def split(text: str) -> list[str]:
    """The specs in a list. A comma also parts the settings of a stage: one begins a new spec where a name of a cache
    or stage follows it that is not the value of a setting."""
    names = {DENSE, EMPTY, NOTHING, *registry.stage_names(), *peers.NAMES}
    specs, depth = [""], 0
    for part in re.split(r"([,;()\[\]]|\s+)", text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(part, 0)
        if depth == 0 and (part == ";" or part.isspace()):
            specs.append("")
        elif depth == 0 and specs[-1].endswith(",") and re.split(r"[:+@]", part)[0].lower() in names:
            specs[-1] = specs[-1][:-1]
            specs.append(part)
        else:
            specs[-1] += part
    return [spec.strip(", ") for spec in specs if spec.strip(", ")]


def available(
    variants: Sequence[Variant], model: PreTrainedModel | None = None, caches_only: bool = False
) -> list[Variant]:
    """The variants that can be measured here; why the others cannot is said.

    `model`: those that cannot be bound to it are left out too. `caches_only`: so are peers that run in a process of
    their own, and `nothing`.
    """
    fit = []
    for variant in variants:
        reason = variant.missing or _unfit(variant, model)
        if reason is None and variant.make is None and caches_only:
            reason = "this process has no cache to measure."
        if reason is None:
            fit.append(variant)
        else:
            skipped(variant.label, reason)
    return fit


def without_presses(variants: Sequence[Variant], reason: str) -> list[Variant]:
    """The variants that kvpress does not run; why the others are left out is said."""
    for variant in variants:
        if variant.press is not None:
            skipped(variant.label, reason)
    return [variant for variant in variants if variant.press is None]


def skipped(label: str, reason: object) -> None:
    """Say that something is not measured, and why."""
    say(f"{label}: skipped, {reason}")


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
    stages, settings = parse_spec(re.sub(rf"^{EMPTY}(?=@|$)", "", spec))
    stack = KVStack(stages, **settings)  # says now what cannot work, not after the first minutes
    kind: Kind = "control" if "score=random" in spec else "kvstack"
    return Variant(
        spec, kind, lambda model: KVStack(stages, model=model, **settings), stages=tuple(stages), code=repr(stack)
    )
