"""The benchmarks' pictures, drawn from plain rows.

    quality   KL against bytes, with the fronts of the stacks and of the peers
    needles   scores by depth and context, one map per cache
    memory    bytes by stage, and the peaks
    growth    bytes per token against context
    decode    milliseconds per token against context
    length    milliseconds per token in longer and longer texts
    matrix    KL against bytes of all combinations of stages

Each takes rows (dicts) and gives a `matplotlib.figure.Figure`; `svg` and `png` make it a file. Rows that a log axis
cannot show, a KL or a size of 0, are left out, and the picture says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .drawing import COLOURS, MARKERS, Note, annotate, blank, by_context, log_axis, log_limits, look, png, sheet, svg
from .drawing import tip as set_tip
from .front import pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["decode", "growth", "length", "matrix", "memory", "needles", "png", "quality", "svg"]

Row = Mapping[str, Any]
MIB = 2**20
BYTES = "bytes held, as a share of a dense bfloat16 cache (log)"
KL = "mean KL from the dense cache, nats (log)"


# ---- KL against bytes


@look()
def quality(rows: Sequence[Row]) -> Figure:
    """KL against bytes, one panel per context, with 95 % intervals and the fronts of the stacks and of the peers.

    A row without `kl_low` and `kl_high` gets no interval. Its `label`, or else its `cache`, is written on a front.
    """
    families = ["kvstack", *sorted({_family(row) for row in rows} - {"kvstack", "control"}), "control"]
    colour = {family: COLOURS[i % 7] for i, family in enumerate(families)} | {"control": COLOURS[7]}
    marker = {family: MARKERS[i % len(MARKERS)] for i, family in enumerate(families)} | {"control": "x"}

    def look_of(row: Row) -> dict[str, Any]:
        family = _family(row)
        hollow = bool(row.get("simulated")) and marker[family] != "x"
        return {"color": colour[family], "marker": marker[family], "mfc": "white" if hollow else colour[family]}

    def fronts_of(here: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
        stacks = [row for row in here if row["kind"] == "kvstack"]
        peers = [row for row in here if row["kind"] == "peer"]
        return [(COLOURS[0], "-", _front(stacks)), ("#333333", "--", _front(peers))]

    present = [family for family in families if any(_family(row) == family for row in rows if row["kind"] != "dense")]
    legend = [_key(family, color=colour[family], marker=marker[family]) for family in present]
    if any(row.get("simulated") for row in rows):
        legend.append(_key("hollow: bytes nominal, none freed", color="#333333", marker="o", mfc="white"))
    if any(row["kind"] == "kvstack" for row in rows):
        legend.append(_key("best kvstack for its bytes", color=COLOURS[0], linestyle="-"))
    if any(row["kind"] == "peer" for row in rows):
        legend.append(_key("best peer for its bytes", color="#333333", linestyle="--"))
    return _scatter("Quality against memory: down and left is better", rows, look_of, fronts_of, legend)


@look()
def matrix(rows: Sequence[Row]) -> Figure:
    """KL against bytes of all combinations: colour by transform, marker by encoder, fill and size by eviction."""

    def names(field: str) -> list[str]:
        """All values, "none" first."""
        return sorted({row[field] for row in rows}, key=lambda name: (name != "none", name))

    transforms, encoders, evictions = names("transform"), names("encode"), names("evict")
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(transforms)}
    marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(encoders)}
    size = {name: 11 - 5 * i / max(1, len(evictions) - 1) for i, name in enumerate(evictions)}

    def fill(name: str, own: str) -> str:
        return own if name == "none" else "white"

    def look_of(row: Row) -> dict[str, Any]:
        own = colour[row["transform"]]
        evict = row["evict"]
        return {"color": own, "marker": marker[row["encode"]], "mfc": fill(evict, own), "ms": size[evict]}

    def fronts_of(here: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
        return [("#333333", "-", [row for row in here if row["pareto"]])]

    legend = [_key("transform", color="none")]
    legend += [_key(name, color=colour[name], marker="o") for name in transforms]
    legend += [_key("encode", color="none")]
    legend += [_key(name, color="#333333", marker=marker[name]) for name in encoders]
    legend += [_key("evict", color="none")]
    legend += [_key(name, color="#333333", marker="o", ms=size[name], mfc=fill(name, "#333333")) for name in evictions]
    legend += [_key("on the front", color="#333333", linestyle="-")]
    return _scatter("All combinations: down and left is better", rows, look_of, fronts_of, legend)


def _scatter(
    title: str,
    rows: Sequence[Row],
    look_of: Callable[[Row], dict[str, Any]],
    fronts_of: Callable[[Sequence[Row]], list[tuple[str, str, list[Row]]]],
    legend: Sequence[Any],
) -> Figure:
    """KL against bytes with error bars, labels on the fronts, one panel per context, all on the same axes."""
    shown = [row for row in rows if _drawable(row)]
    absent = sorted({row["cache"] for row in rows if not _drawable(row)})
    left_out = f"Not drawn (KL of 0, no bytes or not finite): {', '.join(absent)}." if absent else ""
    if not shown:
        return blank(title, left_out or "No rows.")
    contexts = by_context(shown)
    figure = sheet(title, 0.9 + 5.8 * len(contexts))
    panels = figure.subplots(len(contexts), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    lines: dict[Any, list[Any]] = {axes: [] for axes in panels}
    for axes, (context, here) in zip(panels, contexts.items(), strict=True):
        axes.set(xscale="log", yscale="log")
        log_axis(axes.xaxis, lambda share: f"{100 * share:g} %")
        log_axis(axes.yaxis)
        axes.tick_params(labelbottom=True)
        for row in here:
            _point(axes, row, look_of(row))
        for colour, line, front in fronts_of(here):
            lines[axes] += axes.plot(*_steps(front), color=colour, linestyle=line, lw=1.3, zorder=1)
        axes.set_title(f"{context:,} tokens")
        axes.set_ylabel(KL)
    panels[-1].set_xlabel(BYTES)
    panels[0].set_xlim(log_limits([row["share"] for row in shown], 2, 1.8))
    panels[0].set_ylim(log_limits([value for row in shown for value in (row["kl"], *_interval(row))]))
    figure.legend(handles=list(legend), loc="outside right upper")
    if left_out:
        figure.supxlabel(left_out, x=0.01, ha="left", fontsize=11, color="#555555", wrap=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed for this layout
    for axes, here in zip(panels, contexts.values(), strict=True):
        notes = [
            Note(row["share"], row["kl"], row.get("label", row["cache"]), colour)
            for colour, _, front in fronts_of(here)
            for row in front
        ]
        annotate(axes, notes, [(row["share"], row["kl"]) for row in here], lines[axes])
    return figure


def _point(axes: Axes, row: Row, look: Mapping[str, Any]) -> None:
    x, y = row["share"], row["kl"]
    known = "kl_low" in row
    if known:
        axes.vlines([x], *_interval(row), color=look["color"], lw=1.2, alpha=0.6, zorder=2)
    (point,) = axes.plot([x], [y], **{"ls": "", "ms": 8, "mew": 1.5, **look}, zorder=3)
    interval = f" [{row['kl_low']:.3g}, {row['kl_high']:.3g}]" if known else ""
    set_tip(point, f"{row['cache']}: {100 * x:.3g} % of dense, KL {y:.3g}{interval}")


def _interval(row: Row) -> tuple[float, float]:
    """The 95 % interval as far as a log axis shows it: what reaches 0 ends two decades below. A row may have none."""
    if "kl_low" not in row:
        return row["kl"], row["kl"]
    return max(row["kl_low"], row["kl"] / 100), max(row["kl_high"], row["kl"])


def _drawable(row: Row) -> bool:
    return all(value > 0 and math.isfinite(value) for value in (row["share"], row["kl"]))


def _family(row: Row) -> str:
    return row["family"] if row["kind"] == "peer" else row["kind"]


def _front(rows: Sequence[Row]) -> list[Row]:
    best = pareto([(row["share"], row["kl"]) for row in rows])
    return [row for row, is_best in zip(rows, best, strict=True) if is_best]


def _steps(front: Sequence[Row]) -> tuple[list[float], list[float]]:
    """A line along a front: what so many bytes buy stays the same until the next point."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted((row["share"], row["kl"]) for row in front):
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    return [x for x, _ in corners], [y for _, y in corners]


