"""The grammar of specs: stages as strings and as dicts, and back.

    quant:2+evict:0.2                         stages joined by +, arguments behind a colon
    evict:0.2,score=snapkv(window=32)         keyword arguments; a score may have arguments of its own
    quant:2@window=16,fused=False             settings of the stack behind an @

`kvstack.registry` knows which class a name stands for.
"""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from . import registry
from .errors import SpecError, StageError
from .registry import Family
from .stage import Score, Settings, Stage

__all__ = ["SETTINGS", "check_types", "from_dict", "make_score", "parse", "to_dict", "to_spec"]

SETTINGS: Mapping[str, tuple[Any, str]] = {
    "sinks": (int, "a number of tokens"),
    "window": (int | None, "a number of tokens, or None"),
    "block": (int, "a number of tokens"),
    "device": (str | None, "the name of a device, such as 'cpu'"),
    "fused": (bool, "True or False"),
}
"""Settings of a stack that its dict holds next to the stages: their types, in words too."""
WRITABLE = (bool, int, float, str, tuple, list, type(None))
"""Types that a setting can have to be written down."""
LONGEST = 10_000
"""Characters of a spec that are read: a longer one is not a stack, and nesting that deep would exhaust the parser."""


# ---- reading


def parse(spec: str | Mapping[str, Any]) -> tuple[list[Stage], dict[str, Any]]:
    """Read stages and the stack's other settings from a spec string or the dict of `KVStack.to_dict`.

    Raises:
        SpecError: it cannot be read, a stage or score is not known, or one has no such setting.
    """
    with _only_spec_errors(spec):
        if isinstance(spec, str):
            if len(spec) > LONGEST:
                raise SpecError(f"{spec[:40]!r}... is not a valid spec: {len(spec)} characters. Use {LONGEST} at most.")
            pipeline, *behind = _cut(spec, "@")
            settings = _settings(behind, spec)
            return ([_stage(part, spec) for part in _cut(pipeline, "+")] if pipeline.strip() else []), settings
        if isinstance(spec, list | tuple) and spec and all(isinstance(part, str) for part in spec):
            raise SpecError(f"{spec!r} is not a valid spec: it is a list. Give one string: {'+'.join(spec)!r}.")
        if not isinstance(spec, Mapping) or "stages" not in spec:
            raise SpecError(
                f"{spec!r} is not a valid spec. Give a string such as 'quant:2+evict:0.2' or the dict of to_dict()."
            )
        if not isinstance(spec["stages"], list | tuple):
            raise SpecError(f"stages={spec['stages']!r} is not a list of stages. Give the dict of to_dict().")
        settings = {name: value for name, value in spec.items() if name != "stages"}
        stages = [_checked(from_dict(stage, "stages"), spec) for stage in spec["stages"]]
        return stages, _known(settings, spec)


def _settings(behind: Sequence[str], spec: str) -> dict[str, Any]:
    """The stack's own settings, from the text `behind` each @ of a spec string."""
    if not behind:
        return {}
    if len(behind) > 1:
        raise SpecError(f"{spec!r} is not a valid spec: it has more than one @. Write 'quant:2@window=16,block=64'.")
    args, settings = _arguments(_call_of(behind[0], spec), spec)
    if args:
        raise SpecError(f"{spec!r} is not a valid spec: settings after the @ need names. Write '@window=16,block=64'.")
    return _known(settings, spec)


def _known(settings: Mapping[Any, Any], spec: object) -> dict[str, Any]:
    """The settings of a stack, checked."""
    if unknown := sorted(str(name) for name in settings if name not in SETTINGS):
        which = f"{spec!r}: a stack" if isinstance(spec, str) else "a stack"
        raise SpecError(f"{which} has no setting {', '.join(unknown)}. It has: {', '.join(SETTINGS)}.")
    for name, value in settings.items():
        wanted, what = SETTINGS[name]
        if not _fits(value, wanted):
            raise SpecError(f"{spec!r}: {name}={value!r}, and {name} is {what}.")
    return dict(settings)


