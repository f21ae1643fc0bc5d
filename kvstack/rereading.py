"""Reading a text a second time, for a score that ranks tokens by it (`Score.rereads`).

A prompt or a later turn is held as it is until its forward has ended. Then the same decoder reads its tokens again with
the stack as its cache, a chunk at a time:

    [ all tokens held | chunk 1 ]      the score is told the queries of the chunk, then the chunk is taken back
    [ all tokens held | chunk 2 ]
    ...

Nothing of a chunk stays: layers that transformers caches read it with a copy of what they hold. When all chunks are
read, the stack compresses the text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .errors import UseError
from .model.adapters import unwrapped
from .model.attention import decoder_of, device_of, parameters
from .model.rest import buffers_kept
from .model.rope import rotary_modules
from .stack_layer import StackLayer

if TYPE_CHECKING:
    from .batch import Batch, Cohort

__all__ = ["Text", "not_seen", "read_again", "text_of"]

CHUNK = 2048
"""Tokens that are read again at once."""
LEAST = 256
"""The same where a text comes near to the longest one that its model was made for."""
LEAD = 8
"""Tokens of the chunk before, which a chunk begins with: they say where the model is in the text."""


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens that the model was given in one forward.

    Attributes:
        name: of the argument that holds the tokens, `input_ids` or `inputs_embeds`.
        tokens: (B, new) ids, or (B, new, hidden size) embeddings.
        positions: (B or 1, new) that they were given, None: the model counted them.
    """

    name: str
    tokens: Tensor
    positions: Tensor | None

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.tokens] if self.positions is None else [self.tokens, self.positions]

    def without(self, newest: int) -> Text | None:
        """The same without its newest tokens; None where none is left."""
        left = self.width - newest
        positions = None if self.positions is None else self.positions[:, :left]
        return Text(self.name, self.tokens[:, :left], positions) if left > 0 else None


def text_of(given: Mapping[str, Any]) -> Text | None:
    """The tokens among the arguments of a decoder's forward; None where there are none."""
    positions = given.get("position_ids")
    for name, axes in (("input_ids", 2), ("inputs_embeds", 3)):
        tokens = given.get(name)
        if not isinstance(tokens, Tensor) or tokens.dim() != axes:
            continue
        if isinstance(positions, Tensor) and positions.dim() == 3:  # of several dimensions: the farthest counts
            positions = positions.amax(0)
        known = isinstance(positions, Tensor) and positions.shape[-1] == tokens.shape[1]
        return Text(name, tokens.detach(), positions if known else None)
    return None


def not_seen(who: str) -> str:
    """The message for a forward whose tokens are not known."""
    return (
        f"{who} reads a text a second time, and does not know the tokens of this forward: the model's layers were "
        "called one by one, or the model was given neither input_ids nor inputs_embeds. Call the model itself, or use "
        'score="kvzap", which reads a text once.'
    )


class Stack(Protocol):
    """The cache that a text is read with."""

    layers: list[Any]


def read_again(stack: Stack, batch: Batch, scaling: Mapping[int, float]) -> None:
    """Read the last forward a second time, and compress what it brought. If anything stops this, the batch refuses to
    go on.

    Args:
        scaling: the factor that each layer multiplies q @ k with.

    Raises:
        UseError: the tokens are not known.
    """
    batch.running, text, model = True, batch.text, batch.binding.model
    if text is None or model is None:
        raise UseError(not_seen(repr(batch.binding.plan.select)))
    if torch.is_grad_enabled():  # a backward pass may need what attention was given: nothing is written behind it
        for store in batch.stores:
            store.drop_reserve()
    decoder, layers = decoder_of(unwrapped(model)), stack.layers
    devices = {device_of(module) for module in batch.binding.modules.values()}
    gpus = [device for device in devices if device.type == "cuda"]
    batch.reading = True
    try:
        with torch.no_grad(), torch.random.fork_rng(gpus), buffers_kept(rotary_modules(decoder)):
            for inputs in _chunks(text, batch, decoder):
                stack.layers = [layer if isinstance(layer, StackLayer) else _copied(layer) for layer in layers]
                decoder.forward(**inputs, past_key_values=stack)  # no hooks: the caller's would hear of it
                batch.take_back(inputs[text.name].shape[1])
    finally:
        batch.reading, stack.layers = False, layers
    with ExitStack() as exactly:
        for kind in {device.type for device in devices}:
            exactly.enter_context(torch.autocast(kind, enabled=False))
        batch.end_reading(scaling)


