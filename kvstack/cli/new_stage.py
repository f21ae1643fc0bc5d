"""The folder of a plugin with one stage that works, to begin from: what `kvstack new-stage` writes."""

from __future__ import annotations

import keyword
import re
import tempfile
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

import kvstack

from .. import registry
from ..errors import KVStackError

__all__ = ["write"]

Kind = Literal["transform", "encode", "score"]

WHAT = {"transform": "a transform", "encode": "an encoder", "score": "a score"}
IMPORTED = {"Mapping", "Sequence", "Tensor"}
"""Classes that the written modules import from elsewhere than kvstack."""


def write(name: str, kind: Kind, out: Path | None = None) -> Path:
    """Write the plugin `name` into the new folder `out` (`kvstack-NAME` if not given), complete or not at all.

    Raises:
        KVStackError: the name is not a word in lower case, is taken, or the folder is there already.
    """
    _check_name(name)
    package, cls = f"kvstack-{name.replace('_', '-')}", _class_of(name)
    out = Path(package) if out is None else out
    if out.exists() or out.is_symlink():
        raise KVStackError(f"{str(out)!r} is there already, and nothing is overwritten. Use another --out.")
    if not out.absolute().parent.is_dir():
        raise KVStackError(f"{str(out)!r} cannot be made: {str(out.parent)!r} is not a folder. Make it first.")
    module = f"kvstack_{name}"
    words = {
        "name": name,
        "what": WHAT[kind],
        "kind": kind,
        "cls": cls,
        "package": package,
        "module": module,
        "versions": _versions(),
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}.py": f"{kind}.py",
        f"tests/test_{name}.py": f"test_{kind}.py",
    }
    source = PackageLoader("kvstack", "data/plugin")
    templates = Environment(loader=source, undefined=StrictUndefined, keep_trailing_newline=True)
    texts = {path: templates.get_template(f"{template}.jinja").render(words) for path, template in files.items()}
    _write_all(out, texts)
    return out


def _check_name(name: str) -> None:
    reserved = keyword.iskeyword(name) or keyword.iskeyword(_class_of(name))  # none would make a class None
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or reserved:
        raise KVStackError(f"{name!r} cannot be a stage's name: it is written in specs. Use a word such as 'my_stage'.")
    for kind, names in (("stage", registry.stage_names()), ("score", registry.score_names())):
        if name in names:
            raise KVStackError(f"there is a {kind} called {name!r} already. `kvstack stages` lists them; use another.")
    if _class_of(name) in IMPORTED or hasattr(kvstack, _class_of(name)):
        raise KVStackError(f"{name!r} would make a class {_class_of(name)}, a word of kvstack's own. Use another.")


def _class_of(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _versions() -> str:
    """This version of kvstack and those that may not change the interface."""
    major, minor, *_ = kvstack.__version__.split(".")
    return f">={major}.{minor},<{f'0.{int(minor) + 1}' if major == '0' else int(major) + 1}"


def _write_all(out: Path, texts: dict[str, str]) -> None:
    # written beside its place, so that the renaming stays on one disk
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as place:
        folder = Path(place, out.name)
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        folder.rename(out)
