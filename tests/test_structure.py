"""The structure of the package, read from its sources: which module imports which, and what must not be known where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvstack"

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "data" not in path.parts
}

UNKNOWN = {
    "kvstack.select": ("store", "transform", "encode", "binding", "batch", "attend", "cache", "disk"),
    "kvstack.encode": ("store", "transform", "select", "model", "calibration", "binding", "batch", "attend", "cache"),
    "kvstack.transform": ("store", "select", "binding", "batch", "attend", "cache", "disk"),
    "kvstack.calibration": ("store", "select", "transform", "binding", "batch", "attend", "cache", "disk", "encode"),
    "kvstack.model": ("store", "select", "transform", "encode", "stage", "calibration", "binding", "batch", "cache"),
    "kvstack.store": ("transform", "model", "calibration", "binding", "batch", "attend", "cache", "disk"),
    "kvstack.bench.measure": ("bench.show", "cli"),
    "kvstack.bench.show": ("bench.measure", "bench.peers", "bench.tasks", "cache", "cli"),
    "kvstack.bench.tasks": ("bench.measure", "bench.show", "bench.peers", "cache"),
}
"""What the modules of a folder must not import."""


def imports(name: str) -> set[str]:
    """The modules of the package that `name` imports, inside functions too, but not for type checkers alone."""
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # a name may be a module, or stand in one
            targets |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {target for target in targets if target in MODULES and target != name}


GRAPH = {name: imports(name) for name in MODULES}


def reachable(name: str) -> set[str]:
    seen: set[str] = set()
    left = [name]
    while left:
        for target in GRAPH[left.pop()] - seen:
            seen.add(target)
            left.append(target)
    return seen


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_itself_by_any_way(name):
    assert name not in reachable(name)


@pytest.mark.parametrize("folder", UNKNOWN)
def test_a_folder_knows_only_what_it_may(folder):
    forbidden = tuple(f"kvstack.{what}" for what in UNKNOWN[folder])
    known = {
        (name, target)
        for name in MODULES
        if f"{name}.".startswith(f"{folder}.")
        for target in GRAPH[name]
        if f"{target}.".startswith(tuple(f"{what}." for what in forbidden))
    }
    assert not known


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_every_folder_says_what_it_is(name):
    assert (ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or "").strip()


@pytest.mark.parametrize("name", MODULES)
def test_settings_are_set_when_they_are_made(name):
    """Frozen things are changed in `__post_init__` alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    allowed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
        for inner in ast.walk(node)
    }
    changed = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "__setattr__"
        and isinstance(node.value, ast.Name)
        and node.value.id == "object"
        and id(node) not in allowed
    ]
    assert not changed