def _chunks(text: Text, batch: Batch, decoder: nn.Module) -> Iterator[dict[str, Any]]:
    """The arguments of the forwards that read a text again. Every row repeats its own tokens."""
    seen, tokens = max(batch.columns.values()), text.tokens
    rows, device = len(tokens), tokens.device
    known = parameters(decoder)
    # the columns of the text that are tokens of each cohort, and where they go on
    own = [_places(cohort, seen - text.width, device) for cohort in batch.cohorts]
    follows = _follows(text, batch, own, seen)
    size, most = _size(decoder, int(follows.max()))
    follows = follows.clamp(max=max(0, most - size - LEAD))
    for first in range(0, max(len(places) for places in own), size):
        pieces = [places[max(0, first - LEAD) : first + size] if first < len(places) else places[:0] for places in own]
        width = max(len(piece) for piece in pieces)
        again = tokens.new_zeros(rows, width, *tokens.shape[2:])
        mask = torch.zeros(rows, seen + width, dtype=torch.long, device=device)
        for cohort, piece in zip(batch.cohorts, pieces, strict=True):
            mine = torch.arange(rows, device=device) if cohort.rows is None else cohort.rows.to(device)
            again[mine, : len(piece)] = tokens[mine][:, piece]
            mask[mine[:, None], cohort.columns.of(cohort.seen, device)] = 1
            mask[mine, seen : seen + len(piece)] = 1
        inputs: dict[str, Any] = {text.name: again, "use_cache": True}
        if not bool(mask.all()):
            inputs["attention_mask"] = mask
        if "position_ids" in known:
            inputs["position_ids"] = follows[:, None] + torch.arange(width, device=device)
        yield inputs


def _places(cohort: Cohort, first: int, device: torch.device) -> Tensor:
    """The columns from `first` on that hold tokens of a cohort, counted from there."""
    columns = cohort.columns.of(cohort.seen, device)
    return columns[columns >= first] - first


def _follows(text: Text, batch: Batch, own: list[Tensor], seen: int) -> Tensor:
    """(B,) the position behind the last token of each row."""
    ends = torch.full((len(text.tokens),), seen, device=text.tokens.device)
    if text.positions is not None:
        positions = text.positions.to(ends.device).expand(len(ends), -1)
        for cohort, places in zip(batch.cohorts, own, strict=True):
            if len(places):
                mine = slice(None) if cohort.rows is None else cohort.rows.to(ends.device)
                ends[mine] = positions[mine][:, places[-1]].to(ends) + 1
    return ends


def _size(decoder: Any, follows: int) -> tuple[int, int]:
    """Tokens of a chunk behind position `follows`, and how many positions there are."""
    longest = getattr(decoder.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(longest, int):
        return CHUNK, 1 << 30
    size = min(CHUNK, max(LEAST, longest - follows - LEAD))
    # rotary positions go on beyond what a model was made for, tables of learned ones end there
    rotates = any(not isinstance(module, nn.Embedding) for module in rotary_modules(decoder))
    return size, 1 << 30 if rotates else longest


def _copied(layer: Any) -> Any:
    """A layer that transformers caches, with tensors of its own."""
    other = copy.copy(layer)
    vars(other).update({name: _copy_of(x) for name, x in vars(layer).items()})
    return other


def _copy_of(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {key: _copy_of(value) for key, value in x.items()}
    return type(x)(_copy_of(value) for value in x) if type(x) in (list, tuple) else x
