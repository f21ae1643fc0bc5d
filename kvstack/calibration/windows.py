"""Windows of text: the token ids that a model is fitted on."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..model.attention import device_of
from ..model.probing import at_rest
from ..model.ranks import heads_of
from .texts import mixed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "OWN_TEXT",
    "PROMPT",
    "SAMPLED_TOKENS",
    "SAVE_TOKENIZER",
    "draw",
    "longest_text",
    "own_text",
    "sample_ids",
    "tokenizer_of",
    "windows_of",
    "written_by",
]

log = logging.getLogger("kvstack")

PROMPT, SCORED = 1024, 128
SAMPLED_TOKENS, SAMPLED_WINDOW = 2048, 160
OWN_TEXT = "the model itself"
"""The source of texts that a model writes."""
PASS_CALIBRATION = (
    "Pass calibration=kvstack.calibrate(model, tokenizer=tokenizer) to the stage, with texts of your own if you like."
)
SAVE_TOKENIZER = (
    "Save the tokenizer, say where, and make the stack again: tokenizer.save_pretrained(folder); "
    "model.name_or_path = folder."
)
"""For what takes no calibration as a setting."""


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    where = getattr(model, "name_or_path", "")
    if not where:
        return None
    # a model that was read from a GGUF file has its tokenizer in there
    files = [file.name for file in Path(where).glob("*.gguf")] if Path(where).is_dir() else []
    for extra in [{}, *({"gguf_file": name} for name in files[:1] if len(files) == 1)]:
        try:
            return AutoTokenizer.from_pretrained(where, **extra)
        except Exception:  # whatever a folder without one, or a name without a network, raises
            continue
    return None


def windows_of(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
    least: int = 0,
    *,
    may_be_split: bool = False,
) -> tuple[Windows, str]:
    """Return the windows of tokens to read, and a name for their source.

    Args:
        least: tokens that are read however few the model would write.
        may_be_split: True if the reader can work with a part of the model in each of several processes.

    Raises:
        CalibrationError: there is nothing to read, or `model` is split.
    """
    if not may_be_split and (size := heads_of(model).size) > 1:
        raise CalibrationError(
            f"calibration is for a whole model, and this {type(model).__name__} is split among {size} processes. "
            "Calibrate it in one process."
        )
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    if tokenizer is not None:
        kinds = _kinds(texts)
        return _cut(kinds, tokenizer, tokens, longest_text(model)), _digest(kinds)
    if texts is not None:
        raise CalibrationError(
            f"the tokenizer of this {type(model).__name__} is not known, and texts were given. Pass tokenizer=."
        )
    if model.get_output_embeddings() is None:
        raise CalibrationError(
            f"{type(model).__name__} predicts no tokens, so it cannot write a text, and its tokenizer is not known. "
            "Pass the causal model it is part of: KVStack([...], model=...), or tokenizer= to kvstack.calibrate."
        )
    if told := own_text(model):
        log.warning(told)
    enough = least * (PROMPT + SCORED) // PROMPT + SAMPLED_WINDOW  # a part of each window is scored, not read
    with at_rest(model):
        return written_by(model, min(tokens, max(SAMPLED_TOKENS, enough))), OWN_TEXT


def own_text(model: PreTrainedModel, fix: str = PASS_CALIBRATION) -> str:
    """Return the notice that calibration reads text of the model's own, with its `fix`; empty if it does not, or the
    user was told."""
    if model in _told or tokenizer_of(model) is not None or model.get_output_embeddings() is None:
        return ""
    _told.add(model)
    where = getattr(model, "name_or_path", "")
    return (
        f"The tokenizer of this {type(model).__name__} {f'is not in {where!r}' if where else 'is not known'}, so it is "
        f"calibrated on text that it writes itself: the result is worse than with real text. {fix}"
    )


_told: weakref.WeakSet[Any] = weakref.WeakSet()


def _kinds(texts: Iterable[str] | Mapping[str, str] | None) -> dict[str, str]:
    if texts is None:
        return mixed()
    if isinstance(texts, str):
        return {"text": texts}
    return dict(texts) if isinstance(texts, Mapping) else {str(i): text for i, text in enumerate(texts)}


def _digest(kinds: Mapping[str, str]) -> str:
    return "sha256:" + hashlib.sha256("\0".join(kinds.values()).encode()).hexdigest()[:32]


def longest_text(model: PreTrainedModel) -> int:
    """Tokens that `model` reads at most, or as many as a window has, where it does not say."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit or PROMPT + SCORED)


Windows = Sequence[tuple[Tensor, int]]
"""Token ids (1, T), and how many of them are the prompt."""


def _cut(kinds: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int) -> Windows:
    """Windows of all texts in turn: equal parts of each text, so that all of it is seen."""
    length = min(PROMPT + SCORED, longest)
    prompt = length * PROMPT // (PROMPT + SCORED)
    count = max(1, -(-tokens // prompt))
    ids = {}
    for name, text in kinds.items():
        # no tokenizer makes more than some 12 characters of ordinary text into one token
        tokenized = tokenizer(text[: 12 * (tokens + length)], return_tensors="pt", verbose=False)["input_ids"]
        if tokenized.shape[1] >= length:
            ids[name] = tokenized
    if not ids:
        raise CalibrationError(f"no text has {length} tokens, which one window of calibration takes. Give longer ones.")
    if all(bool((tokenized == tokenized[0, 0]).all()) for tokenized in ids.values()):
        raise CalibrationError(
            "the tokenizer makes the texts one token, again and again: it does not know their words. Pass texts= that "
            "it does know, or tokenizer= the model's own."
        )
    names = list(ids)
    each = {name: len(range(i, count, len(names))) for i, name in enumerate(names)}
    windows = []
    for number in range(count):
        name, turn = names[number % len(names)], number // len(names)
        start = (ids[name].shape[1] - length) * turn // max(1, each[name] - 1)
        windows.append((ids[name][:, start : start + length], prompt))
    return windows


def written_by(model: PreTrainedModel, tokens: int) -> Windows:
    """Windows that the model writes, from random first tokens."""
    from transformers import DynamicCache

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    length = min(SAMPLED_WINDOW, longest_text(model))
    rows = max(1, tokens // length)
    ids = torch.randint(0, vocabulary, (rows, 8), generator=generator)
    cache = DynamicCache(config=model.config)
    given = ids.to(device_of(model))
    while ids.shape[1] < length:
        logits = model(given, past_key_values=cache, use_cache=True).logits[:, -1].float()
        given = draw(model, logits.log_softmax(-1), generator)
        ids = torch.cat([ids, given.cpu()], dim=1)
    return [(row[None], length * PROMPT // (PROMPT + SCORED)) for row in ids]


def draw(model: PreTrainedModel, logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token id a row (B, 1) from log probabilities (B, vocabulary).

    Raises:
        CalibrationError: they are no numbers.
    """
    if not bool(logits.logsumexp(-1).isfinite().all()):
        raise CalibrationError(
            f"this {type(model).__name__} in {model.dtype} predicts NaN, so it cannot be calibrated. Load it in "
            "bfloat16 or float32, or look for weights that are not finite."
        )
    return torch.multinomial(logits.exp().cpu(), 1, generator=generator).to(logits.device)


def sample_ids(model: PreTrainedModel) -> Tensor:
    """Token ids (1, T) of one window of the usual texts."""
    (ids, _), *_ = windows_of(model, None, PROMPT, None, may_be_split=True)[0]
    return ids
