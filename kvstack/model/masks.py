"""The model's attention mask, cut to what a stack holds.

A model builds its mask over all tokens it has seen, as for a dense cache. A stack holds some of them: no padding, no
evicted tokens. It takes the rows, queries and columns it holds out of the model's mask, so that any mask means here
what it means there: padding, packed documents, images whose tokens see each other, holes.

    form              shape                          of
    boolean           (B or 1, 1 or heads, q, T)     sdpa: True is seen
    additive          (B or 1, 1 or heads, q, T)     eager: added to the logits; hidden is very negative
    flash             (B, T)                         which tokens are seen by all later ones
    None                                             causal
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UseError

__all__ = ["causal_mask", "cut", "fitted", "is_causal", "real_tokens", "visible"]

HIDDEN = -1e4
"""An additive mask hides a token if it is below this number; float16 reaches it."""


TOO_SHORT = (
    "the attention mask is for {} tokens, and the model has seen {}, padding included. Pass a mask for all of them: "
    "those of earlier turns, then the new ones."
)


def visible(mask: Tensor) -> Tensor:
    """Return the tokens that a mask lets be seen, bool."""
    return mask > HIDDEN if mask.dtype.is_floating_point else mask.bool()


def real_tokens(mask: Any, seen: int, new: int) -> Tensor | None:
    """Return which of the `new` tokens behind the `seen` ones are real, (B or 1, new) bool: those that any query of
    this forward sees, itself included. None if all are, or if the mask cannot tell."""
    if not isinstance(mask, Tensor):
        if mask is None:
            return None
        if isinstance(mask, Mapping):  # Zaya
            raise UseError(
                f"the attention of this model is given several masks at once ({', '.join(map(str, mask))}), and "
                "kvstack cannot tell padding from them. Use KVStack([]), without stages, or transformers' own cache."
            )
        raise UseError(
            f"the attention mask is a {type(mask).__name__}, which does not tell padding. "
            "Use attn_implementation='sdpa', 'eager' or a flash attention with a KVStack."
        )
    if mask.shape[-1] < seen + new:
        raise UseError(TOO_SHORT.format(mask.shape[-1], seen + new))
    columns = visible(mask[..., seen : seen + new])
    real = columns if mask.dim() == 2 else columns.flatten(1, 2).any(1)
    return None if bool(real.all()) else real


def cut(mask: Tensor, rows: Tensor | None, queries: Tensor | None, columns: Tensor | None, seen: int) -> Tensor:
    """The part of a mask over `seen` tokens for some rows, queries and columns; None stands for all of them."""
    if mask.shape[-1] < seen:
        raise UseError(TOO_SHORT.format(mask.shape[-1], seen))
    mask = mask[..., :seen]
    if rows is not None and mask.shape[0] > 1:
        mask = mask.index_select(0, rows.to(mask.device))
    if queries is not None and mask.dim() == 4 and mask.shape[2] > 1:
        mask = mask.index_select(2, queries.to(mask.device))
    return mask if columns is None else mask.index_select(-1, columns.to(mask.device))


def is_causal(mask: Tensor, new: int) -> bool:
    """Return True if a mask says nothing but: the newest `new` tokens see all before them, and themselves."""
    if mask.dim() == 2:
        return bool(visible(mask).all())
    held = mask.shape[-1]
    queries = torch.arange(held - new, held, device=mask.device)
    earlier = torch.arange(held, device=mask.device)[None] <= queries[:, None]
    if mask.dtype.is_floating_point:
        return bool(torch.where(earlier, mask == 0, mask <= HIDDEN).all())
    return bool((mask.bool() == earlier).all())


def fitted(mask: Tensor, positions: Tensor, heads: int) -> Tensor:
    """A mask over tokens, for those that are held: at `positions` (B or 1, H or 1, held), which may differ by kv head.
    There are `heads` query heads."""
    if mask.dim() == 2:
        if positions.shape[1] > 1:
            raise UseError(
                "this attention mask hides cached tokens, and the kv heads hold different ones: flash attention takes "
                "one mask for all heads. Use Evict(..., share_heads=True), or attn_implementation='sdpa'."
            )
        return mask.take_along_dim(positions[:, 0].to(mask.device).long(), dim=-1)
    if positions.shape[1] > 1:
        positions = positions.repeat_interleave(heads // positions.shape[1], dim=1)
    return mask.take_along_dim(positions.to(mask.device).long().unsqueeze(2), dim=-1)


def causal_mask(name: str, new: int, held: int, like: Tensor, module: nn.Module) -> Tensor | None:
    """The mask `name` needs for the newest `new` of `held` tokens where all of them are seen, (1, 1, new, held) or
    None. Eager attention always gets one: some models add it without asking. `sdpa` takes none at all for causal, but
    where the module says that it is not (PaliGemma, whose masks let images see each other)."""
    implied = name == "sdpa" and new == held and getattr(module, "is_causal", True)
    if "flash" in name or (name != "eager" and (new == 1 or implied)):
        return None
    queries = torch.arange(held - new, held, device=like.device)
    earlier = torch.arange(held, device=like.device)[None] <= queries[:, None]
    if name == "sdpa":
        return earlier[None, None]
    if name == "eager":
        hidden = torch.finfo(like.dtype).min
        return torch.zeros(earlier.shape, dtype=like.dtype, device=like.device).masked_fill(~earlier, hidden)[
            None, None
        ]
    raise UseError(
        f"several tokens follow evicted ones, and attn_implementation={name!r} gives no mask that tells what they see. "
        "Use 'sdpa' or 'eager'."
    )
