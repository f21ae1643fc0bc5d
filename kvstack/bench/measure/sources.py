"""Digests of code: two figures can be compared when the code that made them is the same.

A digest covers what a program does and not how it reads: docstrings, comments and formatting make no figure old.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ...stage import Settings

__all__ = ["digest", "kvstack_code", "plugins"]

PACKAGE = Path(__file__).parents[2]
NO_FIGURES = ("cli", "lm_eval", "testing.py", "bench/show", "bench/terminal.py")
"""Parts of kvstack that no figure depends on: commands, tables and pictures, what tests are made with."""


@cache
def kvstack_code() -> str:
    """Digest of the code of kvstack that figures depend on."""
    return digest(PACKAGE, NO_FIGURES)


def plugins(stages: Iterable[Settings]) -> str | None:
    """Digest of the packages outside kvstack that define `stages` and the scores in them; None where there are none."""
    packages = sorted({_package(part) for stage in stages for part in _parts(stage)} - {_package(Settings)})
    return " ".join(f"{name} {_plugin_code(name)}" for name in packages) or None


def digest(place: Path, without: Iterable[str] = ()) -> str:
    """Digest of a module or of all modules in a folder: their code and where they lie, less the paths in `without`."""
    left_out = [place / path for path in without]
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    sha = hashlib.sha256()
    for file in files:
        if not any(file.is_relative_to(path) for path in left_out):
            sha.update(f"{file.relative_to(place.parent).as_posix()} {_code(file)}".encode())
    return sha.hexdigest()[:12]


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        # a string that is a statement does nothing: docstrings of modules, classes, functions and attributes
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def _code(file: Path) -> str:
    return ast.dump(_WithoutDocstrings().visit(ast.parse(file.read_bytes())))


@cache
def _plugin_code(package: str) -> str:
    module = sys.modules[package]  # a class of it is there
    folders = list(getattr(module, "__path__", ()))
    return digest(Path(folders[0] if folders else str(module.__file__)))


def _parts(settings: Settings) -> Iterable[Settings]:
    """A stage, and the scores and other things with settings in it."""
    yield settings
    for value in settings.settings().values():
        if isinstance(value, Settings):
            yield from _parts(value)


def _package(thing: Settings | type[Settings]) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return kind.__module__.partition(".")[0]