@contextmanager
def _only_spec_errors(spec: object) -> Iterator[None]:
    """Text from anywhere may be too deep for the parser, or make a setting raise anything: one error says so."""
    try:
        yield
    except (SpecError, StageError):
        raise
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError, AttributeError, LookupError) as error:
        try:
            shown = f"{spec!r}"
        except (ValueError, RecursionError):  # integers of thousands of digits cannot be shown
            shown = "the spec"
        reason = str(error) or type(error).__name__
        raise SpecError(f"{shown[:200]} is not a valid spec: {reason[:200]}. Write 'quant:2+evict:0.2'.") from None


def make_score(text: str) -> Score:
    """Build the score that a name such as `snapkv` or a call such as `snapkv(window=32)` describes."""
    with _only_spec_errors(text):
        score: Score = _value(_expression(text, text), "scores", text)
        if isinstance(score, str):
            score = _build("scores", score, (), {})
        return score


def from_dict(data: Any, family: Family) -> Any:
    """Build the stage or the score that `to_dict` described."""
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise SpecError(f"{data!r} describes no {family[:-1]}: it needs a name and its settings.")
    settings = {k: from_dict(v, "scores") if isinstance(v, Mapping) else v for k, v in data.items() if k != "name"}
    return _build(family, data["name"], (), settings)


def _build(family: Family, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    kind = registry.type_of(family, name)
    try:
        built = kind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, SpecError | StageError):
            raise
        # Python's words for wrong arguments name what the user never wrote
        why = f". Its settings: {_settings_of(kind)}" if isinstance(error, TypeError) else f": {error}"
        raise SpecError(f"{name!r} cannot be built with {_call(args, kwargs)}{why}.") from None
    check_types(built)
    return built


def _settings_of(kind: type[Settings]) -> str:
    """Names of the settings, those first that must be given."""
    own: list[Field[Any]] = [field for field in fields(kind) if field.init] if is_dataclass(kind) else []
    needed = [field.name for field in own if field.default is MISSING and field.default_factory is MISSING]
    names = [field.name + " (needed)" * (field.name in needed) for field in own]
    example = EXAMPLES.get(kind.name)
    return (", ".join(names) or "none") + (f". Write {example!r}" if example else "")


EXAMPLES = {"quant": "quant:4,group=32", "evict": "evict:0.2,score=tova", "commonkv": "commonkv:0.5", "tiers": "tiers"}
"""Of the stages that come with kvstack."""


def check_types(thing: Any) -> None:
    """A spec or a dict may say anything: refuse settings of another type than the stage declares."""
    if not is_dataclass(thing):
        return
    try:
        hints = get_type_hints(type(thing))
    except (NameError, TypeError):  # a plugin may name types that are imported for type checkers alone
        return
    for field in fields(thing):
        value = getattr(thing, field.name)
        if field.init and field.name in hints and not _fits(value, hints[field.name]):
            raise SpecError(
                f"{thing!r}: {field.name}={value!r} is a {type(value).__name__}, and "
                f"{str(field.type).replace('typing.', '')} is needed."
            )


def _fits(value: Any, hint: Any) -> bool:
    """Return True if `value` is of the type `hint`. Whole numbers are floats too, truth values are not numbers."""
    if hint is Any:
        return True
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin is tuple and isinstance(value, tuple | list):
        each = args[:1] * len(value) if args[-1:] == (...,) else args
        return len(each) == len(value) and all(_fits(x, one) for x, one in zip(value, each, strict=True))
    number = not isinstance(value, bool) or hint not in (int, float)
    kind = {None: type(None), float: (int, float)}.get(hint, origin or hint)
    return number and (not isinstance(kind, type | tuple) or isinstance(value, kind))


def _call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return f"({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


# ---- the grammar of strings