def _key(label: str, **look: Any) -> Any:
    from matplotlib.lines import Line2D

    settings: dict[str, Any] = {"linestyle": "", "ms": 8, "mew": 1.5, **look}
    return Line2D([], [], label=label, **settings)


# ---- needles


@look()
def needles(cells: Sequence[Row]) -> Figure:
    """Share of needles found by depth and context: one map per cache, and per task and mode where there are several."""
    title = "Needles found, by depth and context"
    if not cells:
        return blank(title, "No rows.")
    kinds = list(dict.fromkeys((cell["task"], cell["mode"]) for cell in cells))
    maps = list(dict.fromkeys((cell["task"], cell["mode"], cell["cache"]) for cell in cells))
    contexts = sorted({cell["context"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    across = min(len(maps), max(1, min(4, 16 // len(contexts))))
    down = math.ceil(len(maps) / across)
    figure = sheet(
        f"{title}: {', '.join(kinds[0])}" if len(kinds) == 1 else title, 1.1 + down * (1.1 + 0.42 * len(depths))
    )
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for number, axes in enumerate(panels):
        axes.set_visible(number < len(maps))
        axes.tick_params(length=0, labelbottom=number + across >= len(maps))
    for axes, (task, mode, cache) in zip(panels, maps, strict=False):
        here = {
            (c["depth"], c["context"]): c for c in cells if (c["task"], c["mode"], c["cache"]) == (task, mode, cache)
        }
        mesh = _heat(axes, [[here.get((depth, context)) for context in contexts] for depth in depths])
        axes.set_title(cache if len(kinds) == 1 else f"{cache}\n{task}, {mode}", fontsize=11.5)
        axes.set_xticks([x + 0.5 for x in range(len(contexts))], [f"{context:,}" for context in contexts])
        axes.set_yticks([y + 0.5 for y in range(len(depths))], [f"{depth:.0%}" for depth in depths])
        axes.set_ylim(len(depths), 0)  # the text's beginning above
    figure.colorbar(mesh, ax=panels, label="share found", shrink=min(1.0, 2 / down), aspect=30)
    figure.supxlabel("context, tokens", fontsize=12)
    figure.supylabel("depth of the needle in the text", fontsize=12)
    return figure


def _heat(axes: Axes, table: Sequence[Sequence[Row | None]]) -> Any:
    """Scores (depths, contexts) as colours from 0 to 1 with the figure in each cell; None was not measured."""
    scores = [[cell["score"] if cell else math.nan for cell in line] for line in table]
    mesh = axes.pcolormesh(scores, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axes.set_facecolor("#eeeeee")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for y, line in enumerate(scores):
        for x, score in enumerate(line):
            text, colour = (
                ("-", "#555555") if math.isnan(score) else (f"{score:.2f}", "white" if score < 0.55 else "black")
            )
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour, fontsize=11)
    return mesh


# ---- memory


@look()
def memory(rows: Sequence[Row]) -> Figure:
    """Bytes by stage, one bar per cache and one line of panels per context, and next to them the peaks."""
    title = "Bytes held after decoding, by who pays for them"
    if not rows:
        return blank(title, "No rows.")
    contexts = by_context(rows)
    tall = [1.0 + 0.36 * len(here) for here in contexts.values()]
    peaks = any(row.get(key) is not None for row in rows for key in PEAKS)
    figure = sheet(title, 1.3 + sum(tall))
    panels = figure.subplots(
        len(tall), 1 + peaks, squeeze=False, height_ratios=tall, width_ratios=[2, 1][: 1 + peaks], sharey="row"
    )
    payers = list(dict.fromkeys(name for row in rows for name in _paid(row)))
    payers.sort(key=lambda name: (name == REST, name))
    colour = {name: COLOURS[i % 7] for i, name in enumerate(payers)} | {REST: "#bbbbbb"}
    for (axes, *beside), (context, here) in zip(panels, contexts.items(), strict=True):
        _bars(axes, here, payers, colour)
        axes.set_title(f"{context:,} tokens")
        for other in beside:
            _peaks(other, here)
    panels[-1][0].set_xlabel("bytes held, MiB (and as a share of the dense cache's)")
    marks = [_key("right after the prompt", color="black", marker="|", ms=13)]
    if peaks:
        panels[-1][1].set_xlabel("peak memory, MiB")
        marks += [
            _key(words, color="black", marker=mark, mfc="white" if mark == "D" else "black")
            for words, mark in PEAKS.values()
        ]
    bars = [_key(name, color=colour[name], marker="s", ms=11) for name in payers]
    figure.legend(handles=[*bars, *marks], loc="outside lower left", ncols=5)
    return figure


REST = "not split"
PEAKS = {"peak_prefill": ("peak of the prefill", "o"), "peak_decode": ("peak of decoding", "D")}


def _paid(row: Row) -> dict[str, int]:
    """Bytes by stage, whatever its settings; what no part accounts for is the last. Parts may share storage."""
    paid: dict[str, int] = {}
    for part in row["parts"]:
        name = part["payer"].partition("(")[0]
        name = "raw tokens and other parts (the stack)" if name == "stack" else name
        paid[name] = paid.get(name, 0) + part["nbytes"]
    rest = row["nbytes"] - sum(paid.values())
    return paid | {REST: rest} if rest > 0 else paid


def _bars(axes: Axes, rows: Sequence[Row], payers: Sequence[str], colour: Mapping[str, str]) -> None:
    for y, row in enumerate(rows):
        paid = _paid(row)
        left = 0.0
        for name in payers:
            if not paid.get(name):
                continue
            width = paid[name] / MIB
            (bar,) = axes.barh(y, width, left=left, color=colour[name], height=0.72, edgecolor="white", linewidth=0.5)
            set_tip(bar, f"{row['cache']}, {name}: {width:,.2f} MiB")
            left += width
        axes.plot([row["nbytes_prefill"] / MIB], [y], "|", color="black", ms=15, mew=1.8)
        of_dense = f" ({row['nbytes'] / row['dense_nbytes']:.1%})" if row["dense_nbytes"] else ""
        far = max(left, row["nbytes_prefill"] / MIB)
        text = f"{row['nbytes'] / MIB:,.2f}{of_dense}"
        axes.annotate(text, (far, y), (6, 0), textcoords="offset points", va="center", fontsize=10.5)
    axes.set_yticks(range(len(rows)), [row["cache"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.margins(x=0.22)  # for the figures at the bars' ends
    axes.set_xlim(left=0)


def _peaks(axes: Axes, rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        for key, (words, mark) in PEAKS.items():
            if row.get(key) is not None:
                peak = row[key] / MIB
                (point,) = axes.plot([peak], [y], mark, color="black", ms=7, mfc="white" if mark == "D" else "black")
                set_tip(point, f"{row['cache']}, {words}: {peak:,.1f} MiB")
    axes.tick_params(labelleft=False)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)


@look()
def growth(rows: Sequence[Row]) -> Figure:
    """Bytes per token of context, one line per cache."""
    return _lines(
        "Bytes held per token of context: lower is better",
        "KiB per token",
        [{**row, "value": row["nbytes_prefill"] / row["context"] / 1024} for row in rows],
        "KiB per token",
    )


# ---- speed


@look()
def decode(rows: Sequence[Row]) -> Figure:
    """Milliseconds per decoded token against context, one line per cache."""
    return _lines(
        "Time per decoded token: lower is better",
        "ms per token, typical",
        [{**row, "value": row["ms_typical"]} for row in rows],
        "ms",
    )


@look()
def length(rows: Sequence[Row]) -> Figure:
    """Microseconds per decoded token and token held, as one text grows; one line per cache."""
    return _lines(
        "Time per decoded token and token held, as a text grows: flat or falling is linear",
        "microseconds per token held",
        [{**row, "value": row["us_held"]} for row in rows],
        "us",
    )


def _lines(title: str, label: str, rows: Sequence[Row], unit: str) -> Figure:
    """`value` against context; the legend has the caches in the order of the lines' ends."""
    from matplotlib.ticker import NullFormatter, NullLocator

    rows = [row for row in rows if math.isfinite(row["value"])]
    if not rows:
        return blank(title, "No rows.")
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    figure = sheet(title, max(5.5, 1.5 + 0.27 * len(caches)))
    axes = figure.subplots()
    ends: list[tuple[int, float, Any]] = []
    others = 0
    for cache in caches:
        own = sorted((row for row in rows if row["cache"] == cache), key=lambda row: row["context"])
        dense = own[0]["kind"] == "dense"
        style = {"color": "black", "marker": "o", "lw": 2.5} if dense else _line_look(others, own[0]["kind"])
        others += not dense
        (line,) = axes.plot([row["context"] for row in own], [row["value"] for row in own], label=cache, **style)
        set_tip(line, f"{cache}: " + "; ".join(f"{row['value']:.3g} {unit} at {row['context']:,}" for row in own))
        ends.append((own[-1]["context"], own[-1]["value"], line))
    contexts = sorted({row["context"] for row in rows})
    values = [row["value"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_xlim(log_limits(contexts, 1.1, 1.1))
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        axes.set_ylabel(f"{label} (log)")
    else:
        axes.set_ylim(0, 1.08 * max(values) or 1)
        axes.set_ylabel(label)
    axes.set_xlabel("context, tokens (log)")
    ends.sort(key=lambda end: end[:2], reverse=True)
    figure.legend(handles=[line for *_, line in ends], loc="outside right upper")
    return figure


def _line_look(number: int, kind: str) -> dict[str, Any]:
    line = {"peer": "--", "control": ":"}.get(kind, "-")
    marker = MARKERS[(number + number // 7) % len(MARKERS)]
    return {"color": COLOURS[number % 7], "marker": marker, "ls": line, "lw": 1.7, "ms": 7}
