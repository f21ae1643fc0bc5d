"""Models by name: all of transformers, and two small ones from PyPI that the commands and the tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import KVStackError
from .pypi_models import GEMMA3, PYPI_MODELS, SMOLLM2, converted, quiet

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEFAULT_MODEL", "GEMMA_MODEL", "cache_dir", "encode", "load", "source"]

DEFAULT_MODEL, GEMMA_MODEL = SMOLLM2.name, GEMMA3.name


def cache_dir() -> Path:
    """Return the folder of kvstack's files between runs: `$KVSTACK_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("KVSTACK_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("kvstack")


def source(name_or_path: str | None = None) -> str:
    """The folder or name that transformers loads a model from; None is the default model.

    The two models from PyPI are converted into the cache folder when they are first asked for: `SmolLM2-135M-Instruct`,
    the default, and `gemma-3-270m`. A folder of yours that is called like one of them needs a `./` before its name.
    """
    model = PYPI_MODELS.get(name_or_path or DEFAULT_MODEL)
    if model is None:
        return str(name_or_path)
    return str(converted(model, cache_dir() / "models" / model.name))


def load(
    name_or_path: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model ready to generate, and its tokenizer; see `source` for the names.

    Raises:
        KVStackError: transformers knows no such model, or it is one of PyPI's whose package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = source(name_or_path)
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation=attn_implementation)
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError) as error:  # no such folder, no such name, no network; no causal model
            reason = str(error).strip().splitlines()[0]
            raise KVStackError(f"{where!r} cannot be loaded as a model: {reason}") from error
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
