"""Collect the pages of the site in build/pages: README, docs, plugins, and a reference of the public names.

    python tools/pages.py        then: zensical build --strict, which writes build/site

Links between pages stay links. Links to other files of the repository lead to GitHub, where readers can see them.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
SOURCE = "https://github.com/kvstack/kvstack/blob/main/"
LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]+)?\)")
SETUP = re.compile(r"^<!-- setup\n.*?^-->\n", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def place(path: PurePosixPath) -> PurePosixPath:
    """The place of a page of the repository in the site. Pages of docs/ come to the top."""
    if path.parts[0] == "docs":
        return path.relative_to("docs")
    if path.parts[0] == "plugins":
        return PurePosixPath("packages/index.md" if len(path.parts) == 2 else f"packages/{path.parts[1]}.md")
    return PurePosixPath(path.name.lower())


def collected(root: Path = ROOT) -> dict[PurePosixPath, str]:
    """All pages of the repository, by their place in the site, with links that hold there."""
    found = [
        root / "README.md",
        root / "CHANGELOG.md",
        root / "CONTRIBUTING.md",
        *sorted((root / "docs").rglob("*.md")),
    ]
    found += sorted((root / "plugins").glob("**/README.md"))
    names = [PurePosixPath(page.relative_to(root).as_posix()) for page in found]
    places = {name: place(name) for name in [*names, *images(root)]}
    return {places[name]: moved((root / name).read_text(encoding="utf-8"), name, places) for name in names}


def images(root: Path = ROOT) -> list[PurePosixPath]:
    """The pictures that pages show, by their path in the repository."""
    return [PurePosixPath(path.relative_to(root).as_posix()) for path in sorted((root / "docs" / "images").glob("*"))]


def moved(text: str, name: PurePosixPath, places: dict[PurePosixPath, PurePosixPath]) -> str:
    """The text of a page, with its links as they are from its place in the site."""

    def link(match: re.Match[str]) -> str:
        target = normal(name.parent / match["path"])
        if target not in places:
            return f"]({SOURCE}{target})"
        return f"]({relative(places[target], places[name].parent)}{match['anchor'] or ''})"

    parts = FENCED.split(SETUP.sub("", text))  # every second part is code
    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(parts))


def normal(path: PurePosixPath) -> PurePosixPath:
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    return PurePosixPath(*parts)


def relative(target: PurePosixPath, folder: PurePosixPath) -> str:
    common = 0
    while common < min(len(folder.parts), len(target.parts) - 1) and folder.parts[common] == target.parts[common]:
        common += 1
    return "/".join([".."] * (len(folder.parts) - common) + list(target.parts[common:]))


# ---- the reference


def sections() -> dict[str, tuple[str, list[str]]]:
    """Pages of the reference: a title, and the public names of kvstack that it shows. Each name is on one page."""
    import kvstack
    from kvstack import Score, Stage

    left = {name: getattr(kvstack, name) for name in sorted(kvstack.__all__) if name != "__version__"}

    def take(wanted: Callable[[Any], bool]) -> list[str]:
        names = [name for name, value in left.items() if wanted(value)]
        for name in names:
            del left[name]
        return names

    def named(kind: type) -> Callable[[Any], bool]:
        """Return a test for classes of this kind with a name in specs, which contracts do not have."""
        return lambda value: inspect.isclass(value) and issubclass(value, kind) and bool(getattr(value, "name", ""))

    errors = take(lambda value: inspect.isclass(value) and issubclass(value, Exception))
    stages, scores = take(named(Stage)), take(named(Score))
    contracts = take(lambda value: value.__module__ in ("kvstack.stage", "kvstack.types", "kvstack.packed"))
    calibration = take(lambda value: value.__module__.startswith("kvstack.calibration"))
    return {
        "cache": ("The cache", list(left)),
        "stages": ("Stages", stages),
        "scores": ("Scores", scores),
        "calibration": ("Calibration", calibration),
        "errors": ("Errors and warnings", errors),
        "contracts": ("Contracts for your own stages", contracts),
    }


def reference(title: str, names: Iterable[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: kvstack.{name}" for name in names)]) + "\n"


def write(folder: Path = PAGES) -> None:
    """Write all pages into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = {place.as_posix(): text for place, text in collected().items()}
    for name, (title, names) in sections().items():
        pages[f"reference/{name}.md"] = reference(title, names)
    pages["reference/testing.md"] = reference("Checks for your tests", ["testing"])
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for image in images():
        path = folder / place(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / image, path)


if __name__ == "__main__":
    write()
