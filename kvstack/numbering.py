"""Positions inside the cache, for `Evict(positions="cache")`: tokens held count from 0, and new ones follow them.

The model itself rotates queries and keys of a forward, by the positions that it is given. So it is given places inside
the cache, before anything is computed, and its own rotation is exact. What is held is turned when it is read
(store/store.py). Attention masks are made of columns and not of positions: they stay those of the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import BindError, UseError
from .model import masks
from .model.attention import decoder_of, expands, parameters
from .model.rope import find_ropes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .batch import Batch
    from .model.layers import Layers
    from .model.rotation import Rope
    from .select.evict import Evict

__all__ = ["check_model", "check_places", "places_of"]


def check_model(evict: Evict, model: PreTrainedModel, layers: Layers) -> None:
    """Refuse a model whose tokens cannot be moved inside the cache.

    Raises:
        BindError: some layer would go on with the old positions.
    """
    name, ropes = type(model).__name__, find_ropes(model, layers.modules)
    latents = next((layer for layer in layers.full if expands(layers.modules[layer])), None)
    if "position_ids" not in parameters(decoder_of(model)):
        why = f"{name} takes no position_ids, so it cannot be told the new positions"
    elif latents is not None:
        why = f"layer {latents} of {name} caches latents, of which it rotates a part"
    elif not any(ropes.get(layer) for layer in layers.full):
        why = f"{name} does not rotate its keys, so tokens that are held cannot be moved"
    else:
        each = ((layer, rope) for layer, rope in ropes.items() if rope is not None)
        why = next(filter(None, (_keeps(name, layer, rope, layers) for layer, rope in each)), "")
    if why:
        raise BindError(f'{evict!r} gives tokens new positions, and {why}. Use positions="text".')


def _keeps(name: str, layer: int, rope: Rope, layers: Layers) -> str:
    """Why the keys of a layer cannot be rotated to other positions; empty: they can."""
    if rope.refusal:
        return f"kvstack cannot rotate the keys of layer {layer} of {name}: {rope.refusal}"
    if layer not in layers.full:
        kind = layers.types[layer]
        return f"layer {layer} of {name} is left to transformers' own cache ({kind}), where keys keep their positions"
    if rope.switch is not None:
        return f"layer {layer} of {name} has other angles for a text of {rope.switch} tokens or more"
    return ""


def places_of(who: str, batch: Batch, given: Mapping[str, Any]) -> Tensor | None:
    """Places inside the cache (rows, new) for the tokens of a forward that is about to begin. None if its arguments do
    not include its tokens: it is the forward of a layer, which gets positions and cannot give others.

    Args:
        who: the stack, as messages name it.
        given: the arguments of the forward.

    Raises:
        UseError: the model was given positions of another kind.
    """
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):
        return None
    rows, new = tokens.shape[:2]
    if batch.size is not None and rows != batch.size:
        raise UseError(
            f"{who} holds {batch.size} rows and was given {rows}. Use reset() or a new stack for another text, "
            "batch_repeat_interleave or batch_select_indices for other rows of this one."
        )
    seen = max(batch.columns.values(), default=0)
    mask = given.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, Mapping) else mask  # a mask for each type of layers
    real = masks.real_tokens(mask, seen, new)
    places, index = batch.places(rows, new, real, tokens)
    positions = given.get("position_ids")
    if positions is None or batch.reading:
        return places
    columns = torch.arange(seen, seen + new, device=tokens.device).expand(rows, -1)
    if isinstance(positions, Tensor) and positions.dim() == 2:
        positions = positions[None]
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[1:] in ((1, new), (rows, new)):
        # a text may begin anywhere, and a turn may leave out positions before it; images have a row and a column
        steps = [_apart(positions.to(tokens.device), known, real) for known in (index, columns)]
        if bool(torch.stack([(step == step[:1, :, :1]).all() for step in steps]).any()):
            return places
    raise UseError(
        f"{who} numbers tokens by their places in the cache, and the model was given position_ids that do not follow "
        "each other in every row: those of a packed text, or of images. Leave out position_ids, or use "
        'positions="text".'
    )


def check_places(who: str, batch: Batch, positions: Tensor, real: Tensor | None) -> None:
    """Refuse new tokens that were rotated by other `positions` (B, axes, new) than their places inside the cache. As
    long as nothing is held, their places may begin anywhere.

    Raises:
        UseError: the model was not told these places.
    """
    rows, _, new = positions.shape
    places, _ = batch.places(rows, new, real, positions)
    apart = _apart(positions.transpose(0, 1), places, real)
    begins = not any(cohort.seen for cohort in batch.cohorts)
    if bool((apart != (apart[:1, :, :1] if begins else 0)).any()):
        raise UseError(
            f"{who} gives tokens their places in the cache as positions, and the layers of the model were called with "
            'others, such as those of images. Call the model itself, without position_ids, or use positions="text".'
        )


def _apart(positions: Tensor, places: Tensor, real: Tensor | None) -> Tensor:
    """`positions` (axes, rows or 1, new) less `places` (rows, new): (axes, rows, new). Tokens that are not `real`
    have the difference of the first one of their row that is."""
    apart = positions - places
    if real is None:
        return apart
    mine = real.to(apart.device).expand_as(apart)
    return torch.where(mine, apart, apart.gather(2, mine.int().argmax(2, keepdim=True)))
