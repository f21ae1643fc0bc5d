"""Helpers of the pictures: one look, readable axes, labels that keep apart, and a figure written to a file.

matplotlib's figures are used without pyplot, and its settings are changed only while a picture is made. It is imported
when the first picture is drawn.
"""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from ...errors import KVStackError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = [
    "COLOURS",
    "MARKERS",
    "Note",
    "annotate",
    "blank",
    "by_context",
    "log_axis",
    "log_limits",
    "look",
    "png",
    "sheet",
    "svg",
    "tip",
]

# Okabe and Ito's colours, which people of all kinds of colour vision tell apart; yellow is too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "figure.dpi": 100,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched and selected
    "svg.hashsalt": "kvstack",  # else every run gives its elements other names
}
TIP = "tip-"


@contextmanager
def look() -> Iterator[None]:
    """matplotlib's own defaults and this look, whatever the user's settings are; also a decorator.

    Raises:
        KVStackError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise KVStackError(
            "a picture needs matplotlib, which is not installed. Install it with: pip install 'kvstack[bench]'"
        ) from None
    with matplotlib.style.context(["default", STYLE]):
        yield


# ---- sheets


def sheet(title: str, height: float, width: float = 12.0) -> Figure:
    """An empty figure of so many inches, 100 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    return figure


def blank(title: str, why: str) -> Figure:
    """A sheet that says why there is nothing on it."""
    figure = sheet(title, 1.5)
    figure.text(0.01, 0.3, why, color="#555555")
    return figure


def by_context(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """The rows of each context, shortest context first."""
    return {n: [row for row in rows if row["context"] == n] for n in sorted({row["context"] for row in rows})}


# ---- axes


def log_limits(values: Sequence[float], below: float = 1.5, above: float = 1.5) -> tuple[float, float]:
    """Limits of a log axis that leave room by these factors."""
    return min(values) / below, max(values) * above


def log_axis(axis: Axis, shown: Callable[[float], str] = "{:g}".format) -> None:
    """Marks at 1, 2, 5, 10, ... in plain figures, for an axis with a log scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axis.set_minor_formatter(NullFormatter())


# ---- labels


@dataclass(frozen=True)
class Note:
    """A label for the point at `x`, `y`."""

    x: float
    y: float
    text: str
    colour: str


# points to the right and up; a label far from its point gets a line to it
SHIFTS = [
    (side * far, up) for far in (9, 18, 40, 70) for up in (0, 9, -9, 20, -20, 34, -34, 50, -50) for side in (1, -1)
]


def annotate(
    axes: Axes, notes: Sequence[Note], points: Sequence[tuple[float, float]], lines: Sequence[Line2D] = ()
) -> None:
    """Write each note next to its point, where it covers the least of other notes, of `points` and of `lines`.

    The axes must have their last limits and layout: places are compared in pixels. Greedy, so the result depends on
    nothing but its input.
    """
    import numpy as np
    from matplotlib.text import Text

    canvas: Any = axes.figure.canvas
    pixels = axes.figure.dpi / 72  # shifts are in typographic points
    spots = axes.transData.transform(points) if points else np.zeros((0, 2))
    taken = np.concatenate([spots - 6, spots + 6], axis=1)  # boxes: left, bottom, right, top
    for line in lines:
        beads = _beads(line.get_transform().transform(line.get_xydata()))
        taken = np.concatenate([taken, np.concatenate([beads - 2, beads + 2], axis=1)])
    window = np.array([axes.bbox.extents])
    for note in sorted(notes, key=lambda note: (note.x, note.y, note.text)):
        leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        text: Any = axes.annotate(
            note.text,
            (note.x, note.y),
            xytext=(0, 0),
            textcoords="offset points",
            color=note.colour,
            fontsize=10.5,
            va="center",
            arrowprops=leader,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
            zorder=5,
        )
        extent = Text.get_window_extent(text, canvas.get_renderer())
        width, half = extent.width, extent.height / 2
        x, y = axes.transData.transform((note.x, note.y))
        boxes, costs = [], []
        for right, up in SHIFTS:
            left = x + right * pixels - (width if right < 0 else 0)
            middle = y + up * pixels
            box = np.array([left, middle - half, left + width, middle + half])
            outside = 2 * width * half - _common(box, window)
            boxes.append(box)
            costs.append(4 * _common(box, taken) + 10 * outside + 2 * (abs(right) + abs(up)))
        best = int(np.argmin(costs))
        right, up = text.xyann = SHIFTS[best]
        text.set_horizontalalignment("left" if right > 0 else "right")
        text.arrow_patch.set_visible(abs(right) + abs(up) > 20)
        taken = np.concatenate([taken, boxes[best][None] + [-2, -2, 2, 2]])


def _beads(corners: Any) -> Any:
    """Points (N, 2) along a line through `corners`, 8 pixels apart or less."""
    import numpy as np

    parts = [corners]
    for start, end in pairwise(corners):
        parts.append(np.linspace(start, end, 2 + int(abs(end - start).max() / 8)))
    return np.concatenate(parts)


def _common(box: Any, others: Any) -> float:
    """Area of `box` that `others` (N, 4) cover, counted again for each, in square pixels."""
    import numpy as np

    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(sides.clip(min=0).prod(axis=1).sum())


def tip(artist: Any, text: str) -> None:
    """Give something drawn the words a browser shows when the pointer rests on it."""
    artist.set_gid(TIP + quote(text))  # matplotlib writes it as an id, and quotes in one as it likes


# ---- files


def _title(match: re.Match[str]) -> str:
    return f"<g><title>{html.escape(unquote(match[1]))}</title>"


def _take_literally(words: Any) -> None:
    """Names come from files: a dollar in them begins no formula, and what cannot be printed has no glyph."""
    text = words.get_text()
    if "$" in text and "mathdefault" not in text:  # matplotlib writes powers of ten as formulas
        words.set_parse_math(False)
    if not text.replace("\n", "").isprintable():
        words.set_text("".join(c if c.isprintable() or c == "\n" else " " for c in text))


@look()
def svg(figure: Figure) -> str:
    """An `<svg>` element to stand in a page, the same for the same figure: no dates, no chance names."""
    from matplotlib.text import Text

    for words in figure.findobj(Text):
        _take_literally(words)
    out = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    text = re.sub(rf'<g id="{TIP}([^"]*)">', _title, out.getvalue())
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    title = html.escape(figure.get_suptitle())
    start = text.index("<svg")  # without the XML and document type declarations
    return text[start:].replace("<svg", f'<svg role="img" aria-label="{title}"', 1).rstrip() + "\n"


@look()
def png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG file, 100 pixels an inch."""
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})
