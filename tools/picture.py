"""Draw docs/images/quality.svg, the picture of the README, from the tables of the documents.

    python tools/picture.py      needs matplotlib: pip install matplotlib

The figures are the rows of "All rows" under "At equal bytes" in docs/benchmarks.md, and of "Measured" in
docs/stages/tiers.md. Those pages name the commands that measured them. Run this after you change one of the tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "quality.svg"
CONTEXT = 4096
FAMILIES = {"hqq": "transformers' QuantizedCache", "quanto": "transformers' QuantizedCache"} | {
    name: name for name in ("kvpress", "turboquant")
}
ORDER = {"evict": 0, "tiers": 0, "commonkv": 1, "quant": 2}  # of the pipeline
LEFT_OUT = ("dense", "nothing")  # no drift, and no bytes: a log axis cannot show them


def table(text: str, heading: str, first: str) -> list[dict[str, str]]:
    """Return the rows of the first table after a heading of a page whose first column is called `first`.

    Raises:
        ValueError: the page has no such heading or table.
    """
    _, found, rest = text.partition(f"\n{heading}\n")
    lines = re.search(rf"^\| {re.escape(first)}\b.*\n(?:\|.*\n)+", rest, re.MULTILINE)
    if not found or lines is None:
        raise ValueError(f"no table of {first!r} after {heading!r}")
    bare = re.sub(r"`|\*\*", "", lines[0])
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in bare.splitlines())
    return [dict(zip([head[0].partition(",")[0], *head[1:]], cells, strict=True)) for cells in body]


def row_of(cache: str, share: str, kl: str, interval: str = "") -> dict[str, Any]:
    """Return a row as `kvstack.bench.show.pictures.quality` draws it, from the cells of a table."""
    family = FAMILIES.get(cache.partition(":")[0])
    kind = "peer" if family else "control" if "score=random" in cache else "kvstack"
    row: dict[str, Any] = {"cache": cache, "kind": kind, "family": family, "label": label(cache), "context": CONTEXT}
    row |= {"simulated": "*" in share, "share": float(share.rstrip(" *%")) / 100, "kl": float(kl)}
    if interval:
        row["kl_low"], row["kl_high"] = map(float, interval.split(" - "))
    return row


def label(cache: str) -> str:
    """Return a name short enough for a picture: no settings but the first number. The tip of a point has them all."""
    if cache.startswith("kvpress"):
        return cache
    stages = re.sub(r":\w+=[^+]*|,[^+]*|@.*", "", cache).split("+")
    return " + ".join(sorted(stages, key=lambda stage: ORDER.get(stage.partition(":")[0], 1)))


def rows(root: Path = ROOT) -> list[dict[str, Any]]:
    """Return all rows of the two tables that have a place in the picture."""
    drawn = []
    for cells in table((root / "docs/benchmarks.md").read_text("utf-8"), "### At equal bytes", "cache"):
        if cells["cache"] not in LEFT_OUT:
            drawn.append(row_of(cells["cache"], cells["bytes"], cells["KL, all"], cells["95 %"]))
    for cells in table((root / "docs/stages/tiers.md").read_text("utf-8"), "## Measured", "stack"):
        if cells["KL, mean"]:  # not every row was measured on all kinds of text
            spec = cells["stack"].partition(" ")[0].rstrip(",") + "@window=16"
            drawn.append(row_of(spec, cells["bytes"], cells["KL, mean"]))
    return drawn


def drawing() -> str:
    from kvstack.bench.show import pictures

    return pictures.svg(pictures.quality(rows()))


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawing(), encoding="utf-8")
