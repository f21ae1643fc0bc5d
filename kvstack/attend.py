"""Answering attention: what `update` hands to a layer's attention module, and what stands in for its function.

enter      an attention module with our cache begins                        (model/hooks.py)
update     new keys and values go behind the raw tokens; attention gets all
attention  runs on exact new tokens, or is answered from the store; the stack sees its queries
leave      the group of layers is complete: it is settled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .binding import Binding
from .errors import UseError
from .model.attention import gives_queries
from .model.hooks import Call, running, told
from .model.masks import causal_mask, new_tokens
from .model.rotation import Rope
from .store.store import Store
from .types import KV

__all__ = ["Attention", "Learned"]


@dataclass
class Learned:
    """What attention calls told about the layers of a model; it outlives a text.

    Attributes:
        scaling: layer -> the factor its attention multiplies q @ k with.
        direct: layers whose attention uses just what `update` returned.
    """

    scaling: dict[int, float] = field(default_factory=dict)
    direct: set[int] = field(default_factory=set)


@dataclass
class Given:
    """What one layer's `update` returned, until its attention has run."""

    kv: KV
    deferred: bool  # attention is to be answered from the store


@dataclass
class Forward:
    """What is known while one forward runs."""

    fed: set[int] = field(default_factory=set)
    given: dict[int, Given] = field(default_factory=dict)
    positions: Tensor | None = None  # (B, axes, new) that the model was given
    rotated: set[Rope] = field(default_factory=set)  # by those positions, as far as was seen


