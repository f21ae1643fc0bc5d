"""The tokens that the queries of a forward see: the model's mask, cut to the tokens that a stack holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Cohort
from .errors import UseError
from .model import masks
from .model.hooks import Call
from .store.store import Store

__all__ = ["Sight", "spread"]


class Sight:
    """The model's mask for the rows, queries and columns that a batch holds.

    Args:
        label: the stack, as messages name it.
    """

    def __init__(self, label: str, batch: Batch) -> None:
        self.label, self.batch = label, batch
        # the mask, and what of it each cohort sees
        self._parts: dict[int, tuple[Any, dict[int, Tensor | None]]] = {}

    def forget(self) -> None:
        """The forward is over, and with it its masks."""
        self._parts = {}

    def part(
        self, mask: Any, call: Call, number: int, cohort: Cohort, places: Tensor | None, n: int, dense: int
    ) -> Tensor | None:
        """Return the part of the model's mask for the `n` queries of a cohort, at `places`, over all its tokens; None
        if that is causal."""
        if id(mask) not in self._parts:
            while len(self._parts) > 1:  # layers may have a mask each, which nobody asks for again
                del self._parts[next(iter(self._parts))]
            self._parts[id(mask)] = mask, {}
        _, known = self._parts[id(mask)]
        if number not in known:
            known[number] = self._cut(mask, call, cohort, places, n, dense)
        return known[number]

    def _cut(self, mask: Any, call: Call, cohort: Cohort, places: Tensor | None, n: int, dense: int) -> Tensor | None:
        columns, visible = None, mask is None
        if cohort.seen < dense:
            columns = cohort.columns.of(cohort.seen, mask.device if isinstance(mask, Tensor) else torch.device("cpu"))
            left_out = torch.ones(dense, dtype=torch.bool, device=columns.device)
            left_out[columns] = False
            if isinstance(mask, Tensor):
                others = masks.cut(mask, cohort.rows, places, left_out.nonzero().flatten(), dense)
                visible = bool(masks.visible(others).any())
            if visible:
                raise UseError(
                    f"{self.label} left out tokens that were padding when they came, and this forward lets its tokens "
                    "see them. Pass the attention_mask of the whole text, earlier turns and their padding included."
                )
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise UseError(
                f"the attention mask is a {type(mask).__name__}, of which {self.label} cannot take what it holds. "
                "Use attn_implementation='sdpa', 'eager' or a flash attention."
            )
        part = masks.cut(mask, cohort.rows, places, columns, dense)
        known = n == 1 or call.implementation in ("sdpa", "eager") or "flash" in call.implementation
        return None if known and masks.is_causal(part, n) else part

    def mask(self, call: Call, store: Store, cohort: Cohort, query: Tensor, part: Tensor | None) -> Tensor | None:
        """The mask for what a store holds."""
        if part is None:
            return masks.causal_mask(call.implementation, query.shape[2], store.held, query, call.module)
        if store.held == cohort.seen:
            return part
        return masks.fitted(part, store.positions(cohort.seen), query.shape[1])

    def for_module(self, call: Call) -> Any:
        """The mask for a module that applies it by itself, to what `Promises` lays out."""
        batch = self.batch
        group, slot = batch.binding.places[call.layer]
        stores = [cohort.stores[group] for cohort in batch.cohorts]
        # the layers of a group come one after the other: this one has not got its new tokens yet, but where it reads
        # an earlier one
        reads = call.layer in batch.binding.shares
        held = [
            store.tokens_in(slot) - (cohort.new if reads else 0)
            for store, cohort in zip(stores, batch.cohorts, strict=True)
        ]
        if call.mask is None or all(n == c.seen - c.new for n, c in zip(held, batch.cohorts, strict=True)):
            return call.mask
        if call.hidden is None or not isinstance(call.mask, Tensor) or call.mask.dim() != 4:
            raise UseError(
                f"layer {call.layer} ({type(call.module).__name__}) applies its mask by itself, and tokens were "
                f"evicted: {self.label} needs the mask of attn_implementation='sdpa' or 'eager' for it."
            )
        mask, new = call.mask, call.mask.shape[2]
        dense = batch.columns[call.layer] + new
        width = max(n + c.new for n, c in zip(held, batch.cohorts, strict=True))
        parts = []
        for store, cohort in zip(stores, batch.cohorts, strict=True):
            columns = cohort.columns.of(cohort.seen, mask.device) if cohort.seen < dense else None
            part = masks.cut(mask, cohort.rows, cohort.places, columns, dense)
            if slot or reads:  # the first layer of the group has got them
                positions = store.positions(cohort.seen)
            else:
                before = cohort.seen - cohort.new
                old = store.positions(before)
                fresh = torch.arange(before, cohort.seen, device=old.device).expand(*old.shape[:2], -1)
                positions = torch.cat([old, fresh], dim=-1)
            heads = batch.binding.query_heads if positions.shape[1] > 1 else 1
            parts.append(masks.fitted(part, positions, heads))
        if len(parts) == 1 and batch.cohorts[0].places is None:
            return parts[0]
        hides = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else False
        shape = batch.size or 0, max(part.shape[1] for part in parts), new, width
        # what padding sees does not matter, but it must see something
        whole = torch.full(shape, 0.0 if mask.dtype.is_floating_point else True, dtype=mask.dtype, device=mask.device)
        for part, cohort in zip(parts, batch.cohorts, strict=True):
            rows = torch.arange(shape[0]) if cohort.rows is None else cohort.rows
            at = torch.arange(new) if cohort.places is None else cohort.places
            filled = torch.full((*part.shape[:3], width), hides, dtype=mask.dtype, device=mask.device)
            filled[..., width - part.shape[3] :] = part
            filled = filled.expand(len(rows), shape[1], -1, -1).transpose(1, 2)
            whole[rows.to(mask.device)[:, None], :, at.to(mask.device)] = filled
        return whole


def spread(looked: Tensor, store: Store, cohort: Cohort, dense: int) -> Tensor:
    """Weights (b, query heads, n, held), each in the column of its token: (b, query heads, n, tokens seen)."""
    columns = cohort.columns.of(cohort.seen, looked.device)
    at = columns[store.positions(cohort.seen).to(looked.device).long()]  # (b or 1, H or 1, held)
    if at.shape[1] > 1:
        at = at.repeat_interleave(looked.shape[1] // at.shape[1], dim=1)
    spread = looked.new_zeros(*looked.shape[:3], dense)
    return spread.scatter(3, at.unsqueeze(2).expand_as(looked), looked)
