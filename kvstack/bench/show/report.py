"""From a folder of figures to one HTML page and its pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import KVStackError
from ..results import Record, load
from . import page, pictures, summary
from .page import Cell, Section, Table
from .units import FITTED, FITTED_CAPTION, fitted, mib, nats, share

__all__ = ["write"]

BENCHES = ("quality", "needles", "memory", "decode", "length", "matrix")
NOT_SHOWN = ("identity", "code")
Rows = list[Record]


def _shown(value: Any) -> Any:
    return [f"{name} {version}" for name, version in value.items()] if isinstance(value, dict) else value


def write(folder: Path) -> Path:
    """Write `report.html` and one SVG file for each picture into `folder`; the path of the page."""
    sections: list[Section] = []
    where: Mapping[str, Any] = {}
    for bench in BENCHES:
        rows, environment = load(folder, bench)
        if rows:
            where = where or environment
            heading, text, tables, drawn = SECTIONS[bench](rows, int(environment["seed"]), folder)
            drawings = {name: pictures.svg(figure) for name, figure in drawn.items()}
            for name, drawing in drawings.items():
                (folder / f"{_file_name(name)}.svg").write_text(drawing, encoding="utf-8")
            measured = f"Measured with {environment['dtype']} weights at {environment['commit'] or 'no commit'}."
            said = f"{text} {FITTED_CAPTION[0].upper()}{FITTED_CAPTION[1:]}. {measured}"
            sections.append(Section(heading, said, tables, list(drawings.values())))
    if not sections:
        raise KVStackError(f"{folder} holds no figures. Run a benchmark first: kvstack bench all --out {folder}")
    made = folder / "report.html"
    seen = {name: _shown(value) for name, value in where.items() if value is not None and name not in NOT_SHOWN}
    made.write_text(page.page(f"kvstack: {where['model']}", seen, sections), encoding="utf-8")
    return made


def _file_name(name: str) -> str:
    """`name` where it can name a file in any folder. Names of tasks come from files: they may hold slashes, or be long;
    then a digest keeps two of them apart."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"


# ---- one section each: heading, text, tables, pictures by name

Drawn = tuple[str, str, list[Table], dict[str, Any]]


def _quality(records: Rows, seed: int, folder: Path) -> Drawn:
    rows = summary.quality(records, seed)
    tables, drawn = [], {}
    for context in dict.fromkeys(row["context"] for row in rows):
        mine = [row for row in rows if row["context"] == context]
        domains = list(mine[0]["domains"])
        lines = [
            [
                row["cache"],
                row["family"],
                Cell(share(row["share"]) + (" (claimed)" if row["simulated"] else ""), row["share"]),
                *_fitted(row),
                *(_nats(row["domains"].get(name)) for name in domains),
                Cell(nats(row["kl"]), row["kl"]),
                Cell(f"{nats(row['kl_low'])} - {nats(row['kl_high'])}", row["kl_low"]),
                Cell(nats(row["kl_q99"]), row["kl_q99"]),
                Cell(f"{row['top1']:.1%}", row["top1"]),
                Cell(f"{row['nll']:.3f}", row["nll"]),
            ]
            for row in mine
        ]
        drift = [*(f"KL, {name}" for name in domains), "KL, all", "95 %", "q99", "top-1", "NLL"]
        columns = ["cache", "whose", "bytes", *FITTED, *drift]
        tables.append(Table(f"{context:,} tokens compressed", columns, lines))
        drawn[f"quality-{context}"] = pictures.quality(mine)
    tables.append(_budgets(records, seed))
    text = (
        "How far the next tokens drift from the dense cache (KL in nats), against the bytes held as a share of a dense "
        "bfloat16 cache's."
    )
    return "Quality", text, tables, drawn


def _fitted(row: Mapping[str, Any]) -> tuple[Cell, Cell]:
    """The cells of `FITTED`; a stack that never holds less comes behind all others."""
    held, tokens = fitted(row)
    if not held:
        return Cell(""), Cell("")
    return Cell(held, row["model_nbytes"]), Cell(tokens, 1e18 if row["break_even"] is None else row["break_even"])


def _nats(x: float | None) -> Cell:
    return Cell("" if x is None else nats(x), x)


def _budgets(records: Rows, seed: int) -> Table:
    lines = []
    for row in summary.budgets(records, seed=seed):
        cells: list[Any] = [f"{row['context']:,}", Cell(f"{row['budget']:.4g}", row["budget"])]
        for kind in ("stack", "peer"):
            best = row[kind]
            known = best is not None
            cells += [
                best["cache"] if known else "-",
                Cell(share(best["share"]) if known else "", best["share"] if known else 2.0),
                Cell(nats(best["kl"]) if known else "", best["kl"] if known else 1e9),
                *(_fitted(best or {}) if kind == "stack" else ()),
            ]
        ratio = row["ratio"]
        said = "" if ratio is None else f"{ratio:.2g} ({row['ratio_low']:.2g} - {row['ratio_high']:.2g})"
        lines.append([*cells, Cell(said, 1e9 if ratio is None else ratio)])
    columns = ["context", "budget", "best stack", "bytes", "KL", *FITTED, "best peer", "bytes", "KL", "KL stack / peer"]
    return Table("At equal bytes: no cache of a row holds more than the budget", columns, lines)


