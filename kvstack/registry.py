"""Names of stages and scores, and the spec strings and dicts made of them.

    quant:2+evict:0.2                         stages joined by +, arguments behind a colon
    evict:0.2,score=snapkv(window=32)         keyword arguments; a score may have arguments of its own

Stages outside kvstack are found by the entry-point groups `kvstack.stages` and `kvstack.scores`. A plugin is
loaded when its name is asked for, not before, so a broken one disturbs nobody who does not use it. No plugin can take
a built-in name, and none of two that claim one name is preferred.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from .errors import SpecError, StageError
from .stage import Score, Settings, Stage

__all__ = [
    "make_score",
    "parse",
    "score_names",
    "score_type",
    "shadowed",
    "stage_names",
    "stage_type",
    "to_dict",
    "to_spec",
]

Group = Literal["stages", "scores"]

BUILT_IN: dict[Group, dict[str, str]] = {
    "stages": {
        "commonkv": "kvstack.transform:CommonKV",
        "evict": "kvstack.select:Evict",
        "quant": "kvstack.encode:Quant",
    },
    "scores": {
        "expected": "kvstack.select:ExpectedAttention",
        "h2o": "kvstack.select:H2O",
        "keydiff": "kvstack.select:KeyDiff",
        "knorm": "kvstack.select:KNorm",
        "random": "kvstack.select:Random",
        "snapkv": "kvstack.select:SnapKV",
        "streaming": "kvstack.select:Streaming",
        "tova": "kvstack.select:TOVA",
    },
}
PLAIN = (bool, int, float, str, tuple, list, type(None))
"""What a setting can be to be written down."""
SETTINGS = ("sinks", "window", "block", "fused")


# ---- names


def _plugins(group: Group) -> dict[str, list[EntryPoint]]:
    """What installed packages announce, by name: read from their metadata, nothing is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=f"kvstack.{group}"):
        found.setdefault(entry.name, []).append(entry)
    return found


def _names(group: Group) -> list[str]:
    return sorted({*BUILT_IN[group], *_plugins(group)})


def stage_names() -> list[str]:
    """Names of all stages, installed plugins included (without loading them)."""
    return _names("stages")


def score_names() -> list[str]:
    """Names of all scores, installed plugins included (without loading them)."""
    return _names("scores")


def shadowed() -> list[str]:
    """A sentence for every plugin that calls its stage or score what kvstack calls one of its own."""
    return [
        f"{_package(entry)} calls a {group[:-1]} {name!r}, which is kvstack's own and stays so. Update or remove it."
        for group in BUILT_IN
        for name, entries in sorted(_plugins(group).items())
        if name in BUILT_IN[group]
        for entry in entries
    ]


def _find(group: Group, name: str) -> type[Settings]:
    if name in BUILT_IN[group]:
        module, _, attribute = BUILT_IN[group][name].partition(":")
        built_in: type[Settings] = getattr(importlib.import_module(module), attribute)
        return built_in
    entries = _plugins(group).get(name, [])
    if not entries:
        raise SpecError(f"no {group[:-1]} is called {name!r}. Use one of: {', '.join(_names(group))}.")
    if len(entries) > 1:
        packages = " and ".join(sorted(map(_package, entries)))
        raise SpecError(f"{packages} both have a {group[:-1]} called {name!r}. Remove one of them.")
    return _load(group, entries[0])


def _load(group: Group, plugin: EntryPoint) -> type[Settings]:
    base: type[Settings] = Stage if group == "stages" else Score
    who = f"the plugin {plugin.name!r} ({_package(plugin)})"
    if (unfit := _unfit(plugin)) is not None:
        raise SpecError(f"{who} {unfit}. Update one of them.")
    try:
        found = plugin.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises
        raise SpecError(f"{who} cannot be loaded: {error!r}. Update or remove it.") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecError(f"{who} is not a kvstack {base.__name__}. Update or remove it.")
    if getattr(found, "name", None) != plugin.name:
        own = getattr(found, "name", None)
        raise SpecError(f"{who} gives its class the name {own!r}. The two must be one word.")
    return found


def _package(plugin: EntryPoint) -> str:
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else plugin.value


def _unfit(plugin: EntryPoint) -> str | None:
    """For which other kvstack a plugin was made, as its package's requirements say; None where it is this one. pip
    looks at them when the plugin is installed, and not when kvstack is updated under it."""
    from . import __version__

    for text in (plugin.dist.requires if plugin.dist else None) or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if canonicalize_name(requirement.name) != "kvstack":
            continue
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and not requirement.specifier.contains(__version__, prereleases=True):
            return f"is made for kvstack {requirement.specifier}, and this is kvstack {__version__}"
    return None


def stage_type(name: str) -> type[Settings]:
    """The class behind a stage's name."""
    return _find("stages", name)


def score_type(name: str) -> type[Settings]:
    """The class behind a score's name."""
    return _find("scores", name)


