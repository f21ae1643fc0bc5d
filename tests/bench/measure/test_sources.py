"""Digests of code: what makes a figure old, and what does not."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kvstack import Evict, Quant
from kvstack.bench.measure import sources, variants

CODE = '''"""A module."""
import math


class Circle:
    """A circle."""

    radius: float = 1.0
    """In metres."""

    def area(self):
        return math.pi * self.radius**2  # of school
'''


@pytest.fixture
def digest(tmp_path: Path):
    def of(code: str, name: str = "a.py") -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "package"
        folder.mkdir(parents=True)
        (folder / name).write_text(code)
        return sources.digest(folder)

    return of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A module.", "A better module."),
        ("In metres.", "In feet."),
        ('    """A circle."""\n', ""),
        ("# of school", "# as Archimedes has it"),
        ("math.pi * self.radius**2", "(\n            math.pi\n            * self.radius ** 2\n        )"),
    ],
)
def test_words_and_formatting_make_no_figure_old(digest, old, new):
    assert old in CODE
    assert digest(CODE.replace(old, new)) == digest(CODE)


@pytest.mark.parametrize(
    ("old", "new"), [("**2", "**3"), ("1.0", "2.0"), ("area", "size"), ("import math", "import os")]
)
def test_changed_code_does(digest, old, new):
    assert old in CODE
    assert digest(CODE.replace(old, new)) != digest(CODE)


def test_a_module_that_moves_does_too(digest):
    assert digest(CODE, "b.py") != digest(CODE, "a.py")


def test_parts_can_be_left_out(tmp_path):
    (tmp_path / "show").mkdir()
    (tmp_path / "show" / "picture.py").write_text("x = 1")
    (tmp_path / "page.py").write_text("x = 1")
    (tmp_path / "measure.py").write_text("x = 1")

    def digest() -> str:
        return sources.digest(tmp_path, ("show", "page.py"))

    before = digest()
    for name in ("show/picture.py", "page.py"):
        (tmp_path / name).write_text("x = 2")
    assert digest() == before
    (tmp_path / "measure.py").write_text("x = 2")
    assert digest() != before


def test_what_is_left_out_of_kvstack_is_there():
    assert all((sources.PACKAGE / path).exists() for path in sources.NO_FIGURES)


def test_stages_of_kvstack_come_from_no_plugin():
    assert sources.plugins([Quant(4), Evict(0.5, score="knorm")]) is None
    assert variants.parse(["quant:4"])[1].key == {"cache": "quant:4", "plugins": None}


def test_the_code_of_a_plugin_belongs_to_the_stages_that_use_it(tmp_path, monkeypatch):
    file = tmp_path / "plugin_of_this_test.py"
    file.write_text("from kvstack import KNorm\nclass Louder(KNorm):\n    name = 'louder'")
    monkeypatch.syspath_prepend(tmp_path)
    louder = importlib.import_module("plugin_of_this_test").Louder()
    assert sources.plugins([Quant(4), Evict(0.5, score=louder)]) == f"plugin_of_this_test {sources.digest(file)}"
