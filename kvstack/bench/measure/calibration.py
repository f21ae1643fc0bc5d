"""The cost of calibrating a model: tokens to read, memory, the file. Computed from its shape alone, on the meta device;
or measured on random weights, in a process of its own: its growth, and the time of each part."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ... import calibrate
from ...calibration.plan import calibration_plan
from ...model.probing import token_shapes
from .. import terminal
from ..results import Figures, Results
from .memory import job_of, reset_peak, resident, told_by
from .run import Run, environment
from .subject import shaped

__all__ = ["measure", "plan", "run"]


def run(run: Run, shapes: Sequence[str], really: bool) -> Iterator[Figures]:
    """One row for each shape."""
    results = Results("calibration", run.out, environment(run, "random weights"))
    keys = [{"variant": shape, "really": really} for shape in shapes]
    with terminal.steps("calibration", len(keys)) as progress:
        for shape, key in zip(shapes, keys, strict=True):
            if results.get(**key) is None:
                done = told_by("calibration", job_of(run, shape=shape)) if really else {}
                results.add(plan(run, shape) | done, **key)
                progress.step(shape)
            else:
                progress.skip()
    yield results.figures(keys)


def plan(run: Run, shape: str) -> dict[str, Any]:
    """Return the plan of a calibration for a model of this shape; no weights are drawn."""
    model = shaped(replace(run, device="meta"), shape).model
    made = calibration_plan(model)
    return {
        "layers": made.groups.size,
        "blocks": len(made.blocks),
        "block": made.widest,
        "tokens": made.tokens,
        "passes": len(made.passes),
        "nbytes": made.nbytes,
        "peak_nbytes": made.peak_nbytes,
        "dense_nbytes": 2 * sum(heads * (keys + values) for heads, keys, values in token_shapes(model).values()),
    }


def measure(run: Run, shape: str) -> dict[str, Any]:
    """Calibrate a random model of this shape: seconds of the parts, what the process grew by at most, the file."""
    torch.set_num_threads(run.threads)
    subject = shaped(run, shape)
    before = reset_peak()
    found = calibrate(subject.model, tokenizer=subject.tokenizer)
    grown = None if before is None else resident("VmHWM") - before
    parts = (part.rsplit(" ", 1) for part in found.manifest["seconds"].split(", "))
    return {
        **{name: float(seconds) for name, seconds in parts},
        "grown_nbytes": grown,
        "nbytes": found.nbytes,
    }


def _job(job: Mapping[str, Any]) -> dict[str, Any]:
    return measure(Run(**job["run"]), job["shape"])


if __name__ == "__main__":
    print(json.dumps(_job(json.loads(sys.argv[1]))))
