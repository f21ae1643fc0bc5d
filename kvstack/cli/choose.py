"""`kvstack choose`: candidates for a budget are measured, and the best one is printed as lines to paste."""

from __future__ import annotations

import re
from typing import Any

import kvstack

from ..bench.measure import choose
from ..bench.measure.run import Run
from ..bench.show import summary, tables
from ..bench.show.units import nats
from ..bench.show.units import share as percent
from ..bench.terminal import say
from ..errors import KVStackError

__all__ = ["run"]

BURST = 4
"""Tokens before the next cache's turn."""


def run(run: Run, share: float, max_kl: float | None, windows: int, score: int, steps: int) -> None:
    """Measure, print the table, and the stack that is chosen.

    Raises:
        KVStackError: no candidate is as small, or drifts as little, as was asked for.
    """
    drifts, speeds = choose.run(run, share, windows, score, steps, BURST)
    tables.choose(drifts, speeds)
    rows = {row["cache"]: row for row in summary.quality(drifts.rows, drifts.environment["seed"])}
    spec = choose.best(drifts, speeds, share, max_kl)
    if spec is None:
        least = choose.best(drifts, speeds, share)
        if least is None:
            raise KVStackError(
                f"no stack that works with this model holds {share:g} of the bytes. Use a larger --bytes."
            )
        raise KVStackError(
            f"no stack has a KL of {max_kl:g} or less; the least is {nats(rows[least]['kl'])}, of {least}. "
            "Use a larger --bytes, or a larger --max-kl."
        )
    speed = next(row for row in speeds.rows if row["cache"] == spec)
    for line in _told(spec, rows[spec], speed):
        say(line)


def _told(spec: str, row: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """The stack as a spec and in Python, with what was measured."""
    code = repr(kvstack.KVStack.from_spec(spec))
    names = sorted(name for name in set(re.findall(r"\w+", code)) if name in kvstack.__all__)
    measured = (
        f"# {percent(row['share'])} of the bytes, KL {nats(row['kl'])}, top-1 {row['top1']:.1%}, "
        f"{speed['speed_typical']:.2f}x the decoding speed of a dense cache"
    )
    return ["", measured, f'KVStack.from_spec("{spec}")', "", f"from kvstack import {', '.join(names)}", code]