def _needles(records: Rows, seed: int, folder: Path) -> Drawn:
    rows = summary.needles(records, seed)
    lines = [
        [
            f"{row['context']:,}",
            row["task"],
            row["mode"],
            row["cache"],
            Cell(f"{row['score']:.2f}", row["score"]),
            f"{row['low']:.2f} - {row['high']:.2f}",
            row["samples"],
            Cell(share(row["share"]), row["share"]),
            *_fitted(row),
        ]
        for row in rows
    ]
    columns = ["context", "task", "question", "cache", "found", "95 %", "texts", "bytes", *FITTED]
    cells, drawn = summary.heat(records), {}
    for task, mode in dict.fromkeys((cell["task"], cell["mode"]) for cell in cells):
        mine = [cell for cell in cells if (cell["task"], cell["mode"]) == (task, mode)]
        drawn[f"needles-{task}-{mode}"] = pictures.needles(mine)
    text = "Share of the answers found; aware: the cache sees the question before it compresses, agnostic: it does not."
    return "Needles", text, [Table("Answers found", columns, lines)], drawn


def _memory(rows: Rows, seed: int, folder: Path) -> Drawn:
    lines = [
        [
            Cell(f"{row['context']:,}", row["context"]),
            row["cache"],
            Cell(mib(row["nbytes_prefill"]), row["nbytes_prefill"]),
            Cell(f"{row['nbytes_prefill'] / row['dense_nbytes_prefill']:.1%}", row["nbytes_prefill"]),
            Cell(f"{row['nbytes_prefill'] / row['context']:,.0f}", row["nbytes_prefill"] / row["context"]),
            *_fitted(row),
            *(
                Cell("-" if row[name] is None else mib(row[name]), row[name] or 0)
                for name in ("peak_prefill", "peak_decode")
            ),
        ]
        for row in rows
    ]
    columns = ["context", "cache", "MiB", "of dense", "bytes a token", *FITTED]
    peaks = ["peak of prefill, MiB", "peak of decoding, MiB"]
    drawn = {"memory": pictures.memory(rows), "memory-growth": pictures.growth(rows)}
    text = "Bytes of the tensors held after the prompt, by stage, and what the process grew by at most."
    return "Memory", text, [Table("Bytes held", [*columns, *peaks], lines)], drawn


def _decode(rows: Rows, seed: int, folder: Path) -> Drawn:
    lines = [
        [
            Cell(f"{row['context']:,}", row["context"]),
            row["cache"],
            Cell(f"{row['ttft_ms']:,.0f}", row["ttft_ms"]),
            Cell(f"{row['ttft_cost']:+.1%}", row["ttft_cost"]),
            Cell(f"{row['ms_typical']:.1f}", row["ms_typical"]),
            Cell(f"{row['ms_mean']:.1f}", row["ms_mean"]),
            Cell(f"{row['speed_typical']:.2f}x", row["speed_typical"]),
            f"{row['speed_low']:.2f} - {row['speed_high']:.2f}",
            Cell(f"{row['speed_mean']:.2f}x", row["speed_mean"]),
            Cell(share(row["share"]), row["share"]),
            *_fitted(row),
        ]
        for row in rows
    ]
    columns = ["context", "cache", "first token, ms", "cost", "ms a token, typical", "ms, mean", "speed", "quartiles"]
    text = "The caches take turns; speeds are the dense cache's time over the own, above 1 is faster than dense."
    tables = [Table("Speed", [*columns, "speed, mean", "bytes", *FITTED], lines)]
    return "Speed", text, tables, {"decode": pictures.decode(rows)}


def _length(rows: Rows, seed: int, folder: Path) -> Drawn:
    lines = [
        [
            row["cache"],
            Cell(f"{row['context']:,}", row["context"]),
            Cell(f"{row['held']:,}", row["held"]),
            Cell(f"{row['ms_typical']:.1f}", row["ms_typical"]),
            Cell(f"{row['us_held']:.2f}", row["us_held"]),
            Cell(mib(row["nbytes"]), row["nbytes"]),
            *_fitted(row),
        ]
        for row in rows
    ]
    columns = ["cache", "tokens", "held", "ms a token, typical", "us a token held", "MiB", *FITTED]
    text = "One text grows under each cache. Where time for each token held stays or falls, costs are linear."
    return "Length", text, [Table("Longer and longer texts", columns, lines)], {"length": pictures.length(rows)}


def _matrix(speeds: Rows, seed: int, folder: Path) -> Drawn:
    """The quality of a combination stands among the figures of quality."""
    rows = summary.matrix(load(folder, "quality").rows, speeds, seed)
    lines = [
        [
            row["transform"],
            row["encode"],
            row["evict"],
            Cell(share(row["share"]), row["share"]),
            *_fitted(row),
            Cell(nats(row["kl"]), row["kl"]),
            Cell(f"{row['top1']:.1%}", row["top1"]),
            Cell("" if row["speed"] is None else f"{row['speed']:.2f}x", row["speed"] or 0.0),
            "yes" if row["pareto"] else "",
        ]
        for row in rows
    ]
    columns = ["transform", "encode", "evict", "bytes", *FITTED, "KL", "top-1", "speed", "front"]
    text = "Every combination of a grid; on the front, no other holds fewer bytes and drifts less."
    return "Mix and match", text, [Table("All combinations", columns, lines)], {"matrix": pictures.matrix(rows)}


SECTIONS = {
    "quality": _quality,
    "needles": _needles,
    "memory": _memory,
    "decode": _decode,
    "length": _length,
    "matrix": _matrix,
}
