"""Text to calibrate on, where the user gives none: five kinds, from this package and from Python itself.

What is not here matters as much: the reference manual and argparse, which `kvstack bench` measures on.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

__all__ = ["code", "docstrings", "mixed"]

CODE = ("http.client", "json.decoder", "tarfile", "csv", "heapq", "pathlib", "textwrap", "email.message")
PROSE = ("subprocess", "logging", "datetime", "asyncio.streams", "collections", "functools", "random", "zipfile")


def mixed() -> dict[str, str]:
    """Texts by kind: prose, documentation, code, numbers, chat."""
    return {
        "prose": _packaged("prose.txt"),
        "documentation": docstrings(PROSE),
        "code": "\n\n".join(code(CODE)),
        "chat": _packaged("chat.txt"),
        "numbers": numbers(),
    }


def _packaged(name: str) -> str:
    return resources.files("kvstack").joinpath("data", name).read_text(encoding="utf-8")


def code(modules: tuple[str, ...]) -> Iterator[str]:
    """Sources of modules, found without importing them where they are no part of a package."""
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.has_location:
            yield Path(spec.origin).read_text(encoding="utf-8")


def docstrings(modules: tuple[str, ...]) -> str:
    """All docstrings of some modules."""
    texts = []
    for source in code(modules):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return "\n\n".join(filter(None, texts))


def numbers(seed: int = 0) -> str:
    """Tables, lists, records and sums of random numbers and names."""
    draw = random.Random(seed)
    words = ("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "hazel", "inlet", "jade", "kelp", "lotus")
    parts = []
    for _ in range(24):
        rows = [(draw.choice(words), draw.randrange(10**6), round(draw.uniform(0, 100), 2)) for _ in range(8)]
        parts += [
            "name,count,share\n" + "\n".join(f"{name},{count},{share}" for name, count, share in rows),
            json.dumps([{"id": draw.randrange(10**7), "name": name, "value": count} for name, count, _ in rows[:3]]),
            "\n".join(f"{a} + {b} = {a + b}" for a, b in [(row[1], draw.randrange(999)) for row in rows[:4]]),
            "\n".join(f"- The code of {name} is {count}, its price is ${share}." for name, count, share in rows[:4]),
            " ".join(str(draw.randrange(10 ** draw.randrange(1, 7))) for _ in range(30)),
        ]
    return "\n\n".join(parts)
