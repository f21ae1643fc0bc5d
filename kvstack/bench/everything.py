"""All benchmarks one after the other, then the report."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from . import budgets, decode, matrix, memory, needles, quality, report, show
from .run import Run

__all__ = ["run"]

TINY = (512,)
SAMPLES = 3


def run(run: Run) -> None:
    """Each with its usual contexts and caches where `run` names none. Without a folder the figures go into a temporary
    one, and no report is written."""
    with tempfile.TemporaryDirectory() as scratch:
        told = replace(run, out=run.out or Path(scratch))

        def usual(contexts: tuple[int, ...], stacks: tuple[str, ...] = ()) -> Run:
            return replace(told, contexts=run.contexts or (TINY if run.tiny else contexts), stacks=run.stacks or stacks)

        few = 2 if run.tiny else SAMPLES
        quality.run(usual(quality.CONTEXTS, quality.STACKS), windows=1, score=256)
        budgets.run(usual(budgets.CONTEXTS, budgets.STACKS), windows=1, score=256)
        needles.run(usual(needles.CONTEXTS, needles.STACKS), needles.Asking(tasks=needles.TASKS[:2], samples=few))
        memory.run(replace(usual(memory.CONTEXTS[:2], memory.STACKS), dtype="bfloat16"), decode=16, peak=not run.tiny)
        decode.run(usual(decode.CONTEXTS[:2], decode.STACKS), rounds=1 if run.tiny else 2, steps=32, burst=8)
        grid = matrix.combinations(matrix.TRANSFORMS, matrix.ENCODES, matrix.EVICTS)
        matrix.run(usual(matrix.CONTEXTS), grid, windows=1, score=256, steps=16, burst=4)
        if run.out is not None:
            show.console().print(f"report: {report.write(run.out)}", highlight=False)
