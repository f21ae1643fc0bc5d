"""Spec strings of peers: other projects' caches, each behind the same small interface.

    dense                            transformers' DynamicCache
    hqq:4  hqq:2,group=32            transformers' QuantizedCache, hqq backend: 2, 4 or 8 bits
    quanto:4  quanto:2,group=32      the same, quanto backend: 2 or 4 bits
    turboquant:4  turboquant:2,group=32   tiny-turboquant's TinyKVCache: 2, 3, 4 or 8 bits
    kvpress:snapkv,keep=0.2          a press of kvpress, in a process and an environment of its own

The first four are caches, which `Peer.make` builds. kvpress needs an older transformers than kvstack: `Peer.press`
says what to ask of `kvpress.KvPress`, which runs the model elsewhere and returns its answers.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import SpecError
from . import caches, kvpress
from .caches import Make
from .kvpress import Press

__all__ = ["NAMES", "Peer", "parse"]

# hqq's 3 bits cannot be read back from tensors with four axes
BITS = {"hqq": (2, 4, 8), "quanto": (2, 4), "turboquant": (2, 3, 4, 8)}
NAMES = ("dense", *BITS, "kvpress")
"""The first words of the specs of peers."""
FORMS = "dense, hqq:BITS, quanto:BITS and turboquant:BITS (each with ,group=N) and kvpress:PRESS,keep=SHARE"


@dataclass(frozen=True)
class Peer:
    """Something to compare with: a cache that `make` builds, or a press for `KvPress`."""

    label: str
    family: str
    """DynamicCache, QuantizedCache, turboquant or kvpress."""
    make: Make | None = None
    """From a model to an empty cache for it; None for kvpress."""
    press: Press | None = None
    """The press to ask of `KvPress`; None for caches."""
    package: str | None = None
    """The module that must be installed here."""

    def missing(self) -> str | None:
        """Why this peer cannot run and how to get it; None where it can."""
        if self.press is not None:
            return kvpress.missing()
        # optimum itself may be there without its part quanto
        parts = (self.package or "torch").split(".")
        if all(importlib.util.find_spec(".".join(parts[: i + 1])) for i in range(len(parts))):
            return None
        return f"the package {PACKAGES[self.label.partition(':')[0]][1]} is not installed. {HOW}"


HOW = "Run: pip install 'kvstack[peers]'"
# module and distribution
PACKAGES = {
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "turboquant": ("tiny_turboquant", "tiny-turboquant"),
}


def parse(spec: str) -> Peer:
    """The peer of a spec string such as 'hqq:2,group=32'; SpecError where there is none."""
    spec = spec.strip()
    name, _, rest = spec.partition(":")
    first, *pairs = (part.strip() for part in rest.split(","))
    if name not in NAMES:
        raise SpecError(f"{spec!r} is not a baseline. There are {FORMS}.")
    if name == "dense":
        if rest:
            raise SpecError(f"{spec!r}: dense takes no settings. Write 'dense'.")
        return Peer(spec, "DynamicCache", caches.dense)
    settings = _settings_in(spec, pairs, "hqq:2,group=32")
    return _press(spec, first, settings) if name == "kvpress" else _cache(spec, name, first, settings)


def _cache(spec: str, name: str, bits: str, settings: dict[str, Any]) -> Peer:
    if bits not in map(str, BITS[name]):
        choice = ", ".join(map(str, BITS[name]))
        raise SpecError(f"{spec!r}: the bits of {name} are one of {choice}, as in '{name}:4,group=32'.")
    group = settings.pop("group", None)
    if settings:
        raise SpecError(f"{spec!r}: {name} has no setting {_listed(settings)}. It has group.")
    if group is not None and (not isinstance(group, int) or group < 1):
        raise SpecError(f"{spec!r}: group is a number of values that share a scale, got {group!r}. Write group=32.")
    module = PACKAGES[name][0]
    if name == "turboquant":
        return Peer(spec, name, caches.turboquant(int(bits), group), package=module)
    build = caches.hqq if name == "hqq" else caches.quanto
    return Peer(spec, "QuantizedCache", build(int(bits), group or 64), package=module)


def _press(spec: str, name: str, settings: dict[str, Any]) -> Peer:
    if name not in kvpress.PRESSES:
        raise SpecError(f"{spec!r}: no press {name!r}. There are {', '.join(kvpress.PRESSES)}.")
    known = kvpress.PRESSES[name].settings
    keep = settings.pop("keep", 1.0 if name == kvpress.DENSE else None)
    if unknown := [key for key in settings if key not in known]:
        raise SpecError(f"{spec!r}: {name} has no setting {_listed(unknown)}. It has {_listed(('keep', *known))}.")
    if not isinstance(keep, int | float) or not 0 < keep <= 1:
        got = "nothing" if keep is None else repr(keep)
        raise SpecError(f"{spec!r}: keep is a share of the tokens above 0 and up to 1, got {got}. Write keep=0.2.")
    return Peer(spec, "kvpress", press=Press(name, float(keep), settings))


def _settings_in(spec: str, pairs: Iterable[str], example: str) -> dict[str, Any]:
    """Settings from `name=value` strings; SpecError, with an example of how to write them, where one is none."""
    settings = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            raise SpecError(f"{spec!r}: {pair!r} is not a setting. Write NAME=VALUE, as in {example!r}.") from None
    return settings


def _listed(names: Any) -> str:
    return ", ".join(names)
