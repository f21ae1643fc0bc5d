"""The tables of docs/models.md, from the verdicts that `make matrix` has written.

python -m tests.matrix.table
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .architectures import NAMES
from .cells import Verdict
from .modes import MODES

__all__ = ["RECORDS", "Cell", "filled", "read", "write"]

ROOT = Path(__file__).parents[2]
RECORDS, PAGE = ROOT / "build" / "matrix", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- written by make matrix -->", "<!-- end of what make matrix writes -->"

COLUMNS = {
    "no stage": r"empty",
    "Evict": r"Evict.*",
    "Quant": r"Quant.*",
    "CommonKV": r"CommonKV.*",
    "the line": r"the line",
    "XKV": r"XKV",
    "KVTC": r"KVTC",
    "MiniCache": r"MiniCache",
    "KVSharer": r"KVSharer",
}
WORDS = {"exact": "exact", "close": "close", "works": "works", "not checked": "not checked", "none": "-"}


class Cell(NamedTuple):
    """A verdict and where it belongs."""

    name: str
    attention: str
    mode: str
    stack: str
    verdict: Verdict


# ---- records


def write(name: str, attention: str, cells: Iterable[Cell]) -> None:
    """Keep the cells of one model."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    rows = [[cell.mode, cell.stack, cell.verdict.kind, cell.verdict.words] for cell in cells]
    (RECORDS / f"{name}.{attention}.json").write_text(json.dumps(rows))


def read() -> list[Cell]:
    """All cells that were kept."""
    return [
        Cell(path.name.split(".")[0], path.name.split(".")[1], mode, stack, Verdict(kind, words))
        for path in sorted(RECORDS.glob("*.json"))
        for mode, stack, kind, words in json.loads(path.read_text())
    ]


# ---- tables


class Notes:
    """Footnotes, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, cells: Sequence[Cell]) -> str:
        """The numbers of the notes on refusals and errors of these cells."""
        modes: dict[str, set[str]] = defaultdict(set)
        for cell in cells:
            if cell.verdict.kind in ("refused", "wrong", "not checked"):
                modes[f"{cell.verdict.kind}: {_general(cell.verdict.words)}"].add(cell.mode)
        run = {cell.mode for cell in cells if cell.verdict.kind != "none"}
        texts = [
            text if where == run else f"{', '.join(mode for mode in MODES if mode in where)}: {text}"
            for text, where in modes.items()
        ]
        numbers = sorted(self.numbers.setdefault(text, len(self.numbers) + 1) for text in texts)
        return "".join(f" [{number}](#note-{number})" for number in numbers)

    def __str__(self) -> str:
        return "\n".join(f'{n}. <a id="note-{n}"></a>{text}' for text, n in self.numbers.items())


def _general(words: str) -> str:
    """The words of a refusal without the model, the layer, the settings and the numbers that it names."""
    words = re.sub(r"\b[A-Z]\w*(For(CausalLM|ConditionalGeneration)|LMHeadModel)\b", "the model", words)
    words = re.sub(r"KVStack\(\[.*?\](, \w+=\w+)*\)", "KVStack(...)", words)
    words = re.sub(r"\b([A-Z]\w*)\((?:[^()]|\([^()]*\))*=(?:[^()]|\([^()]*\))*\)", r"\1", words)
    words = re.sub(r"\blayers? (\[[\d, ]*\]|\d+)", "layer N", words)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", words)


def _summary(cells: Sequence[Cell]) -> str:
    """One word for all cells of a stage: the least of those that ran, or that it is refused."""
    kinds = {cell.verdict.kind for cell in cells}
    if "wrong" in kinds:
        return "**wrong**"
    ran = [kind for kind in ("works", "close", "exact") if kind in kinds]
    return WORDS[ran[0]] if ran else next((kind for kind in ("refused", "not checked") if kind in kinds), "-")


def by_model(cells: Sequence[Cell], notes: Notes) -> str:
    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in NAMES:
        own = [cell for cell in cells if cell.name == name]
        if own:
            parts = [[cell for cell in own if re.fullmatch(stack, cell.stack)] for stack in COLUMNS.values()]
            lines.append(f"| {name} | {' | '.join(_summary(part) + notes.of(part) for part in parts)} |")
    return "\n".join(lines)


def by_mode(cells: Sequence[Cell]) -> str:
    lines = [f"| mode | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for mode in MODES:
        parts = []
        for stack in COLUMNS.values():
            counts = Counter(
                cell.verdict.kind for cell in cells if cell.mode == mode and re.fullmatch(stack, cell.stack)
            )
            counts.pop("none", None)
            parts.append(", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
        lines.append(f"| {mode} | {' | '.join(parts)} |")
    return "\n".join(lines)


def filled(page: str, cells: Sequence[Cell]) -> str:
    """The page with the tables of these cells between its marks."""
    notes = Notes()
    tables = ["## By model", by_model(cells, notes), "## By mode, in numbers of cells", by_mode(cells)]
    tables += ["## Notes", str(notes)]
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n" + "\n\n".join(tables) + f"\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")
