"""The grammar of specs: stages as strings and as dicts, and back.

    quant:2+evict:0.2                         stages joined by +, arguments behind a colon
    evict:0.2,score=snapkv(window=32)         keyword arguments; a score may have arguments of its own

`kvstack.registry` knows which class a name stands for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import registry
from .errors import SpecError, StageError
from .registry import Family
from .stage import Score, Settings, Stage

__all__ = ["SETTINGS", "from_dict", "make_score", "parse", "to_dict", "to_spec"]

SETTINGS = ("sinks", "window", "block", "fused")
"""Settings of a stack that its dict holds beside the stages."""
WRITABLE = (bool, int, float, str, tuple, list, type(None))
"""Types that a setting can have to be written down."""


# ---- reading


def parse(spec: str | Mapping[str, Any]) -> tuple[list[Stage], dict[str, Any]]:
    """Read stages and the stack's other settings from a spec string or the dict of `KVStack.to_dict`.

    Raises:
        SpecError: it cannot be read, a stage or score is not known, or one has no such setting.
    """
    if isinstance(spec, str):
        return ([_stage(part, spec) for part in _split(spec)] if spec.strip() else []), {}
    if not isinstance(spec, Mapping) or "stages" not in spec:
        raise SpecError(f"{spec!r} is no spec. Give a string such as 'quant:2+evict:0.2' or the dict of to_dict().")
    unknown = set(spec) - {"stages", *SETTINGS}
    if unknown:
        raise SpecError(f"a stack has no setting {', '.join(sorted(unknown))}. It has: {', '.join(SETTINGS)}.")
    stages = [_checked(from_dict(stage, "stages"), spec) for stage in spec["stages"]]
    return stages, {name: spec[name] for name in SETTINGS if name in spec}


def make_score(text: str) -> Score:
    """Build the score that a name such as `snapkv` or a call such as `snapkv(window=32)` describes."""
    score: Score = _value(_expression(text, text), "scores", text)
    if isinstance(score, str):
        score = _build("scores", score, (), {})
    return score


def from_dict(data: Any, family: Family) -> Any:
    """Build the stage or the score that `to_dict` described."""
    if not isinstance(data, Mapping) or "name" not in data:
        raise SpecError(f"{data!r} describes no {family[:-1]}: it needs a name and its settings.")
    settings = {k: from_dict(v, "scores") if isinstance(v, Mapping) else v for k, v in data.items() if k != "name"}
    return _build(family, data["name"], (), settings)


def _build(family: Family, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    kind = registry.type_of(family, name)
    try:
        return kind(*args, **kwargs)
    except TypeError as error:
        raise SpecError(f"{name!r} cannot be built with {_call(args, kwargs)}: {error}.") from None


def _call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return f"({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


# ---- the grammar of strings


def _expression(text: str, whole: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise SpecError(f"{whole!r} is no spec: {text!r} cannot be read. Write 'quant:2+evict:0.2'.") from None


def _value(node: ast.expr, family: Family, whole: str) -> Any:
    """A literal, a bare word as a string, or `name(...)` as the thing it builds."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _build(family, node.func.id, *_arguments(node, whole))
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):  # 512/768: a pair; three or more as well
        left, right = _value(node.left, family, whole), _value(node.right, family, whole)
        return (*left, right) if isinstance(left, tuple) else (left, right)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise SpecError(
            f"{whole!r} is no spec: {ast.unparse(node)!r} is neither a number nor a word. A path is quoted: 'out/file'."
        ) from None


def _arguments(call: ast.Call, whole: str) -> tuple[list[Any], dict[str, Any]]:
    args = [_value(arg, "scores", whole) for arg in call.args]
    return args, {k.arg: _value(k.value, "scores", whole) for k in call.keywords if k.arg}


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
    return _checked(_build("stages", name, *_arguments(node, whole)), whole)


def _checked(stage: Any, whole: object) -> Stage:
    if not isinstance(stage, Stage):
        raise SpecError(f"{whole!r} is no spec: {stage!r} is not a stage.")
    return stage


# ---- writing


def to_spec(stages: Sequence[Stage]) -> str:
    """Write the spec string of some stages."""
    parts = []
    for stage in stages:
        to_dict(stage)  # says what cannot be written down
        settings = ",".join(f"{k}={_text(v)}" for k, v in stage.settings().items())
        parts.append(f"{stage.name}:{settings}" if settings else stage.name)
    return "+".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, Settings):
        inner = ",".join(f"{k}={_text(v)}" for k, v in value.settings().items())
        return f"{value.name}({inner})" if inner else value.name
    if isinstance(value, tuple) and len(value) > 1:
        return "/".join(map(_text, value))
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def to_dict(thing: Settings) -> dict[str, Any]:
    """Describe a stage or score as plain data: its name and settings, nested scores included.

    Raises:
        StageError: it is no kvstack stage or score, or a setting is of a type that cannot be written down.
    """
    if not isinstance(thing, Settings):
        raise StageError(f"{thing!r} is not a kvstack Score, so it has no name to be stored under. Subclass Score.")
    settings = thing.settings()
    for name, value in settings.items():
        if not (isinstance(value, WRITABLE) or hasattr(value, "score")):
            what = type(value).__name__
            raise StageError(f"{thing!r}: {name} is a {what}, which cannot be written down. Save it and give its path.")
    return {"name": thing.name, **{k: to_dict(v) if hasattr(v, "score") else v for k, v in settings.items()}}
