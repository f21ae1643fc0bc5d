"""One HTML file with the benchmarks' tables and pictures, which needs nothing else and no network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from ...errors import KVStackError

__all__ = ["Cell", "Section", "Table", "page"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the value to sort by: `key`, or the text."""

    text: str
    key: float | str | None = None


Value = Cell | str | float | None


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns. None is an empty cell, and comes last however it is sorted."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (an empty line between two), pictures (`<svg>` elements) and tables."""

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[str] = ()


def page(title: str, environment: Mapping[str, object], sections: Sequence[Section]) -> str:
    """The whole HTML file as text.

    All text is escaped; only the pictures go in as they are, with their ids made unique.

    Args:
        title: the heading of the page.
        environment: all that you need to repeat the figures, name to value; a list of values has a line each.
        sections: the parts of the page, in this order.

    Raises:
        KVStackError: jinja2 is not installed, or a row has more or fewer cells than its table has columns.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise KVStackError(
            "a page needs jinja2, which is not installed. Install it with: pip install 'kvstack[bench]'"
        ) from None
    for table in (table for section in sections for table in section.tables):
        for row in table.rows:
            if len(row) != len(table.columns):
                raise KVStackError(
                    f"table {table.caption!r} has {len(table.columns)} columns, and a row of it {len(row)} cells: "
                    f"{list(row)}. Give one cell per column, None for an empty one."
                )
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {"cell": _cell, "headers": _headers}
    pictures = [[_own_ids(svg, f"p{i}-{j}-") for j, svg in enumerate(s.pictures)] for i, s in enumerate(sections)]
    return engine.from_string(_data("report.html")).render(
        title=title,
        environment={name: _lines(value) for name, value in environment.items()},
        parts=[
            (section, [words for words in re.split(r"\n\s*\n", section.text.strip()) if words], svgs)
            for section, svgs in zip(sections, pictures, strict=True)
        ],
        style=_data("report.css"),
        script=_data("report.js"),
    )


def _data(name: str) -> str:
    return resources.files("kvstack").joinpath("data", name).read_text(encoding="utf-8")


def _cell(value: Value) -> dict[str, object]:
    """Text, sort key, and whether it is a number, of anything a table's cell may be."""
    if isinstance(value, Cell):
        key = value.text if value.key is None else value.key
        return {"text": value.text, **_key(key)}
    if value is None or isinstance(value, str):
        return {"text": value or "", **_key(value or "")}
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return {"text": text, **_key(value)}


def _key(key: float | str) -> dict[str, object]:
    """No key means last, both ways: empty text, and numbers that are none."""
    if isinstance(key, str):
        return {"number": False, "key": key}
    return {"number": True, "key": "" if math.isnan(key) else str(key)}


def _headers(table: Table) -> list[tuple[str, bool]]:
    """The columns, and whether each holds numbers only: then its header stands to the right, as they do."""
    cells = [[_cell(value) for value in row] for row in table.rows]
    return [(name, all(row[i]["number"] or not row[i]["key"] for row in cells)) for i, name in enumerate(table.columns)]


def _lines(value: object) -> list[str]:
    return [str(line) for line in value] if isinstance(value, list | tuple) else [str(value)]


def _own_ids(svg: str, prefix: str) -> str:
    """Put `prefix` before all ids of an `<svg>`, and where they are referred to: two pictures may share names."""
    return re.sub(r'((?<![\w:-])id="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
