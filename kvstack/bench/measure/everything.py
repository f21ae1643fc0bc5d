"""All benchmarks one after the other, then the report."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from ..show import report
from ..show import tables as show
from . import budgets, decode, matrix, memory, needles, quality
from .run import Run

__all__ = ["run"]

SAMPLES = 3


def run(run: Run) -> None:
    """Each with fewer samples than alone, and with its usual contexts and caches where `run` names none. Without a
    folder the figures go into a temporary one, and no report is written."""
    with tempfile.TemporaryDirectory() as scratch:
        told = replace(run, out=run.out or Path(scratch))
        quality.run(told.usually(quality.CONTEXTS, quality.STACKS), windows=1, score=256)
        budgets.run(told.usually(budgets.CONTEXTS, budgets.STACKS), windows=1, score=256)
        asking = needles.Asking(tasks=needles.TASKS[:2], samples=SAMPLES)
        needles.run(told.usually(needles.CONTEXTS, needles.STACKS), asking)
        # bytes are those of the dtype that models are served in
        narrow = replace(told, dtype="bfloat16").usually(memory.CONTEXTS[:2], memory.STACKS)
        memory.run(narrow, decode=16, peak=not run.tiny)
        decode.run(told.usually(decode.CONTEXTS[:2], decode.STACKS), rounds=1 if run.tiny else 2, steps=32, burst=8)
        grid = matrix.combinations(matrix.TRANSFORMS, matrix.ENCODES, matrix.EVICTS)
        matrix.run(told.usually(matrix.CONTEXTS), grid, windows=1, score=256, steps=16, burst=4)
        if run.out is not None:
            show.console().print(f"report: {report.write(run.out)}", highlight=False)
