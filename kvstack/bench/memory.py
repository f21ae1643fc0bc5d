"""Bytes a cache holds, by stage, and the peak of its prefill.

The peak is that of the process: what its resident memory grew to during the prefill, less what it was before. It
is measured in a process of its own for each cache, and on Linux, whose kernel can reset the high-water mark; it
cannot be measured from inside Python, whose tracers do not see torch's memory.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import KVStack, Report
from ..errors import KVStackError
from ..report import Part
from . import common
from .common import Run, Subject, Variant

__all__ = ["CONTEXTS", "STACKS", "measure", "run"]

CONTEXTS = (4096,)
STACKS = ("empty", "evict:0.2", "quant:4", "quant:2", "quant:2+evict:0.2", "hqq:4", "hqq:2")
WARM_UP = 64
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(run: Run, decode: int, peak: bool) -> None:
    variants = common.chosen(run)
    for context in run.contexts:
        if peak:
            found = [_in_own_process(run, variant.label, context, decode) for variant in variants]
        else:
            with common.opened(run) as subject:
                found = [measure(subject, variant, context, decode, run.seed, peak=False) for variant in variants]
        dense = found[0]
        for row in found:
            row["share_prefill"] = row["nbytes_prefill"] / dense["nbytes_prefill"]
            row["share"] = row["nbytes"] / dense["nbytes"]
        _show(f"memory at {context:,} tokens: {dense['model']}, {run.dtype}", found, decode)
        common.write("memory", run, dense["model"], found)


def measure(subject: Subject, variant: Variant, context: int, decode: int, seed: int, peak: bool) -> dict[str, Any]:
    """Prefill `context` tokens, decode `decode` more; what was held after each, and the peak of the prefill."""
    ids = subject.tokens(context, seed)
    # the weights come into memory when they are first used, and so does what the math libraries reserve
    common.prefill(subject.model, ids[:, :WARM_UP], variant.make(subject.model))
    gc.collect()
    before = _reset_peak() if peak else None
    cache = variant.make(subject.model)
    token = common.prefill(subject.model, ids, cache)
    grown = None if before is None else _resident("VmHWM") - before
    prefilled = common.held_bytes(cache)
    for _ in range(decode):
        token = common.step(subject.model, token, cache)
    return {
        "model": subject.name,
        "context": context,
        "variant": variant.label,
        "decoded": decode,
        "nbytes_prefill": prefilled,
        "nbytes": common.held_bytes(cache),
        "peak_prefill": grown,
        "report": cache.report().to_dict() if isinstance(cache, KVStack) else None,
    }


# ---- the peak


def _resident(name: str) -> int:
    """Bytes behind a field of the process' status: VmRSS is resident memory now, VmHWM its high-water mark."""
    found = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _reset_peak() -> int | None:
    """Bring the high-water mark down to what is resident now, which is returned; None where there is no way to."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _in_own_process(run: Run, label: str, context: int, decode: int) -> dict[str, Any]:
    job = {"run": asdict(run) | {"json": None}, "label": label, "context": context, "decode": decode}
    with common.progress(f"measuring {label} at {context:,} tokens"):
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(job)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise KVStackError(f"measuring {label} failed:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _serve(job: Mapping[str, Any]) -> None:
    run = Run(**job["run"])
    variant = next(v for v in common.variants([job["label"]]) if v.label == job["label"])
    with common.opened(run) as subject:
        print(json.dumps(measure(subject, variant, job["context"], job["decode"], run.seed, peak=True)))


# ---- the table


def _show(title: str, found: Sequence[Mapping[str, Any]], decode: int) -> None:
    rows = [
        [
            row["variant"],
            common.mib(row["nbytes_prefill"]),
            f"{row['share_prefill']:.1%}",
            common.mib(row["nbytes"]),
            f"{row['share']:.1%}",
            "-" if row["peak_prefill"] is None else common.mib(row["peak_prefill"]),
        ]
        for row in found
    ]
    columns = ("cache", "MiB", "of dense", f"MiB, {decode} tokens later", "of dense", "peak of the prefill, MiB")
    caption = "peak: what the process grew by at most during the prefill, activations included"
    common.table(title, columns, rows, caption)
    for row in found:
        if row["report"] is not None:
            parts = [Part(**part) for part in row["report"]["parts"]]
            kept = {name: row["report"][name] for name in ("stack", "seen", "held", "nbytes", "dense_nbytes")}
            common.console().print(Report(parts=parts, **kept))


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
