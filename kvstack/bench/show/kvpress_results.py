"""Answers as files in the layout that kvpress' evaluation writes, one folder for each cache.

    DATASET__DATA_DIR__MODEL__CACHE__RATIO/
        predictions.csv    all columns but the context, the answers, the share of bytes that is saved
        metrics.json       the scores
        config.yaml        what was run

The ratio is 1 less the share of a dense cache's bytes that was really held when an answer was given, the mean over all
rows. So it may differ from what a method promises.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ...errors import KVStackError
from ..results import Figures

__all__ = ["write"]


def write(
    folder: Path,
    figures: Figures,
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    codes: Mapping[str, str],
    metrics: Callable[[Sequence[str]], Any],
) -> list[Path]:
    """Write the results of every cache that has answered all `rows`. Returns the folders.

    Args:
        rows: the columns of each row of the file.
        config: `dataset`, `data_dir` and other settings of kvpress' configuration, in its names.
        codes: cache -> the Python line that makes it.
        metrics: answers to all rows -> their scores.
    """
    made = []
    for cache in dict.fromkeys(row["cache"] for row in figures.rows):
        mine = [row for row in figures.rows if row["cache"] == cache]
        if len(mine) != len(rows):
            raise KVStackError(f"{cache} has answered {len(mine)} of {len(rows)} rows. Measure them all.")
        ratio = 1 - mean(row["share"] for row in mine)
        name = "no_press" if cache == "dense" else re.sub(r"[^\w.,=@+-]+", "_", cache)
        told = {
            **config,
            "model": figures.environment["model"],
            "device": figures.environment["device"],
            "press_name": name,
            "compression_ratio": 0.0 if cache == "dense" else round(ratio, 4),
            "press_init_command": codes[cache],
            "seed": figures.environment["seed"],
        }
        place = _empty(folder / _name(told))
        _predictions(place / "predictions.csv", mine, rows)
        scores = metrics([row["answer"] for row in mine])
        (place / "metrics.json").write_text(json.dumps(scores, indent=4), encoding="utf-8")
        (place / "config.yaml").write_text(_yaml(told), encoding="utf-8")
        made.append(place)
    return made


def _name(config: Mapping[str, Any]) -> str:
    parts = [
        config["dataset"],
        config["data_dir"] or "",
        str(config["model"]).replace("/", "--"),
        config["press_name"],
        f"{config['compression_ratio']:.2f}",
    ]
    if config["fraction"] < 1:
        parts.append(f"fraction{config['fraction']:.3f}")
    if config["max_context_length"] is not None:
        parts.append(f"max_context{config['max_context_length']}")
    if config["query_aware"]:
        parts.append("query_aware")
    return "__".join(filter(None, parts))


def _empty(folder: Path) -> Path:
    """A new folder, with a number in it where there are results already, which are never overwritten."""
    number, place = 0, folder
    while place.exists():
        number += 1
        place = folder / str(number)
    place.mkdir(parents=True)
    return place


def _predictions(path: Path, mine: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    columns = [name for name in rows[0] if name != "context"]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*columns, "predicted_answer", "compression_ratio"])
        for row, told in zip(rows, mine, strict=True):
            table.writerow([*(row.get(name) for name in columns), told["answer"], round(1 - told["share"], 6)])


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml  # transformers needs it too

    return str(yaml.safe_dump(dict(config), sort_keys=False))