def _build(group: Group, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    kind = _find(group, name)
    try:
        return kind(*args, **kwargs)
    except TypeError as error:
        raise SpecError(f"{name!r} cannot be built with {_call(args, kwargs)}: {error}.") from None


def _call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return f"({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def make_score(text: str) -> Score:
    """The score that a name such as `snapkv` or a call such as `snapkv(window=32)` describes."""
    score: Score = _value(_expression(text, text), "scores", text)
    if isinstance(score, str):
        score = _build("scores", score, (), {})
    return score


# ---- strings


def _expression(text: str, whole: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise SpecError(f"{whole!r} is no spec: {text!r} cannot be read. Write 'quant:2+evict:0.2'.") from None


def _value(node: ast.expr, group: Group, whole: str) -> Any:
    """A literal, a bare word as a string, or `name(...)` as the thing it builds."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        args = [_value(arg, "scores", whole) for arg in node.args]
        kwargs = {k.arg: _value(k.value, "scores", whole) for k in node.keywords if k.arg}
        return _build(group, node.func.id, args, kwargs)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):  # 512/768: a pair; three or more as well
        left, right = _value(node.left, group, whole), _value(node.right, group, whole)
        return (*left, right) if isinstance(left, tuple) else (left, right)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise SpecError(
            f"{whole!r} is no spec: {ast.unparse(node)!r} is neither a number nor a word. A path is quoted: 'out/file'."
        ) from None


def _split(text: str) -> list[str]:
    """Cut at every + outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote or char in "'\"":
            quote = "" if char == quote else quote or char
        else:
            depth += (char in "([") - (char in ")]")
        if char == "+" and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _stage(text: str, whole: str) -> Stage:
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?::(.*)|\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise SpecError(f"{whole!r} is no spec: {text!r} is not a stage. Write 'quant:2+evict:0.2'.")
    name = match[1].lower()
    node = _expression(f"f({match[2] or match[3] or ''})", whole)
    assert isinstance(node, ast.Call)
    args = [_value(arg, "scores", whole) for arg in node.args]
    kwargs = {k.arg: _value(k.value, "scores", whole) for k in node.keywords if k.arg}
    return _checked(_build("stages", name, args, kwargs), whole)


def _checked(stage: Any, whole: object) -> Stage:
    if not isinstance(stage, Stage):
        raise SpecError(f"{whole!r} is no spec: {stage!r} is not a stage.")
    return stage


def parse(spec: str | Mapping[str, Any]) -> tuple[list[Stage], dict[str, Any]]:
    """Stages and the stack's other settings from a spec string or the dict of `KVStack.to_dict`."""
    if isinstance(spec, str):
        return ([_stage(part, spec) for part in _split(spec)] if spec.strip() else []), {}
    if not isinstance(spec, Mapping) or "stages" not in spec:
        raise SpecError(f"{spec!r} is no spec. Give a string such as 'quant:2+evict:0.2' or the dict of to_dict().")
    unknown = set(spec) - {"stages", *SETTINGS}
    if unknown:
        raise SpecError(f"a stack has no setting {', '.join(sorted(unknown))}. It has: {', '.join(SETTINGS)}.")
    stages = [_checked(from_dict(stage, "stages"), spec) for stage in spec["stages"]]
    return stages, {name: spec[name] for name in SETTINGS if name in spec}


def from_dict(data: Any, group: Group) -> Any:
    if not isinstance(data, Mapping) or "name" not in data:
        raise SpecError(f"{data!r} describes no {group[:-1]}: it needs a name and its settings.")
    settings = {k: from_dict(v, "scores") if isinstance(v, Mapping) else v for k, v in data.items() if k != "name"}
    return _build(group, data["name"], (), settings)


def to_dict(thing: Settings) -> dict[str, Any]:
    """Name and settings as plain data, nested things included."""
    if not isinstance(thing, Settings):
        raise StageError(f"{thing!r} is not a kvstack Score, so it has no name to be stored under. Subclass Score.")
    settings = thing.settings()
    for name, value in settings.items():
        if not (isinstance(value, PLAIN) or hasattr(value, "score")):
            what = type(value).__name__
            raise StageError(f"{thing!r}: {name} is a {what}, which cannot be written down. Save it and give its path.")
    return {"name": thing.name, **{k: to_dict(v) if hasattr(v, "score") else v for k, v in settings.items()}}


def _text(value: Any) -> str:
    if isinstance(value, Settings):
        inner = ",".join(f"{k}={_text(v)}" for k, v in value.settings().items())
        return f"{value.name}({inner})" if inner else value.name
    if isinstance(value, tuple) and len(value) > 1:
        return "/".join(map(_text, value))
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def to_spec(stages: Sequence[Stage]) -> str:
    """The spec string of some stages."""
    parts = []
    for stage in stages:
        to_dict(stage)  # says what cannot be written down
        settings = ",".join(f"{k}={_text(v)}" for k, v in stage.settings().items())
        parts.append(f"{stage.name}:{settings}" if settings else stage.name)
    return "+".join(parts)
