"""How a text is fed to a model: each mode is a function of a model, a cache and a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .architectures import VOCABULARY, pictures

__all__ = ["MODES", "tokens"]

PROMPT = 72
"""Tokens of a prompt: more than a sliding window, sinks, window and a block together."""


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids (rows, length), none of them special."""
    return torch.randint(3, VOCABULARY - 16, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, places: Tensor | None = None) -> None:
    """One forward. `mask` is over all columns so far; `places` are positions, for models that are told them."""
    seen = cache.get_seq_length()
    given = {"input_ids": ids} if seen else pictures(model, ids, mask)
    given |= {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if hasattr(model.base_model, "get_rope_index"):  # it counts pictures in several dimensions, as generate has it
        if seen:
            places = torch.arange(seen, seen + ids.shape[1])[None] if places is None else places
            given["position_ids"] = (places + model.base_model.rope_deltas).expand(3, -1, -1)
    elif places is not None and "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = places
    model(**given)


def go_on(model: Any, cache: Any, mask: Tensor | None, rows: int, steps: int = 3) -> None:
    """Single tokens after what was read."""
    for step in range(steps):
        places = None
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            places = mask.sum(1, keepdim=True) - 1
        read(model, cache, tokens(rows, 1, seed=100 + step), mask, places)


def padded(lengths: Sequence[int], width: int, left: bool = True) -> Tensor:
    """The mask (rows, width) of rows of these lengths."""
    columns = torch.arange(width)
    return torch.stack([(columns >= width - n) if left else (columns < n) for n in lengths]).long()


def places_of(mask: Tensor) -> Tensor:
    """Positions as `generate` makes them from a mask."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def plain(model: Any, cache: Any) -> None:
    read(model, cache, tokens(2, PROMPT))
    go_on(model, cache, None, 2)


def left(model: Any, cache: Any) -> None:
    mask = padded([PROMPT, 45, 20], PROMPT)
    read(model, cache, tokens(3, PROMPT), mask, places_of(mask))
    go_on(model, cache, mask, 3)


def right(model: Any, cache: Any) -> None:
    mask = padded([PROMPT, 45, 20], PROMPT, left=False)
    read(model, cache, tokens(3, PROMPT), mask, places_of(mask))
    go_on(model, cache, mask, 3)


def turn(model: Any, cache: Any) -> None:
    read(model, cache, tokens(2, PROMPT))
    read(model, cache, tokens(2, 20, seed=1))
    go_on(model, cache, None, 2, steps=2)


def padded_turn(model: Any, cache: Any) -> None:
    first, second = padded([PROMPT, 50], PROMPT), padded([12, 20], 20)
    read(model, cache, tokens(2, PROMPT), first, places_of(first))
    mask = torch.cat([first, second], dim=1)
    read(model, cache, tokens(2, 20, seed=1), mask, places_of(mask)[:, PROMPT:])
    go_on(model, cache, mask, 2, steps=2)


def long(model: Any, cache: Any) -> None:
    """Past 128 tokens, where some rotary tables change."""
    read(model, cache, tokens(1, 118))
    read(model, cache, tokens(1, 20, seed=1))
    go_on(model, cache, None, 1, steps=2)


def documents(model: Any, cache: Any) -> None:
    """Three texts in one row that do not see each other, then a question about the last."""
    size = PROMPT // 3
    allow = torch.block_diag(*[torch.ones(size, size).tril()] * 3).bool()
    places = torch.arange(size).repeat(3)[None].expand(2, -1)
    read(model, cache, tokens(2, PROMPT), _additive(model, allow), places)
    asked = torch.ones(4, PROMPT + 4).bool().tril(PROMPT)
    asked[:, : 2 * size] = False
    places = torch.arange(size, size + 4)[None].expand(2, -1)
    read(model, cache, tokens(2, 4, seed=1), _additive(model, asked), places)


def _additive(model: Any, allow: Tensor) -> Any:
    """The mask of `allow` (new, columns) for two rows; where layers slide, one for each kind of layer."""
    least = torch.finfo(model.dtype).min
    mask = torch.zeros(allow.shape, dtype=model.dtype).masked_fill(~allow, least)[None, None].expand(2, -1, -1, -1)
    config = model.config.get_text_config(decoder=True)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    new, columns = allow.shape
    slides = new + min(columns - new, config.sliding_window - 1)  # no document is longer than the window
    return {"full_attention": mask, "sliding_attention": mask[..., columns - slides :]}


def holes(model: Any, cache: Any) -> None:
    """A mask with a hole in the prompt, and others later over tokens that are in the cache."""
    mask = torch.ones(2, PROMPT + 4, dtype=torch.long)
    mask[0, 20:25] = 0
    read(model, cache, tokens(2, PROMPT), mask[:, :PROMPT], places_of(mask)[:, :PROMPT])
    mask = mask.clone()
    mask[0, 30:45], mask[1, 50:70] = 0, 0
    places = torch.arange(PROMPT, PROMPT + 4)[None].expand(2, -1)
    read(model, cache, tokens(2, 4, seed=1), mask, places)
    mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    read(model, cache, tokens(2, 1, seed=2), mask, places[:, -1:] + 1)


def _generate(model: Any, cache: Any, ids: Tensor, mask: Tensor, new: int, **options: Any) -> None:
    model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        **options,
    )


def chunked(model: Any, cache: Any) -> None:
    mask = padded([PROMPT, 40], PROMPT)
    _generate(model, cache, tokens(2, PROMPT), mask, 3, prefill_chunk_size=25)


def beams(model: Any, cache: Any) -> None:
    mask = padded([PROMPT, 40], PROMPT)
    _generate(model, cache, tokens(2, PROMPT), mask, 5, num_beams=3)


def lookup(model: Any, cache: Any) -> None:
    """Prompt lookup: tokens are guessed, read, and taken back where they were wrong."""
    ids = tokens(1, PROMPT // 3).repeat(1, 3)
    _generate(model, cache, ids, torch.ones_like(ids), 8, prompt_lookup_num_tokens=3)


MODES: dict[str, Callable[[Any, Any], None]] = {
    "plain": plain,
    "left padding": left,
    "right padding": right,
    "later turn": turn,
    "padding in a later turn": padded_turn,
    "long": long,
    "documents": documents,
    "holes": holes,
    "chunked prefill": chunked,
    "beams": beams,
    "prompt lookup": lookup,
}
