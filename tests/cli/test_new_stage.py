"""`kvstack new-stage`: the folder it writes installs, is found, and passes its own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstack.cli.commands import app
from kvstack.cli.new_stage import write

ROOT = Path(__file__).parents[2]
KINDS = ["transform", "encode", "score"]


def new_stage(*arguments: str):
    return CliRunner().invoke(app, ["new-stage", *arguments])


def install(folder: Path, site: Path) -> None:
    """What pip leaves on the path for `folder`: its metadata. Its module is put on the path as it is."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    required = "".join(f"Requires-Dist: {text}\n" for text in project["dependencies"])
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head + required)
    groups = ((group, names.items()) for group, names in project["entry-points"].items())
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in names) for group, names in groups)
    )


def test_what_is_written_is_installed_found_and_passes_its_tests(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    folders = []
    for kind in KINDS:
        folder = tmp_path / f"my_{kind}"
        done = new_stage(f"my_{kind}", "--kind", kind, "--out", str(folder))
        assert done.exit_code == 0, done.output
        assert done.stdout.endswith(f"Next: pip install -e '{folder}[test]' && pytest {folder}\n")
        install(folder, site)
        folders.append(str(folder))
    path = os.pathsep.join([str(ROOT), str(site), *folders])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pytest", "-q", "-p", "no:cacheprovider", *folders]
    tests = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout
    assert re.search(r"^11 passed", tests.stdout, re.MULTILINE), tests.stdout


def test_the_folder_has_a_usual_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_stage("my_stage", "--kind", "encode").exit_code == 0
    files = {path.as_posix() for path in Path("kvstack-my-stage").rglob("*") if path.is_file()}
    names = ["README.md", "pyproject.toml", "kvstack_my_stage.py", "tests/test_my_stage.py"]
    assert files == {f"kvstack-my-stage/{name}" for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_no_mark_of_a_template_is_left_and_lines_are_short(kind, tmp_path):
    folder = write("abcdefgh", kind, tmp_path / "new")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = path.read_text()
        assert "{%" not in text
        assert "cls" not in text
        assert max(map(len, text.splitlines())) <= 120, path
        assert text.endswith("\n")
        assert not text.endswith("\n\n")


REFUSED = [
    ("My-Stage", "'My-Stage' cannot be a stage's name: it is written in specs. Use a word such as 'my_stage'."),
    ("2bits", "cannot be a stage's name"),
    ("../up", "cannot be a stage's name"),
    ("lambda", "cannot be a stage's name"),
    ("none", "cannot be a stage's name"),
    ("true", "cannot be a stage's name"),
    ("quant", "there is a stage called 'quant' already. `kvstack stages` lists them; use another."),
    ("snapkv", "there is a score called 'snapkv' already."),
    ("encode", "'encode' would make a class Encode, a word of kvstack's own. Use another."),
    ("tensor", "would make a class Tensor"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED, ids=[name for name, _ in REFUSED])
def test_refused_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = new_stage(name, "--kind", "encode")
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "kept").write_text("mine")
    done = new_stage("fresh", "--kind", "score", "--out", str(tmp_path))
    assert done.exit_code == 2
    assert f"{str(tmp_path)!r} is there already, and nothing is overwritten. Use another --out." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_place_that_is_not_there(tmp_path):
    done = new_stage("fresh", "--kind", "score", "--out", str(tmp_path / "no" / "such"))
    assert done.exit_code == 2
    assert "is not a folder. Make it first." in done.stderr


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        write("fresh", "encode", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
