"""What authors of stages import: kvstack's public names and `kvstack.authoring`, nothing of its inside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest

import kvstack
from kvstack import authoring

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / "kvstack" / "data" / "plugin").glob("*.py.jinja"))
MODULES = sorted(path for path in ROOT.glob("plugins/*/**/*.py") if "build" not in path.parts)
PUBLIC = {"kvstack", "kvstack.authoring"}
INTEGRATIONS = ("lmcache",)
"""Plugins that are no stages: they use codecs and benchmarks of kvstack from the inside, and go with its version."""
IN_TESTS = PUBLIC | {"kvstack.cli.commands", "kvstack.testing"}


def source(path: Path) -> str:
    text = path.read_text()
    names = {"cls": "Stage", "name": "stage", "module": "module", "what": "a stage", "package": "package"}
    return jinja2.Template(text).render(**names) if path.suffix == ".jinja" else text


def imports(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Module and names of every import from kvstack, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names if alias.name.partition(".")[0] == "kvstack")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kvstack" and not node.level:
            yield node.module or "", tuple(alias.name for alias in node.names)


def loaded_at_once(tree: ast.Module) -> Iterator[str]:
    """Modules that are imported with this one: not in functions, and not for types alone."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize(
    "path",
    [*(path for path in MODULES if path.relative_to(ROOT / "plugins").parts[0] not in INTEGRATIONS), *TEMPLATES],
    ids=lambda path: path.name,
)
def test_a_plugin_knows_nothing_of_the_inside(path):
    is_test = path.name.startswith("test_")
    for module, names in imports(ast.parse(source(path))):
        assert module in (IN_TESTS if is_test else PUBLIC), (
            f"{path.name} imports from {module}, which is no place for it"
        )
        if module == "kvstack":
            public = {*kvstack.__all__, *(["registry"] if is_test else [])}
            assert set(names) <= public, f"{path.name} imports {set(names) - public}, which kvstack does not offer"
        if module == "kvstack.authoring":
            assert set(names) <= set(authoring.__all__), (
                f"kvstack.authoring has no {set(names) - set(authoring.__all__)}"
            )


@pytest.mark.parametrize(
    "path", [path for path in MODULES if not path.name.startswith("test_")], ids=lambda path: path.name
)
def test_a_plugin_loads_transformers_when_it_needs_it(path):
    assert not [name for name in loaded_at_once(ast.parse(source(path))) if name.partition(".")[0] == "transformers"]


def test_the_walk_finds_what_there_is():
    names = [path.name for path in (*MODULES, *TEMPLATES)]
    assert {"strategy.py", "factors.py", "kvstack_kvtc.py", "test_xkv.py", "transform.py.jinja"} <= set(names)
    tree = ast.parse("import kvstack.store\ndef f():\n    from kvstack.model.rope import Rope\nimport kvstacker")
    assert list(imports(tree)) == [("kvstack.store", ()), ("kvstack.model.rope", ("Rope",))]


def test_all_that_is_offered_is_there():
    assert [name for name in authoring.__all__ if not hasattr(authoring, name)] == []
    assert len(set(authoring.__all__)) == len(authoring.__all__)
