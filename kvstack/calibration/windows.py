"""Windows of text: the token ids that a model is fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..model.probing import at_rest
from .texts import mixed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROMPT", "SAMPLED_TOKENS", "sample_ids", "tokenizer_of", "windows_of", "written_by"]

PROMPT, SCORED = 1024, 128
SAMPLED_TOKENS, SAMPLED_WINDOW = 2048, 160


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    where = getattr(model, "name_or_path", "")
    if not where:
        return None
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception:  # whatever a folder without one, or a name without a network, raises
        return None


def windows_of(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Windows, str]:
    """What is read, and what that is."""
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    if tokenizer is not None:
        kinds = _kinds(texts)
        return _cut(kinds, tokenizer, tokens, _longest(model)), _digest(kinds)
    if texts is not None:
        raise CalibrationError(
            f"the tokenizer of this {type(model).__name__} is not known, and texts were given. Pass tokenizer=."
        )
    if model.get_output_embeddings() is None:
        raise CalibrationError(
            f"{type(model).__name__} predicts no tokens, so it cannot write a text, and its tokenizer is not known. "
            "Pass the causal model it is part of: KVStack([...], model=...), or tokenizer= to kvstack.calibrate."
        )
    with at_rest(model):
        return written_by(model, min(tokens, SAMPLED_TOKENS)), "the model itself"


def _kinds(texts: Iterable[str] | Mapping[str, str] | None) -> dict[str, str]:
    if texts is None:
        return mixed()
    if isinstance(texts, str):
        return {"text": texts}
    return dict(texts) if isinstance(texts, Mapping) else {str(i): text for i, text in enumerate(texts)}


def _digest(kinds: Mapping[str, str]) -> str:
    return "sha256:" + hashlib.sha256("\0".join(kinds.values()).encode()).hexdigest()[:32]


def _longest(model: PreTrainedModel) -> int:
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
    length = min(SAMPLED_WINDOW, _longest(model))
    rows = max(1, tokens // length)
    ids = torch.randint(0, vocabulary, (rows, 8), generator=generator)
    cache = DynamicCache(config=model.config)
    given = ids.to(model.device)
    while ids.shape[1] < length:
        logits = model(given, past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids, given = torch.cat([ids, drawn], dim=1), drawn.to(model.device)
    return [(row[None], length * PROMPT // (PROMPT + SCORED)) for row in ids]


def sample_ids(model: PreTrainedModel) -> Tensor:
    """Token ids (1, T) of one window of the usual texts."""
    (ids, _), *_ = windows_of(model, None, PROMPT, None)[0]
    return ids
