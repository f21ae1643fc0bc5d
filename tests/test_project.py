"""What packages of this repository bring besides code, and the commands that check them: the same ones everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
CHECKS = ["make check", "make test"]


def packages() -> list[Path]:
    """Packages of all projects; a plugin of one module cannot carry a mark of types."""
    return [path.parent for project in PROJECTS for path in sorted(project.parent.glob("kvstack*/__init__.py"))]


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.name)
def test_type_checkers_may_read_a_package(package):
    assert (package / "py.typed").read_text() == ""
    setuptools = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"][package.name]


def test_the_workflow_runs_what_developers_run():
    assert re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE) == CHECKS
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == CHECKS
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert oldest in job["strategy"]["matrix"]["python"]


def test_hooks_run_the_tools_of_make_check():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # so that they need no network, and have the versions of constraints.txt
    rule = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    tools = [line.removesuffix(" .") for line in rule[1].replace(" --check", "").splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == [tool.strip() for tool in tools]


def test_places_exist():
    """The table of places in CONTRIBUTING leads a newcomer to files and folders that are there."""
    table = re.findall(r"^\|.*\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    names = {name for row in table for name in re.findall(r"`([^`]+)`", row)}
    places = {name for name in names if "/" in name or re.search(r"\.\w+$", name)}
    assert {"kvstack/registry.py", "kvstack/select/", "tests/test_contracts.py"} <= places
    assert {place for place in places if not (ROOT / place).exists()} == set()