def _expression(text: str, whole: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise SpecError(f"{whole!r} is not a valid spec: {text!r} cannot be read. Write 'quant:2+evict:0.2'.") from None


def _call_of(arguments: str, whole: str) -> ast.Call:
    """The arguments of a stage, as the call that they stand in: all of the text, and nothing behind it."""
    text = f"f({arguments})"
    try:
        node: ast.expr | None = _expression(text, whole)
    except SpecError:  # it would quote the call that is not the user's
        node = None
    complete = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if node is None or not complete or ast.get_source_segment(text, node) != text:
        raise SpecError(
            f"{whole!r} is not a valid spec: {arguments!r} are no settings. Write a share as a number, a comma between "
            "settings and + between stages: 'evict:0.2,score=tova+quant:2'."
        )
    assert isinstance(node, ast.Call)
    return node


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
            f"{whole!r} is not a valid spec: {ast.unparse(node)!r} is not a number and not a word. Quote a path: "
            "'out/file'."
        ) from None


def _arguments(call: ast.Call, whole: str) -> tuple[list[Any], dict[str, Any]]:
    names = [keyword.arg for keyword in call.keywords]
    if None in names:
        raise SpecError(f"{whole!r} is not a valid spec: ** has no place in it. Name every setting.")
    if twice := {name for name in names if names.count(name) > 1}:
        names_twice = ", ".join(sorted(map(str, twice)))
        raise SpecError(f"{whole!r} is not a valid spec: {names_twice} is given twice. Give it once.")
    args = [_value(arg, "scores", whole) for arg in call.args]
    return args, {k.arg: _value(k.value, "scores", whole) for k in call.keywords if k.arg}


def _cut(text: str, at: str) -> list[str]:
    """Cut at every `at` outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote or char in "'\"":
            quote = "" if char == quote else quote or char
        else:
            depth += (char in "([") - (char in ")]")
        if char == at and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _stage(text: str, whole: str) -> Stage:
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?::(.*)|\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise SpecError(f"{whole!r} is not a valid spec: {text!r} is not a stage. Write 'quant:2+evict:0.2'.")
    name = match[1].lower()
    call = _call_of(match[2] or match[3] or "", whole)
    return _checked(_build("stages", name, *_arguments(call, whole)), whole)


def _checked(stage: Any, whole: object) -> Stage:
    if not isinstance(stage, Stage):
        raise SpecError(f"{whole!r} is not a valid spec: {stage!r} is not a stage.")
    return stage


# ---- writing


def to_spec(stages: Sequence[Stage], settings: Mapping[str, Any] | None = None) -> str:
    """Write the spec string of some stages, and of the stack's own `settings`."""
    parts = []
    for stage in stages:
        to_dict(stage)  # says what cannot be written down
        written = ",".join(f"{k}={_text(v)}" for k, v in stage.settings().items())
        parts.append(f"{stage.name}:{written}" if written else stage.name)
    behind = ",".join(f"{name}={value!r}" for name, value in (settings or {}).items())
    return "+".join(parts) + (f"@{behind}" if behind else "")


def _text(value: Any) -> str:
    if isinstance(value, Settings):
        inner = ",".join(f"{k}={_text(v)}" for k, v in value.settings().items())
        return f"{value.name}({inner})" if inner else value.name
    if isinstance(value, tuple) and len(value) > 1:
        return "/".join(map(_text, value))
    if isinstance(value, float):
        return repr(value).replace("e+", "e")  # a + begins the next stage
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def to_dict(thing: Settings) -> dict[str, Any]:
    """Describe a stage or score as plain data: its name and settings, nested scores included.

    Raises:
        StageError: it is not a stage or score of kvstack, or a setting is of a type that cannot be written down.
    """
    if not isinstance(thing, Settings):
        raise StageError(f"{thing!r} is not a kvstack Score, so it has no name to be stored under. Subclass Score.")
    settings = thing.settings()
    for name, value in settings.items():
        if not (isinstance(value, WRITABLE) or hasattr(value, "score")):
            what = type(value).__name__
            raise StageError(f"{thing!r}: {name} is a {what}, which cannot be written down. Save it and give its path.")
    return {"name": thing.name, **{k: to_dict(v) if hasattr(v, "score") else v for k, v in settings.items()}}
