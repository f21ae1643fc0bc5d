"""Bytes a cache holds, by stage, and the peaks of its prefill and of decoding.

A peak is that of the process: what its resident memory grew to meanwhile, less what it was before the prefill. It is
measured in a process of its own for each cache, and on Linux, whose kernel can reset the high-water mark; it cannot
be measured from inside Python, whose tracers do not see torch's memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from ... import KVStack, models
from ...errors import KVStackError
from .. import terminal
from ..results import Figures, Results
from . import sizes, variants
from .run import Run, environment
from .subject import Subject, opened, prefill, step
from .variants import Variant

__all__ = [
    "CONTEXTS",
    "STACKS",
    "Growth",
    "growth",
    "in_own_process",
    "job_of",
    "measure",
    "reset_peak",
    "resident",
    "run",
    "told_by",
]

CONTEXTS = (1024, 4096, 7680)
STACKS = (
    "empty",
    "evict:0.2",
    "quant:4",
    "quant:2",
    "quant:2+evict:0.2",
    "commonkv+quant:2+evict:0.2",
    "hqq:4",
    "hqq:2",
)
WARM_UP = 64
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(run: Run, decode: int, peak: bool) -> Iterator[Figures]:
    """Bytes at each context, `decode` tokens later too; with `peak`, each cache is measured in a process of its own."""
    caches = variants.available(variants.parse(run.stacks), caches_only=True)
    name = run.model or models.DEFAULT_MODEL
    results = Results("memory", run.out, environment(run, "tiny random llama" if run.tiny else name))
    with terminal.steps("memory", len(run.contexts) * len(caches)) as progress:
        for context in run.contexts:
            keys = [{"context": context, **cache.key, "decode": decode, "peak": peak} for cache in caches]
            for cache, key in zip(caches, keys, strict=True):
                if results.get(**key) is None:
                    try:
                        figures = in_own_process(run, cache.label, context, decode, peak)
                    except KVStackError as error:
                        if cache is caches[0]:  # it is not the cache's fault
                            raise
                        variants.skipped(f"{cache.label} at {context:,}", error)
                    else:
                        results.add({"kind": cache.kind, "family": cache.family, **figures}, **key)
                    progress.step(f"{cache.label} at {context:,}")
                else:
                    progress.skip()
            yield results.figures(keys)


def measure(subject: Subject, cache: Variant, context: int, decode: int, peak: bool) -> dict[str, Any]:
    """Prefill `context` tokens, decode `decode` more; what was held after each, and what the process grew by."""
    subject.check(context + decode)
    ids = subject.tokens(context)
    # the weights come into memory when they are first used, and so does what the math libraries reserve
    prefill(subject.model, ids[:, :WARM_UP], cache.cache(subject.model))
    gc.collect()
    before = reset_peak() if peak else None
    held = cache.cache(subject.model)
    token = prefill(subject.model, ids, held)
    grown = None if before is None else resident("VmHWM") - before
    prefilled, fitted = sizes.held_bytes(held), sizes.fitted(held)
    dense = _dense_bytes(subject, held)
    if before is not None:
        gc.collect()
        reset_peak()
    for _ in range(decode):
        token = step(subject.model, token, held)
    return {
        "nbytes_prefill": prefilled,
        **fitted,
        "dense_nbytes_prefill": dense,
        "nbytes": sizes.held_bytes(held),
        "dense_nbytes": _dense_bytes(subject, held),
        "peak_prefill": grown,
        "peak_decode": None if before is None else resident("VmHWM") - before,
        "parts": held.report().to_dict()["parts"] if isinstance(held, KVStack) else [],
        "report": held.report().to_dict() if isinstance(held, KVStack) else None,
    }


def _dense_bytes(subject: Subject, held: Cache) -> int:
    """Return the bytes of a dense cache of the same tokens, in the model's dtype."""
    return int(sizes.dense_bfloat16(held, subject.model) * subject.model.dtype.itemsize / 2)


# ---- the peak


@dataclass
class Growth:
    """Peak bytes that a device allocated, beyond those that it held before; None if only a process can tell."""

    nbytes: int | None = None


@contextmanager
def growth(device: torch.device) -> Iterator[Growth]:
    """Measure the bytes that a GPU allocates meanwhile; for a processor, see `in_own_process`."""
    grown = Growth()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield grown
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        grown.nbytes = torch.cuda.max_memory_allocated(device) - before


def resident(name: str) -> int:
    """Bytes behind a field of the process' status: VmRSS is resident memory now, VmHWM its high-water mark."""
    field = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert field is not None
    return int(field[1]) * 1024


def reset_peak() -> int | None:
    """Bring the high-water mark down to the resident bytes of now and return them; None if the system cannot do it."""
    with suppress(OSError, AttributeError):
        # what was freed and not given back yet is nobody's: the C library keeps it for the next allocation
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def in_own_process(run: Run, label: str, context: int, decode: int, peak: bool) -> dict[str, Any]:
    """Return the result of `measure` for the cache of this `label`; only peaks need a process of their own."""
    job = job_of(run, label=label, context=context, decode=decode)
    return told_by("memory", job) if peak else _job(job, peak)


def job_of(run: Run, **rest: Any) -> dict[str, Any]:
    """Return the job of a process: the run, without the parts that JSON cannot hold, and the `rest`."""
    return {"run": asdict(run) | {"out": None, "texts": None, "contexts": ()}, **rest}


def told_by(module: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that a module of this folder prints for a job, in a process of its own."""
    name = f"{__package__}.{module}"
    done = subprocess.run([sys.executable, "-m", name, json.dumps(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise KVStackError(f"measuring failed: {''.join(last)}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _job(job: Mapping[str, Any], peak: bool) -> dict[str, Any]:
    cache = next(v for v in variants.parse([job["label"]]) if v.label == job["label"])
    with opened(Run(**job["run"])) as subject:
        return measure(subject, cache, job["context"], job["decode"], peak)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(_job(given, peak=True)))
