"""Importing kvstack, its help and its catalogue stay light: none imports transformers' caches or models.

Transformers' cache module alone imports hqq and torch._dynamo: seconds that a help text does not need.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import kvstack
from kvstack import registry

HEAVY = ("hqq", "torch._dynamo", "transformers.cache_utils", "transformers.modeling_utils", "transformers.models")
LIGHT = [
    "import kvstack",
    "from kvstack.cli.commands import app; app(['--help'], standalone_mode=False)",
    "from kvstack.cli.commands import app; app(['bench', '--help'], standalone_mode=False)",
    "from kvstack.cli.commands import app; app(['stages'], standalone_mode=False)",
    "import kvstack.calibration.calibrate, kvstack.calibration.sensitivity, kvstack.transform.commonkv",
]


def imported_by(code: str) -> list[str]:
    """The modules that a fresh Python holds after `code`."""
    code += "\nimport sys; print(*sorted(sys.modules), sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.split()


def among(modules: list[str], packages: tuple[str, ...]) -> list[str]:
    return [module for module in modules if any(f"{module}.".startswith(f"{package}.") for package in packages)]


@pytest.mark.parametrize("code", LIGHT)
def test_nothing_heavy_is_imported(code):
    assert not among(imported_by(code), HEAVY)


@pytest.mark.parametrize("code", LIGHT[:3])
def test_torch_waits_until_it_is_needed(code):
    assert not among(imported_by(code), ("torch", "transformers", "numpy"))


# ---- the names of the package


@pytest.mark.parametrize("name", kvstack.__all__)
def test_every_public_name_is_there_and_kept(name):
    value = getattr(kvstack, name)
    assert vars(kvstack)[name] is value
    assert name in dir(kvstack)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"^module 'kvstack' has no attribute 'Quantum'$"):
        kvstack.Quantum  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Quantum'"):
        exec("from kvstack import Quantum")


@pytest.mark.parametrize("name", ["errors", "registry", "spec", "stage", "types"])
def test_modules_that_need_no_import_of_their_own(name):
    assert getattr(kvstack, name) is importlib.import_module(f"kvstack.{name}")


def typed() -> dict[str, str]:
    """Public name -> its module, as type checkers read it in `kvstack/__init__.py`."""
    tree = ast.parse(inspect.getsource(kvstack))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {name.name: f"kvstack.{node.module}" for node in imports for name in node.names}


def test_what_type_checkers_read_is_what_is_there():
    assert {*typed(), "__version__"} == set(kvstack.__all__)
    for name, module in typed().items():
        assert getattr(kvstack, name) is getattr(importlib.import_module(module), name)


def test_every_built_in_stage_and_score_is_public():
    classes = {entry.attr: entry.module for family in registry.BUILT_IN.values() for entry in family.values()}
    assert classes.items() <= typed().items()
