"""The pages of the site: links hold after pages have moved, and no page or public name is left out."""

import importlib.util
import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest

import kvstack

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("pages", ROOT / "tools" / "pages.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("README.md", "readme.md"),
        ("docs/index.md", "index.md"),
        ("docs/stages/quant.md", "stages/quant.md"),
        ("plugins/README.md", "packages/index.md"),
        ("plugins/xkv/README.md", "packages/xkv.md"),
    ],
)
def test_place(source, place):
    assert pages.place(PurePosixPath(source)) == PurePosixPath(place)


PLACES = {
    PurePosixPath(name): pages.place(PurePosixPath(name))
    for name in ("README.md", "docs/flow.md", "docs/stages/quant.md", "docs/stages/evict.md", "plugins/xkv/README.md")
}


@pytest.mark.parametrize(
    ("source", "link", "moved"),
    [
        ("docs/stages/quant.md", "../flow.md#reading", "../flow.md#reading"),
        ("docs/stages/quant.md", "evict.md", "evict.md"),
        ("docs/stages/quant.md", "../../README.md#results", "../readme.md#results"),
        ("README.md", "docs/stages/quant.md", "stages/quant.md"),
        ("README.md", "plugins/xkv/README.md", "packages/xkv.md"),
        ("plugins/xkv/README.md", "../../docs/stages/quant.md#kivi", "../stages/quant.md#kivi"),
        ("docs/flow.md", "../kvstack/types.py", pages.SOURCE + "kvstack/types.py"),
        ("docs/flow.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/flow.md", "#here", "#here"),
    ],
)
def test_links_hold_from_the_new_place(source, link, moved):
    text = f"See [it]({link}).\n\n```text\n[it]({link})\n```\n"
    assert pages.moved(text, PurePosixPath(source), PLACES) == f"See [it]({moved}).\n\n```text\n[it]({link})\n```\n"


def test_blocks_that_set_a_page_up_are_left_out():
    text = "# Title\n\n<!-- setup\n```python\na = 1\n```\n-->\n\nText\n"
    assert pages.moved(text, PurePosixPath("docs/flow.md"), PLACES) == "# Title\n\n\nText\n"


def test_every_public_name_is_in_the_reference_once():
    shown = [name for _, names in pages.sections().values() for name in names]
    assert sorted([*shown, "__version__"]) == sorted(kvstack.__all__)


def test_every_page_is_in_the_navigation(tmp_path):
    def leaves(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(inner)

    pages.write(tmp_path)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md"))
    assert sorted(leaves(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])) == written


def test_pages_of_before_are_removed(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "old.md").write_text("# Old\n")
    pages.write(tmp_path / "site")
    assert not (tmp_path / "site" / "old.md").exists()


def test_pictures_are_copied_and_shown_from_where_they_are(tmp_path):
    pages.write(tmp_path)
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (tmp_path / "readme.md").read_text())
    assert shown == ["images/quality.svg"]
    assert (tmp_path / shown[0]).read_bytes() == (ROOT / "docs" / "images" / "quality.svg").read_bytes()