class Attention:
    """Serves the attention modules of one model from a batch (a `Listener` of the hooks).

    Args:
        label: the stack, as messages name it.
        binding: None until the stack is bound to a model.
        batch: what is held.
        fused: whether a single query may be answered from packed codes.
        splits: whether padding is held apart from real tokens.
    """

    def __init__(
        self, label: str, binding: Binding | None, batch: Batch, *, fused: bool, splits: bool, learned: Learned
    ) -> None:
        self.label, self.binding, self.batch = label, binding, batch
        self.fused, self.splits, self.learned = fused, splits, learned
        self._forward = Forward()

    # ---- what the hooks say

    def reads_another(self, layer: int) -> bool:
        return self.binding is not None and layer in self.binding.shares

    def enter(self, call: Call) -> None:
        if self.binding is None:
            raise UseError(f"{self.label} was put on a model's attention without being bound to the model.")
        if self.binding.modules.get(call.layer) is not call.module:
            raise UseError(
                f"{self.label} is bound to a {self.binding.name} and was given to another model. "
                "A stack serves one model: make a new KVStack for the other."
            )

    @torch.no_grad()
    def leave(self, call: Call) -> None:
        if self._forward.given.pop(call.layer, None) is None:
            return
        binding = self._bound
        group, _ = binding.places[call.layer]
        if call.layer == binding.ends[group] and not self.batch.recording:
            self.batch.settle(group, self.learned.scaling)
        if call.layer == binding.last:
            self.batch.end_forward()
            self.batch.running = False

    def attention(
        self,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: Mapping[str, Any],
        plain: Any,
    ) -> Any:
        given = self._forward.given.get(call.layer)
        if given is None:  # a layer that is not ours to compress
            return plain(query, key, value, mask)
        binding, evict = self._bound, self.batch.binding.plan.evict
        looks = evict is not None and evict.looks_at_queries
        # learn how this layer attends
        direct = key is given.kv.keys and value is given.kv.values
        if direct:
            self.learned.direct.add(call.layer)
        elif given.deferred or looks:
            what = "a padded batch" if given.deferred else repr(evict)
            raise UseError(
                f"layer {call.layer} of {binding.name} does not attend to the keys it caches, so {what} cannot "
                'work with it. Use batch size 1 and a score without queries, such as "keydiff".'
            )
        scaling = kwargs.get("scaling")
        self.learned.scaling[call.layer] = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        # show the score the queries
        if looks and call.layer not in binding.shares:
            group, slot = binding.places[call.layer]
            for cohort in self.batch.cohorts:
                if cohort.new:
                    cohort.stores[group].remember(slot, cohort.its(query), self.batch.recording)
        if not given.deferred:
            return plain(query, key, value, mask)
        return self._answer(call, query, value, kwargs, plain)

    # ---- what the cache is asked

    def update(self, key_states: Tensor, value_states: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H, new, D); returns all that its attention should see."""
        batch, call = self.batch, running()
        ours = call is not None and call.listener is self
        if not self._forward.fed or layer in self._forward.fed:
            self._begin(key_states, call if ours else None)
        if ours and call is not None and self._forward.positions is not None:
            self._check_rotation(call, self._forward.positions)
        self._forward.fed.add(layer)
        # count what a dense cache would hold
        new = key_states.shape[2]
        batch.columns[layer] += new
        numbers = key_states.shape[1] * (key_states.shape[3] + value_states.shape[3])
        batch.shapes[layer] = (numbers, key_states.element_size())
        # store it, unless the layer reads another one
        group, slot = batch.binding.places[layer]
        rows = [key_states, value_states]
        if batch.binding.plan.hidden:
            assert call is not None  # a stack with a transform is bound
            rows.append(self._hidden(call))
        if layer not in batch.binding.shares:
            for cohort in batch.cohorts:
                if cohort.new:
                    cohort.stores[group].append(slot, KV(*(cohort.its(x) for x in rows)))
        # hand out all that is held, or put the answer off until the query is there
        kv, deferred = KV(key_states, value_states), True
        if len(batch.cohorts) == 1 and batch.cohorts[0].new == new:
            (cohort,) = batch.cohorts
            store = cohort.stores[group]
            deferred = ours and self._may_fuse(store, layer, new)
            if not deferred:
                kv = store.read(slot, cohort.seen, batch.work)
        if deferred and not (call is not None and ours and gives_queries(call.module)):
            raise UseError(
                f"padded batches need a model that calls attention through transformers' interface, and "
                f"{batch.binding.name} does not. Use batches of texts of one length."
            )
        self._forward.given[layer] = Given(kv, deferred)
        return kv.keys, kv.values

    def _begin(self, keys: Tensor, call: Call | None) -> None:
        """A new forward: check it, and find out which of its tokens are padding."""
        batch, rows, new = self.batch, keys.shape[0], keys.shape[2]
        if batch.size is not None and rows != batch.size:
            raise UseError(
                f"{self.label} holds {batch.size} rows and was given {rows}. Use reset() or a new stack for another "
                "text, batch_repeat_interleave or batch_select_indices for other rows of this one."
            )
        batch.check_complete()
        batch.catch_up(self.learned.scaling)
        self._forward = Forward()
        batch.begin(rows, new)
        batch.running = call is not None  # without hooks nobody says when it ends
        if self.splits and call is not None and new > 1:
            real = new_tokens(call.mask, new)
            if real is not None:
                batch.split(real)
        if call is not None and batch.binding.rotary:
            positions = self._forward.positions = self._positions(call, rows, new)
            batch.place(batch.binding.rotary[0].marked(positions))
        batch.count()

    def _positions(self, call: Call, rows: int, new: int) -> Tensor:
        """The positions (B, axes, new) that the model's rotary module was given for the new tokens."""
        binding, first = self._bound, self.batch.columns[call.layer]
        own = binding.ropes.get(call.layer)
        rope = own or binding.rotary[0]
        last = told(rope.call) if rope.call else None
        count = torch.arange(first, first + new, device=call.hidden.device if call.hidden is not None else None)
        for known in (last and last.positions, call.positions, count[None]):
            positions = _by_row(known, rows, new)
            if positions is None:
                continue
            # the very tables of its last call are proof; otherwise they are computed again
            proven = last is not None and known is last.positions and last.made(call.tables)
            if proven or own is None or own.made(call.tables, positions):
                if proven or own is not None:
                    self._forward.rotated.add(rope)
                return positions
        raise UseError(self._unknown_rotation(call))

    def _check_rotation(self, call: Call, positions: Tensor) -> None:
        """Refuse a layer that rotates its keys by other positions than those of this forward."""
        rope = self._bound.ropes.get(call.layer)
        if rope is None or rope.refusal or rope in self._forward.rotated:
            return
        if not rope.made(call.tables, positions):
            raise UseError(self._unknown_rotation(call))
        self._forward.rotated.add(rope)

    def _unknown_rotation(self, call: Call) -> str:
        return (
            f"{self.label} needs the positions that keys are rotated by, and layer {call.layer} of {self._bound.name} "
            "was handed rotary tables (position_embeddings) that are not those of the position_ids. Let the model compute "
            "its tables, or use stages that take keys as they are cached, such as Quant."
        )

    def _hidden(self, call: Call) -> Tensor:
        """What the running attention module was given, (B, 1, new, hidden size)."""
        if call.hidden is None:
            transform = self._bound.plan.transform
            raise UseError(
                f"{transform and transform.stage!r} needs the hidden states, and layer {call.layer} of "
                f"{self._bound.name} is not given any as `hidden_states`. Use merge='project'."
            )
        return call.hidden.unsqueeze(1)

    def _may_fuse(self, store: Store, layer: int, new: int) -> bool:
        return self.fused and new == 1 and store.sealed_tokens > 0 and layer in self.learned.direct

    def _answer(
        self, call: Call, query: Tensor, value: Tensor, kwargs: Mapping[str, Any], plain: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention from the store, one cohort after the other: output (B, new, query heads, D) and, with eager
        attention, weights (B, query heads, new, most tokens of any row)."""
        batch = self.batch
        group, slot = batch.binding.places[call.layer]
        rows, heads, new, _ = query.shape
        out = query.new_zeros(rows, new, heads, value.shape[-1])
        weights = None
        if call.implementation == "eager":
            weights = query.new_zeros(rows, heads, new, max(c.stores[group].held for c in batch.cohorts))
        for cohort in batch.cohorts:
            if not cohort.new:
                continue
            store, q = cohort.stores[group], cohort.its(query)
            if self._may_fuse(store, call.layer, cohort.new) and _is_simple(kwargs):
                scaling = self.learned.scaling[call.layer]
                part, unsorted = store.attend(slot, q, cohort.seen, scaling, batch.work)
                looked = None if weights is None else store.in_order(unsorted)
            else:
                kv = store.read(slot, cohort.seen, batch.work)
                mask = causal_mask(call.implementation, cohort.new, kv.tokens, q)
                # positions of all rows: only flash attention looks at them, to find packed texts
                changes = {"position_ids": None} if "position_ids" in kwargs else {}
                part, looked = plain(q, kv.keys, kv.values, mask, **changes)
            part = part.to(query.dtype)
            if cohort.rows is None and cohort.new == new:
                return part, looked
            where = torch.arange(rows, device=out.device) if cohort.rows is None else cohort.rows.to(out.device)
            out[where, new - cohort.new :] = part
            if weights is not None and looked is not None:
                weights[where, :, new - cohort.new :, weights.shape[-1] - looked.shape[-1] :] = looked.to(weights.dtype)
        return out, weights

    @property
    def _bound(self) -> Binding:
        assert self.binding is not None  # `enter` has refused what is not bound
        return self.binding


def _is_simple(kwargs: Mapping[str, Any]) -> bool:
    """Whether attention is plain softmax(qk)v, without any of the extras some models ask for."""
    extras = ("softcap", "s_aux", "position_bias", "sliding_window")
    return not kwargs.get("dropout") and all(kwargs.get(name) is None for name in extras)


def _by_row(positions: Any, rows: int, new: int) -> Tensor | None:
    """`positions` (B or 1, new) or (axes, B or 1, new) as (B, axes, new); None where they are none of these tokens."""
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3) or positions.shape[-1] != new:
        return None
    by_row = positions.unsqueeze(1) if positions.dim() == 2 else positions.permute(1, 0, 2)
    return by_row.expand(rows, -1, -1) if by_row.shape[0] in (1, rows) else None
