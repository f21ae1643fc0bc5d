"""The tables that a benchmark prints on the terminal: one function for each kind of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.table import Table

from ...report import Part, Report
from ..results import Figures
from ..terminal import console
from . import summary
from .units import FITTED, FITTED_CAPTION, fitted, mib, nats, share

__all__ = [
    "answers",
    "axes",
    "batch",
    "beyond",
    "budgets",
    "calibration",
    "choose",
    "decode",
    "device",
    "fork",
    "layers",
    "length",
    "matrix",
    "memory",
    "needles",
    "quality",
    "step",
]

Row = Mapping[str, Any]


def quality(figures: Figures) -> None:
    """Drift and bytes of every cache at one context."""
    rows = summary.quality(figures.rows, figures.environment["seed"])
    domains = list(rows[0]["domains"])
    lines = [
        [
            row["cache"],
            share(row["share"]) + (" *" if row["simulated"] else ""),
            *fitted(row),
            *(nats(row["domains"][name]) for name in domains),
            nats(row["kl"]),
            f"{nats(row['kl_low'])} - {nats(row['kl_high'])}" if row["kl"] else "",
            nats(row["kl_q99"]),
            f"{row['top1']:.1%}",
            f"{row['nll']:.3f}",
        ]
        for row in rows
    ]
    scored = figures.rows[0]["score"]
    title = f"{rows[0]['context']:,} tokens compressed, the next {scored} scored: {_where(figures)}"
    columns = (
        "cache",
        "bytes",
        *FITTED,
        *(f"KL, {name}" for name in domains),
        "KL, all",
        "95 %",
        "q99",
        "top-1",
        "NLL",
    )
    caption = (
        f"{rows[0]['scored']:,} tokens scored; bytes as a share of a bfloat16 dense cache's"
        + (" (*: as the method counts them; they are not freed)" if any(row["simulated"] for row in rows) else "")
        + "; 95 %: bootstrap interval of the mean"
    )
    _print(title, columns, lines, caption)


def budgets(figures: Sequence[Figures]) -> None:
    """The best stack and the best peer at equal bytes, from the figures of quality of each context."""
    rows = [row for some in figures for row in summary.budgets(some.rows, seed=some.environment["seed"])]
    lines = [
        [
            f"{row['context']:,}",
            f"{row['budget']:.4g}",
            *_best(row["stack"]),
            *fitted(row["stack"] or {}),
            *_best(row["peer"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2g} ({row['ratio_low']:.2g} - {row['ratio_high']:.2g})",
        ]
        for row in rows
    ]
    columns = ("context", "budget", "best stack", "bytes", "KL", *FITTED, "best peer", "bytes", "KL", "KL stack / peer")
    caption = "no cache of a row holds more than the budget, a share of dense bytes"
    _print("at equal bytes", columns, lines, caption)


def _best(row: Row | None) -> tuple[str, str, str]:
    if row is None:
        return "-", "", ""
    return row["cache"] + (" *" if row["simulated"] else ""), share(row["share"]), nats(row["kl"])


def choose(drifts: Figures, speeds: Figures) -> None:
    """Drift and speed of the candidates for one budget."""
    rows, speed = summary.quality(drifts.rows, drifts.environment["seed"]), {row["cache"]: row for row in speeds.rows}
    lines = [
        [
            row["cache"],
            share(row["share"]),
            *fitted(row),
            nats(row["kl"]),
            f"{row['top1']:.1%}",
            f"{speed[row['cache']]['ttft_ms']:,.0f}",
            f"{speed[row['cache']]['ms_typical']:,.1f}",
            f"{speed[row['cache']]['speed_typical']:.2f}x",
        ]
        for row in rows
    ]
    title = f"{rows[0]['context']:,} tokens compressed, the next {drifts.rows[0]['score']} scored: {_where(drifts)}"
    columns = ("stack", "bytes", *FITTED, "KL", "top-1", "first token, ms", "ms a token", "decode speed")
    caption = (
        f"{rows[0]['scored']:,} tokens scored; bytes as a share of a bfloat16 dense cache's; KL from the dense cache, "
        "in nats; top-1: how often the likeliest next token is the same; speed: 2x is twice as fast as the dense cache"
    )
    _print(title, columns, lines, caption)


def needles(figures: Figures) -> None:
    """Answers found by every cache, of one task, mode and context; nothing where nobody was asked."""
    rows = summary.needles(figures.rows, figures.environment["seed"])
    if not rows:
        return
    lines = [
        [
            row["cache"],
            f"{row['score']:.2f}",
            f"{row['low']:.2f} - {row['high']:.2f}",
            share(row["share"]),
            *fitted(row),
        ]
        for row in rows
    ]
    title = f"{rows[0]['task']}, {rows[0]['mode']}, {rows[0]['context']:,} tokens: {_where(figures)}"
    caption = f"share of the answers found in {rows[0]['samples']} texts, bootstrap interval"
    _print(title, ("cache", "found", "95 %", "bytes of a bf16 cache", *FITTED), lines, caption)


def answers(figures: Figures) -> None:
    """Scores and bytes of every cache, for each task and for all rows."""
    caches = dict.fromkeys(row["cache"] for row in figures.rows)
    tasks = sorted({row["task"] for row in figures.rows})
    lines = []
    for cache in caches:
        mine = [row for row in figures.rows if row["cache"] == cache]
        each = ([row["score"] for row in mine if row["task"] == task] for task in tasks)
        scores = [f"{mean(some):.3f}" for some in each] if len(tasks) > 1 else []
        held = share(mean(row["share"] for row in mine))
        lines.append([cache, held, *fitted(mine[-1]), *scores, f"{mean(row['score'] for row in mine):.3f}"])
    columns = ("cache", "bytes of a bf16 cache", *FITTED, *(tasks if len(tasks) > 1 else ()), "score")
    title = f"{figures.rows[0]['dataset']}, {len(figures.rows) // len(caches)} questions: {_where(figures)}"
    _print(title, columns, lines, "mean scores from 0 to 1; bytes held when an answer was given")


def memory(figures: Figures) -> None:
    """Bytes and peaks of every cache at one context, then the parts of every stack."""
    rows = figures.rows
    lines = [
        [
            row["cache"],
            mib(row["nbytes_prefill"]),
            f"{row['nbytes_prefill'] / row['dense_nbytes_prefill']:.1%}",
            f"{row['nbytes_prefill'] / row['context']:,.0f}",
            mib(row["nbytes"]),
            f"{row['nbytes'] / row['dense_nbytes']:.1%}",
            *fitted(row),
            *("-" if row[name] is None else mib(row[name]) for name in ("peak_prefill", "peak_decode")),
        ]
        for row in rows
    ]
    title = f"memory at {rows[0]['context']:,} tokens: {_where(figures)}"
    later = f"MiB, {rows[0]['decode']} later"
    columns = (
        "cache",
        "MiB",
        "of dense",
        "bytes a token",
        later,
        "of dense",
        *FITTED,
        "peak of prefill",
        "of decoding",
    )
    caption = (
        "peaks in MiB: what the process grew by at most, activations and what the allocator keeps included; later: "
        "tokens decoded"
    )
    _print(title, columns, lines, caption)
    for row in rows:
        if row["report"] is not None:
            parts = [Part(**part) for part in row["report"]["parts"]]
            totals = {name: row["report"][name] for name in ("stack", "seen", "held", "nbytes", "dense_nbytes")}
            console().print(Report(parts=parts, model_nbytes=row.get("model_nbytes", 0), **totals))


def decode(figures: Figures) -> None:
    """Times of every cache at one context, the dense one first."""
    dense, *_ = rows = figures.rows
    lines = [
        [
            row["cache"],
            f"{row['ttft_ms']:,.0f}",
            "" if row is dense else f"{row['ttft_cost']:+.1%}",
            f"{row['ttft_cost_low']:+.1%} .. {row['ttft_cost_high']:+.1%}",
            f"{row['ms_typical']:.1f}",
            f"{row['ms_mean']:.1f}",
            *_speed(row),
            f"{row['speed_mean']:.2f}x",
            *_size(row, dense),
            *fitted(row),
            "" if row.get("peak_decode") is None else mib(row["peak_decode"]),
            row.get("reader", ""),
        ]
        for row in rows
    ]
    title = f"{dense['context']:,} tokens: {_where(figures)}, {figures.environment['threads']} threads"
    columns = ("cache", "first, ms", "cost", "range", "ms, typical", "ms, mean", "speed", "quartiles", "speed, mean")
    caption = (
        f"first: time to the first token, median of {len(dense['prefills_ms'])}; {dense['tokens']} tokens decoded "
        "with each cache; the mean includes the occasional slow steps that seal or quantize a block; ms: those of the "
        "dense cache, divided by the speed; peak: what the process grew by, less the model"
    )
    _print(title, (*columns, "MiB", "of dense", *FITTED, "peak, MiB", "reader"), lines, caption)


def device(figures: Figures) -> None:
    """Times, memory and readers of every cache at one context, the dense one first."""
    dense, *_ = rows = figures.rows
    lines = [
        [
            row["cache"],
            f"{row['ttft_ms']:,.0f}",
            f"{row['ms_typical']:.1f}",
            *_speed(row),
            *_size(row, dense),
            *fitted(row),
            *(mib(row[name]) if row.get(name) is not None else "-" for name in ("peak_prefill", "peak_decode")),
            row["reader"] or "-",
            "-" if row["differs"] is None else f"{row['differs']:.1e}",
        ]
        for row in rows
    ]
    where = figures.environment["hardware"]
    title = f"{dense['context']:,} tokens: {_where(figures)}, {where}"
    columns = ("cache", "first, ms", "ms", "speed", "quartiles", "MiB", "of dense", *FITTED)
    peaks = ("peak of prefill", "of decoding")
    caption = (
        f"first: time to the first token, median of {len(dense['prefills_ms'])}; ms: of a token, the median of "
        f"{len(dense['bursts_ms'])} bursts; peaks in MiB, the cache and all that it needs, on a GPU; differs: "
        "the largest difference of a logit to reading in plain torch, as a share of the largest logit"
    )
    _print(title, (*columns, *peaks, "reader", "differs"), lines, caption)


def matrix(qualities: Figures, speeds: Figures) -> None:
    """Every combination of stages at one context, the largest first."""
    rows = summary.matrix(qualities.rows, speeds.rows, qualities.environment["seed"])
    lines = [
        [
            row["transform"],
            row["encode"],
            row["evict"],
            share(row["share"]),
            *fitted(row),
            nats(row["kl"]),
            f"{nats(row['kl_low'])} - {nats(row['kl_high'])}",
            f"{row['top1']:.1%}",
            "" if row["speed"] is None else f"{row['speed']:.2f}x",
            "yes" if row["pareto"] else "",
        ]
        for row in sorted(rows, key=lambda row: -row["share"])
    ]
    title = f"{qualities.rows[0]['context']:,} tokens: {_where(qualities)}"
    columns = ("transform", "encode", "evict", "bytes", *FITTED, "KL", "95 %", "top-1", "speed", "front")
    _print(title, columns, lines, "front: no other combination holds fewer bytes and drifts less")


def batch(figures: Figures) -> None:
    """Decoding several rows at once, with every cache."""
    rows = figures.rows
    lines = [
        [
            row["cache"],
            f"{row['ms']:.1f}",
            f"{row['tokens_s']:.1f}",
            f"{row['speed']:.2f}x",
            f"{row['of_alone']:.2f}",
            mib(row["nbytes"]),
            f"{row['nbytes'] / row['dense_nbytes']:.1%}",
            *fitted(row),
        ]
        for row in rows
    ]
    first = rows[0]
    title = f"{first['rows']} rows, {first['texts']}, up to {first['context']:,} tokens: {_where(figures)}"
    columns = ("cache", "ms a step", "tokens a second", "speed", "of rows alone", "MiB", "of dense", *FITTED)
    caption = (
        f"{first['steps']} steps; speed: the dense cache's time over the own; of rows alone: the own time over that of "
        "the same rows, one after the other"
    )
    _print(title, columns, lines, caption)


def length(figures: Figures) -> None:
    """Print the cost of a token in one cache, at growing lengths."""
    rows = figures.rows
    lines = [
        [
            f"{row['context']:,}",
            f"{row['held']:,}",
            f"{row['ms_typical']:.1f}",
            f"{row['ms_mean']:.1f}",
            f"{row['ms_most']:.1f}",
            f"{row['us_held']:.2f}",
            f"{row['ms_read']:.2f}",
            mib(row["nbytes"]),
            f"{row['nbytes'] / row['held']:,.0f}",
            *fitted(row),
        ]
        for row in rows
    ]
    title = f"{rows[0]['cache']}: {_where(figures)}, {figures.environment['threads']} threads"
    columns = (
        "tokens",
        "held",
        "ms, typical",
        "mean",
        "most",
        "us a held token",
        "ms to read one",
        "MiB",
        "bytes each",
        *FITTED,
    )
    caption = f"{rows[0]['steps']} tokens decoded at each length; us: the mean, divided by the tokens held"
    _print(title, columns, lines, caption)


def axes(figures: Figures) -> None:
    """Bytes, products and errors of smaller blocks."""
    rows = figures.rows
    names = [name for name in rows[0] if name.startswith("error_")]
    lines = [
        [
            row["variant"],
            f"{row['block']:,}",
            mib(row["axes_nbytes"]),
            *("-" if row[name] is None else f"{row[name]:.2%}" for name in names),
            f"{row['products_0.65'] / 1e6:.2f}",
        ]
        for row in rows
    ]
    budgets = [
        f"of {int(name[9:]):,}" if name.startswith("error_at_") else f"keep {name.removeprefix('error_')}"
        for name in names
    ]
    columns = ("block", "numbers", "MiB of axes", *budgets, "key products")
    caption = (
        "error left, as a share of the energy: with CommonKV(keep) and Quant(2), and of so many tokens with a tenth of "
        "the bytes of a bf16 cache for cache and axes together; products: millions of multiply-adds to rebuild the "
        "keys of a token at keep 0.65"
    )
    _print(f"axes of groups of {rows[0]['layers']} layers: {_where(figures)}", columns, lines, caption)


def calibration(figures: Figures) -> None:
    """Print the cost of calibrating."""
    lines = [
        [
            row["variant"],
            f"{row['layers']}",
            f"{row['blocks']} of {row['block']:,}",
            f"{row['tokens']:,}",
            f"{row['passes']}",
            mib(row["nbytes"]),
            f"{row['nbytes'] / row['dense_nbytes']:,.0f}",
            mib(row["peak_nbytes"]),
            *("-" if row.get(name) is None else f"{row[name]:,.0f}" for name in ("reading", "axes")),
            "-" if row.get("grown_nbytes") is None else mib(row["grown_nbytes"]),
        ]
        for row in figures.rows
    ]
    columns = (
        "model", "layers a group", "blocks", "tokens", "passes", "file, MiB", "tokens of a dense cache", "memory, MiB",
        "s reading", "s axes", "MiB, measured",
    )  # fmt: skip
    caption = (
        "tokens of a dense cache: so many, in bfloat16, take as much as the file; memory: without the model, as "
        "planned; measured: what the process grew by"
    )
    _print(f"calibration: {_where(figures)}", columns, lines, caption)


def layers(figures: Figures) -> None:
    """Cosines between the layers of a group."""
    lines = [[row["variant"], f"{row['ends']:.3f}", f"{row['pairs']:.3f}"] for row in figures.rows]
    title = f"groups of {figures.rows[0]['layers']} layers: {_where(figures)}"
    _print(title, ("cosine of", "first and last", "all pairs"), lines)


def step(figures: Figures) -> None:
    """Print the time of each part of a step, at one context."""
    rows = figures.rows
    parts = list(rows[0]["parts"])
    lines = [[row["cache"], f"{row['ms']:.1f}", *(f"{row['parts'][part]:.1f}" for part in parts)] for row in rows]
    title = f"{rows[0]['context']:,} tokens: {_where(figures)}, {figures.environment['threads']} threads"
    caption = f"milliseconds of a step, the mean of {rows[0]['steps']}; being timed takes a little of them"
    _print(title, ("stack", "ms", *parts), lines, caption)


def beyond(figures: Figures) -> None:
    """Perplexity of the parts of a long text, read with one cache."""
    rows = figures.rows
    firsts = [0, *(row["context"] for row in rows)]
    lines = [
        [
            f"{first:,} - {row['context']:,}",
            f"{row['nll']:.3f}",
            f"{row['perplexity']:,.2f}",
            f"{row['held']:,}",
            mib(row["nbytes"]),
        ]
        for first, row in zip(firsts, rows, strict=False)
    ]
    title = f"{rows[0]['cache']}: {_where(figures)}"
    caption = (
        f"{rows[0]['feed']} tokens fed at once; NLL of the true next token in nats; bytes held at the end of a part"
    )
    _print(title, ("tokens", "NLL", "perplexity", "held", "MiB"), lines, caption)


def fork(figures: Figures) -> None:
    """Times to the first token of a question about a text that was read, and what its branches hold, at one context."""
    rows = figures.rows
    columns = (
        "stack",
        "read again, ms",
        "copy",
        "fork",
        "again / fork",
        "MiB",
        "a fork, KiB",
        "after the question, KiB",
    )
    lines = [
        [
            row["cache"],
            *(f"{row[f'ms_{way}']:.1f}" for way in ("again", "copy", "fork")),
            f"{row['ms_again'] / row['ms_fork']:.1f}x",
            mib(row["nbytes"]),
            *(f"{row[name] / 1024:,.1f}" for name in ("nbytes_forked", "nbytes_asked")),
        ]
        for row in rows
    ]
    title = f"{rows[0]['context']:,} tokens: {_where(figures)}, {figures.environment['threads']} threads"
    caption = (
        f"time to the first token of a question of {rows[0]['question']} tokens; KiB that a fork adds to the stack"
    )
    _print(title, columns, lines, caption)


def _speed(row: Row) -> tuple[str, str]:
    """Its median and quartiles."""
    return f"{row['speed_typical']:.2f}x", f"{row['speed_low']:.2f} - {row['speed_high']:.2f}"


def _size(row: Row, dense: Row) -> tuple[str, str]:
    """Bytes, and their share of those of the dense cache."""
    return mib(row["nbytes"]), f"{row['nbytes'] / dense['nbytes']:.1%}"


def _where(figures: Figures) -> str:
    return f"{figures.environment['model']}, {figures.environment['dtype']}"


def _print(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "") -> None:
    """A table whose first column is text and whose others are numbers. What was fitted to the model has columns only
    where a row tells of it."""
    empty = {i for i, column in enumerate(columns) if column in FITTED and not any(line[i] for line in lines)}
    shown = [i for i in range(len(columns)) if i not in empty]
    if set(FITTED) <= {columns[i] for i in shown}:
        caption = "; ".join(filter(None, [caption, FITTED_CAPTION]))
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for i in shown:
        table.add_column(columns[i], justify="right" if i else "left")
    for line in lines:
        table.add_row(*(line[i] for i in shown))
    console().print(table)
