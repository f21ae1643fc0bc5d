"""Names of stages and scores, and the classes behind them.

All are entry points, in the groups `kvstack.stages` and `kvstack.scores`: kvstack's own are the table `BUILT_IN`, the
others come from the metadata of installed packages. All take one way from the name to the class. A plugin is loaded
when its name is asked for, not before, so a broken one disturbs nobody who does not use it. No plugin can take a
built-in name, and none of two that claim one name is preferred.

`kvstack.spec` reads and writes the strings and dicts that these names stand in.
"""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Literal

from .errors import SpecError

if TYPE_CHECKING:
    from .stage import Settings

__all__ = ["BUILT_IN", "Family", "score_names", "score_type", "shadowed", "stage_names", "stage_type", "type_of"]

Family = Literal["stages", "scores"]


def _own(family: Family, **classes: str) -> dict[str, EntryPoint]:
    return {name: EntryPoint(name, where, f"kvstack.{family}") for name, where in classes.items()}


BUILT_IN: dict[Family, dict[str, EntryPoint]] = {
    "stages": _own(
        "stages",
        commonkv="kvstack.transform.commonkv:CommonKV",
        evict="kvstack.select.evict:Evict",
        quant="kvstack.encode.quant:Quant",
        tiers="kvstack.select.tiers:Tiers",
    ),
    "scores": _own(
        "scores",
        expected="kvstack.select.expected:ExpectedAttention",
        h2o="kvstack.select.h2o:H2O",
        keydiff="kvstack.select.keydiff:KeyDiff",
        knorm="kvstack.select.knorm:KNorm",
        kvzap="kvstack.select.kvzap:KVzap",
        kvzip="kvstack.select.kvzip:KVzip",
        lookahead="kvstack.select.lookahead:LookAhead",
        random="kvstack.select.random:Random",
        snapkv="kvstack.select.snapkv:SnapKV",
        streaming="kvstack.select.streaming:Streaming",
        tova="kvstack.select.tova:TOVA",
        triattention="kvstack.select.triattention:TriAttention",
    ),
}
"""kvstack's own: a line here makes a stage or a score known by its name, and its class a name of the package."""

PLUGINS: dict[Family, dict[str, str]] = {
    "stages": {"kvsharer": "kvsharer", "kvtc": "kvtc", "minicache": "minicache", "xkv": "xkv"},
    "scores": {"kvpress": "kvpress-scores"},
}
"""Names that the plugins of this repository add, and the folders of `plugins/` that they are in."""


# ---- names


def stage_names() -> list[str]:
    """Names of all stages, installed plugins included (without loading them)."""
    return _names("stages")


def score_names() -> list[str]:
    """Names of all scores, installed plugins included (without loading them)."""
    return _names("scores")


def _names(family: Family) -> list[str]:
    return sorted({*BUILT_IN[family], *_plugins(family)})


def _plugins(family: Family) -> dict[str, list[EntryPoint]]:
    """The entry points of installed packages, by name: read from their metadata, nothing is imported."""
    by_name: dict[str, list[EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=f"kvstack.{family}"):
        by_name.setdefault(entry.name, []).append(entry)
    return by_name


def shadowed() -> list[str]:
    """A sentence for every plugin that calls its stage or score what kvstack calls one of its own."""
    return [
        f"{_package(entry)} calls a {family[:-1]} {name!r}, which is kvstack's own and stays so. Update or remove it."
        for family in BUILT_IN
        for name, entries in sorted(_plugins(family).items())
        if name in BUILT_IN[family]
        for entry in entries
    ]


# ---- classes


def stage_type(name: str) -> type[Settings]:
    """The class behind a stage's name."""
    return type_of("stages", name)


def score_type(name: str) -> type[Settings]:
    """The class behind a score's name."""
    return type_of("scores", name)


def type_of(family: Family, name: str) -> type[Settings]:
    """Import the class of the stage or the score called `name`.

    Raises:
        SpecError: no package or more than one announces the name, or what it announces cannot be loaded, is made for
            another version of kvstack, or is not a stage or score of that name.
    """
    # a built-in name needs no look into the metadata of all that is installed
    entries = [BUILT_IN[family][name]] if name in BUILT_IN[family] else _plugins(family).get(name, [])
    if not entries and (folder := PLUGINS[family].get(name)):
        raise SpecError(
            f"the {family[:-1]} {name!r} is in a plugin that is not installed. In a clone of kvstack, run: "
            f"pip install -e plugins/{folder}."
        )
    if not entries:
        raise SpecError(f"no {family[:-1]} is called {name!r}. Use one of: {', '.join(_names(family))}.")
    if len(entries) > 1:
        packages = " and ".join(sorted(map(_package, entries)))
        raise SpecError(f"{packages} both have a {family[:-1]} called {name!r}. Remove one of them.")
    return _load(family, entries[0])


def _load(family: Family, entry: EntryPoint) -> type[Settings]:
    from .stage import Score, Stage

    base: type[Settings] = Stage if family == "stages" else Score
    who = f"the plugin {entry.name!r} ({_package(entry)})"
    if (unfit := _unfit(entry)) is not None:
        raise SpecError(f"{who} {unfit}. Update one of them.")
    try:
        loaded = entry.load()
    except KeyboardInterrupt:  # the user's
        raise
    except BaseException as error:  # a plugin may raise anything
        raise SpecError(f"{who} cannot be loaded: {_said(error)}. Update or remove it.") from error
    try:
        fits = isinstance(loaded, type) and issubclass(loaded, base)
        own_name = getattr(loaded, "name", None) if fits else None
    except Exception as error:  # its metaclass, too
        raise SpecError(f"{who} cannot be looked at: {_said(error)}. Update or remove it.") from error
    if not fits:
        raise SpecError(f"{who} is not a kvstack {base.__name__}. Update or remove it.")
    if not isinstance(own_name, str) or own_name != entry.name:
        raise SpecError(f"{who} gives its class the name {own_name!r}. The two must be one word.")
    return loaded


def _said(error: BaseException) -> str:
    """An error as messages quote it; its own words may fail, or be long."""
    try:
        words = " ".join(repr(error).split())
    except (Exception, SystemExit):
        words = type(error).__name__
    return words if len(words) <= 300 else words[:300] + "..."


def _package(entry: EntryPoint) -> str:
    try:
        return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
    except Exception:  # damaged metadata
        return entry.value


def _unfit(entry: EntryPoint) -> str | None:
    """Say for which other kvstack a plugin was made, if its package's requirements do; None if it is this one. pip
    looks at them when the plugin is installed, and not when kvstack is updated under it."""
    from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    from . import __version__

    try:
        requires = (entry.dist.requires if entry.dist else None) or ()
    except Exception:  # damaged metadata
        return None
    for text in requires:
        try:
            requirement = Requirement(text)
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        except (InvalidRequirement, UndefinedComparison, UndefinedEnvironmentName):
            continue
        if canonicalize_name(requirement.name) != "kvstack":
            continue
        if needed and not requirement.specifier.contains(__version__, prereleases=True):
            return f"is made for kvstack {requirement.specifier}, and this is kvstack {__version__}"
    return None
