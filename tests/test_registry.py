"""Packages that announce stages and scores: found by metadata alone, loaded by name, harmless where they are broken.

A package is a folder of metadata and a module beside it, as pip leaves them on the path.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvstack
from kvstack import KVStack, SpecError, registry
from kvstack.cli.commands import app

PLUGINS = Path(__file__).parent.parent / "plugins"

ENCODER = """
from dataclasses import dataclass

from kvstack.encode.exact import Exact


@dataclass(frozen=True, repr=False)
class Stage(Exact):
    name = "{name}"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one stage on the path: its module's name."""
    monkeypatch.syspath_prepend(tmp_path)

    def package(
        name: str, code: str = ENCODER, dist: str = "", requires: str = "", group: str = "kvstack.stages"
    ) -> str:
        dist = dist or f"kvstack-{name}"
        module = f"module_of_{dist.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(code.replace("{name}", name))
        info = tmp_path / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:Stage\n")
        required = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n{required}")
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return package


def test_a_plugin_is_found_by_its_name(install):
    install("soft")
    assert "soft" in registry.stage_names()
    assert KVStack.from_spec("soft+evict:0.5").spec == "soft+evict:keep=0.5"


def test_names_are_listed_without_importing_anything(install):
    modules = [install("soft"), install("hard")]
    registry.stage_names()
    assert not any(module in sys.modules for module in modules)
    registry.stage_type("soft")
    assert [module in sys.modules for module in modules] == [True, False]


BROKEN = [
    (
        {"code": "import no_such_module"},
        r"cannot be loaded: ModuleNotFoundError\(.*no_such_module.*\)\. Update or remove",
    ),
    ({"code": "raise SystemExit(3)"}, r"cannot be loaded: SystemExit\(3\)"),
    ({"code": "class Own(BaseException): pass\nraise Own('odd')"}, r"cannot be loaded: Own\('odd'\)"),
    ({"code": "raise GeneratorExit"}, r"cannot be loaded: GeneratorExit\(\)"),
    ({"code": "def again(): again()\nagain()"}, r"cannot be loaded: RecursionError\("),
    ({"code": "import warnings\nwarnings.warn('old')"}, r"cannot be loaded: UserWarning\('old'\)"),
    ({"code": "raise ValueError('long ' * 999)"}, r"cannot be loaded: ValueError\('long long .*\.\.\.\. Update"),
    (
        {"code": "class Own(Exception):\n    def __repr__(self): raise TypeError\nraise Own"},
        r"cannot be loaded: Own\. Update",
    ),
    (
        {
            "code": "class Meta(type):\n    def __subclasscheck__(cls, other): raise TypeError('no')\n"
            "    def __getattribute__(cls, name): raise TypeError('no')\nclass Stage(metaclass=Meta): pass"
        },
        r"(cannot be looked at: TypeError\('no'\)|is not a kvstack Stage)\. Update",
    ),
    ({"code": "Stage = 7"}, "is not a kvstack Stage. Update or remove it."),
    ({"code": ENCODER.replace('"{name}"', "None")}, "gives its class the name None. The two must be one word."),
    ({"code": "Other = 1"}, "cannot be loaded: AttributeError"),
    ({"code": "class Stage: pass"}, "is not a kvstack Stage. Update or remove it."),
    ({"code": ENCODER.replace("{name}", "other")}, "gives its class the name 'other'. The two must be one word."),
    ({"requires": "kvstack>=99"}, f"is made for kvstack >=99, and this is kvstack {kvstack.__version__}. Update one"),
]


