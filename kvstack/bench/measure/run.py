"""The settings that all benchmarks share, and the origin of their figures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from ... import __version__
from .sources import kvstack_code

__all__ = ["Run", "environment", "hardware"]

TINY = (512,)
PACKAGE = Path(__file__).parents[2]
PEERS = ("hqq", "optimum-quanto", "tiny-turboquant")


@dataclass(frozen=True)
class Run:
    """Settings that all benchmarks share.

    Attributes:
        contexts: numbers of tokens.
        stacks: the caches to compare with the dense one (`variants.parse`).
        model: folder or name; None is the default model.
        dtype: of the model's weights.
        threads: for torch.
        seed: for all that is random.
        tiny: a random model and no texts, to test the benchmark itself.
        texts: folder of .txt files, which take the place of the third kind of text.
        device: the device of the model.
        out: folder for the figures; what stands there already is not measured again.
    """

    contexts: tuple[int, ...]
    stacks: tuple[str, ...]
    model: str | None = None
    dtype: str = "float32"
    threads: int = 2
    seed: int = 0
    tiny: bool = False
    texts: Path | None = None
    device: str = "cpu"
    out: Path | None = None

    def usually(self, contexts: tuple[int, ...], stacks: tuple[str, ...] = ()) -> Run:
        """This run with a benchmark's own contexts and stacks where it was told none."""
        return replace(self, contexts=self.contexts or (TINY if self.tiny else contexts), stacks=self.stacks or stacks)


def environment(run: Run, model: str, identity: str | None = None) -> dict[str, Any]:
    """Return all that a figure depends on, except its own settings. `commit` is for the reader: two figures are
    comparable by `code`, the digest of the code they were made with, and `identity`, that of the weights."""
    return {
        "model": model,
        "identity": identity,
        "dtype": run.dtype,
        "device": run.device,
        "threads": run.threads,
        "seed": run.seed,
        "texts": None if run.texts is None else f"{run.texts.name} {_digest(run.texts.glob('*.txt'), run.texts)}",
        "hardware": hardware(run.device),
        "python": platform.python_version(),  # the texts come with it
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvstack": __version__,
        "code": kvstack_code(),
        "commit": _commit(),
    }


def hardware(device: str = "cpu") -> str:
    """The GPU where `device` is one, the processor, its cores, and the system."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.startswith("cuda") else ""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (line := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        name = line[1]
    return f"{gpu}{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(files: Iterable[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def _commit() -> str | None:
    """The commit of the working copy kvstack runs from; None where it is none, or git is not there."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=PACKAGE, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