@pytest.mark.parametrize(("how", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_broken_plugin_is_named_when_it_is_asked_for(install, how, message):
    install("odd", **how)
    with pytest.raises(SpecError, match=rf"^the plugin 'odd' \(kvstack-odd 1\.0\) {message}"):
        KVStack.from_spec("odd:2")
    assert KVStack.from_spec("quant:2").spec == "quant:bits=2"


@pytest.mark.parametrize(
    "requires", ["kvstack>=0.1", "torch>99", "kvstack>=99; extra == 'test'", "kvstack @ nowhere !"]
)
def test_other_requirements_are_no_reason_to_refuse(install, requires):
    install("soft", requires=requires)
    assert KVStack.from_spec("soft").spec == "soft"


def test_two_packages_with_one_name(install):
    install("soft")
    install("soft", dist="kvstack-softer")
    with pytest.raises(
        SpecError, match=r"^kvstack-soft 1\.0 and kvstack-softer 1\.0 both have a stage called 'soft'. Remove"
    ):
        KVStack.from_spec("soft")


def test_a_built_in_name_cannot_be_taken(install):
    install("quant", dist="kvstack-taker")
    assert registry.stage_type("quant") is kvstack.Quant
    assert registry.stage_names().count("quant") == 1
    assert registry.shadowed() == [
        "kvstack-taker 1.0 calls a stage 'quant', which is kvstack's own and stays so. Update or remove it."
    ]


@pytest.mark.parametrize("family", registry.BUILT_IN)
def test_built_in_ones_are_found_as_plugins_are(family, monkeypatch):
    for name, entry in registry.BUILT_IN[family].items():
        assert (entry.name, entry.group) == (name, f"kvstack.{family}")
        assert registry.type_of(family, name) is entry.load()
    wrong = {"name": EntryPoint("name", "kvstack.errors:SpecError", f"kvstack.{family}")}
    monkeypatch.setitem(registry.BUILT_IN, family, wrong)
    with pytest.raises(SpecError, match=r"is not a kvstack (Stage|Score)"):
        registry.type_of(family, "name")


def test_scores_are_found_the_same_way(install):
    code = "from kvstack import KNorm\nclass Stage(KNorm):\n    name = '{name}'"
    install("small", code, group="kvstack.scores")
    assert "small" in registry.score_names()
    assert KVStack.from_spec("evict:0.5,score=small").spec == "evict:keep=0.5,score=small"


def test_the_catalogue_names_what_is_broken_and_shows_all_others(install):
    install("odd", "import no_such_module")
    install("soft")
    install("soft", dist="kvstack-softer")
    install("new", requires="kvstack>=99")
    install("fine")
    install("evict", dist="kvstack-taker")
    done = CliRunner().invoke(app, ["stages"])
    assert done.exit_code == 0, done.output
    rows = {}
    for line in done.stdout.splitlines():
        name, *cells = [cell.strip() for cell in line.split("│")[1:-1]] or [""]
        last = name or next(reversed(rows), "")
        rows[last] = f"{rows.get(last, '')} {' '.join(cells)}"
    words = {"odd": "error: .*no_such_module", "soft": "error: .* both have", "new": "error: .* made for kvstack >=99"}
    words |= {"fine": r"Stage +encode", "evict": "Evict", "quant": "Quant", "snapkv": "SnapKV"}
    for name, word in words.items():
        assert re.search(word, " ".join(rows[name].split())), rows[name]
    assert done.stderr.startswith("warning: kvstack-taker 1.0 calls a stage 'evict'")


# ---- the plugins of this repository


def test_names_of_test_files_do_not_clash():
    """A `tests` that is a package would be taken for this one."""
    assert not list(PLUGINS.glob("*/tests/__init__.py"))


def folders() -> list[Path]:
    return sorted(path.parent for path in PLUGINS.glob("*/pyproject.toml"))


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_plugin_of_this_repository_is_told_of(folder):
    assert f"| `{folder.name}` |" in (PLUGINS / "README.md").read_text()
    assert (folder / "README.md").exists()
    assert list(folder.rglob("test_*.py"))


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_plugin_of_this_repository_is_installed_and_loads(folder):
    import tomllib

    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"kvstack-{folder.name}"
    try:
        distribution(project["name"])
    except PackageNotFoundError:
        pytest.skip(f"not installed: pip install -e plugins/{folder.name}")
    entries = project.get("entry-points", {})
    announced = {group: names for group, names in entries.items() if group.startswith("kvstack.")}
    (row,) = re.findall(rf"^\| `{folder.name}` \|.*$", (PLUGINS / "README.md").read_text(), re.MULTILINE)
    assert bool(announced) != ("not a stage" in row)
    for group, names in announced.items():
        find = registry.stage_type if group == "kvstack.stages" else registry.score_type
        for name, where in names.items():
            assert find(name).__qualname__ == where.partition(":")[2]


LOUD = """
from dataclasses import dataclass

from kvstack.encode.exact import Exact


class Meta(type(Exact)):
    @property
    def saves(cls):
        raise RuntimeError("no")


@dataclass(frozen=True, repr=False)
class Stage(Exact, metaclass=Meta):
    name = "{name}"
"""


def test_the_catalogue_survives_every_broken_plugin(install):
    for number, (how, _) in enumerate(BROKEN):
        install(f"odd{number}", **how)
    install("loud", LOUD)
    install("fine")
    shown = CliRunner().invoke(app, ["stages"], env={"COLUMNS": "400"})
    assert shown.exit_code == 0, shown.output
    for number in range(len(BROKEN)):
        assert f"odd{number}" in shown.stdout
    assert "cannot be described: RuntimeError" in " ".join(shown.stdout.split())
    assert "commonkv" in shown.stdout


def test_an_interrupt_while_a_plugin_is_imported_is_the_users(install):
    install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        registry.stage_type("slow")


def test_damaged_metadata_is_no_reason_to_refuse(install, tmp_path):
    install("soft")
    (tmp_path / "kvstack_soft-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    assert KVStack.from_spec("soft").spec == "soft"
