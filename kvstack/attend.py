"""Answering attention: what `update` hands to a layer's attention module, and the function that takes the place of its
own.

enter      an attention module with our cache begins                        (model/hooks.py)
update     new keys and values go behind the raw tokens; attention gets all, or a promise of them
attention  runs on exact new tokens, or is answered from the store; the stack sees its queries
leave      the group of layers is complete: it is settled

The model's mask is over all tokens it has seen, and each answer takes the part of it that is held (model/masks.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .asked import Asked, answered, by_head, fitted
from .batch import Batch, Cohort
from .binding import Binding
from .errors import UseError
from .lazy import refusing_gradient
from .model import masks
from .model.attention import device_of, expands
from .model.hooks import Call, running, told
from .model.rotation import Rope
from .numbering import check_places
from .promise import Promise, Promises
from .sight import Sight, spread
from .store.store import Store
from .types import KV
from .workspace import Workspace

__all__ = ["Attention", "Learned"]

CHANNELS = 8
"""Heads have a multiple of so many."""
FLASH = 256
"""Channels of a head that flash attention takes."""


@dataclass
class Learned:
    """The facts that attention calls told about the layers of a model; it outlives a text.

    Attributes:
        scaling: layer -> the factor its attention multiplies q @ k with.
        direct: layers whose attention uses just what `update` returned.
    """

    scaling: dict[int, float] = field(default_factory=dict)
    direct: set[int] = field(default_factory=set)


@dataclass
class Forward:
    """The state of one running forward."""

    new: int = 0
    begun: bool = False  # for the layer that comes first
    fed: set[int] = field(default_factory=set)
    positions: Tensor | None = None  # (B, axes, new) that the model was given
    rotated: set[Rope] = field(default_factory=set)  # by those positions, as far as was seen


class Attention:
    """Serves the attention modules of one model from a batch (a `Listener` of the hooks).

    Args:
        label: the stack, as messages name it.
        binding: None until the stack is bound to a model.
        batch: what is held.
        fused: whether a single query may be answered from packed codes.
        splits: whether padding is left out.
    """

    def __init__(
        self, label: str, binding: Binding | None, batch: Batch, *, fused: bool, splits: bool, learned: Learned
    ) -> None:
        self.label, self.binding, self.batch = label, binding, batch
        self.fused, self.splits, self.learned = fused, splits, learned
        self._forward = Forward()
        self._promises, self._sight = Promises(label, batch), Sight(label, batch)

    # ---- what the hooks say

    def reads_another(self, layer: int) -> bool:
        return self.binding is not None and layer in self.binding.shares

    def enter(self, call: Call) -> Any:
        """An attention module begins; what is returned takes the place of its mask."""
        if self.binding is None:
            raise UseError(f"{self.label} was put on a model's attention without being bound to the model.")
        if self.binding.modules.get(call.layer) is not call.module:
            raise UseError(
                f"{self.label} is bound to a {self.binding.name} and was given to another model. "
                "A stack serves one model: make a new KVStack for the other."
            )
        # a module that makes something else of what it reads, or of its mask, needs a mask for just that
        indirect = call.layer in self.learned.scaling and call.layer not in self.learned.direct
        if not indirect or call.layer not in self.batch.columns:
            return call.mask
        if self._begins(call.layer) and call.hidden is not None:
            self._begin(call.hidden.shape[0], call.hidden.shape[1], call)
        return self._sight.for_module(call)

    @torch.no_grad()
    def leave(self, call: Call) -> None:
        if not self._forward.fed:
            return
        binding = self._bound
        if not binding.reuses:
            self._promises.kept(call.layer)
        with exactly(call):
            for group, end in enumerate(binding.ends):
                if end == call.layer:
                    self.batch.complete(group, self.learned.scaling)
        if call.layer == binding.last:
            self.batch.end_forward()
            self.batch.running = self.batch.waits
            self._forget()

    def _forget(self) -> None:
        """The forward is over."""
        self._promises.forget()
        self._sight.forget()
        self._forward = Forward()

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
        promise, own = self._promises.held_by(call.layer, key, value), self._promises.of(call.layer)
        if promise is None and own is None:  # a layer that is not ours to compress
            return plain(query, key, value, mask)
        select = self.batch.binding.plan.select
        looks = select is not None and select.looks_at_queries
        # learn how this layer attends
        scaling = kwargs.get("scaling")
        self.learned.scaling[call.layer] = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        known = own is not None and (own.holds_keys(key) or expands(call.module))
        asked = query
        if own is not None and looks and not known and _is_tiled(key, own.kv.keys):
            known, asked = True, _untiled(query, own.kv.keys.shape[1])
        if own is not None and looks and not known:
            raise UseError(
                f"layer {call.layer} of {self._bound.name} does not attend to the keys it caches, so {select!r} "
                'cannot work with it. Use a score without queries, such as "keydiff".'
            )
        if own is not None and (promise is None or (mask is not call.mask and by_head(mask))):
            group, _ = self.batch.binding.places[call.layer]
            for cohort in self.batch.cohorts:
                cohort.stores[group].mix_heads()
        # show the score the queries
        if known and looks and call.layer not in self._bound.shares:
            group, slot = self._bound.places[call.layer]
            for cohort in self.batch.cohorts:
                if cohort.new:
                    self._show(call, cohort, group, slot, cohort.its(asked))
        direct = promise is not None and mask is call.mask
        if own is not None and select is not None and select.refit and not (direct and _is_simple(kwargs)):
            raise UseError(
                f"layer {call.layer} of {self._bound.name} attends with more than a softmax over the keys it caches, "
                f"so {select!r} cannot make tokens stand in for others there. Use refit=False."
            )
        if own is not None and select is not None and select.refit and "flash" in call.implementation:
            self._check_width(call, query.shape[-1])
        if direct:
            self.learned.direct.add(call.layer)
            mask = mask if call.replaced is None else call.replaced  # it was taken for another kind of module
        # a mask that the module made may be made of what `update` returned, and is as wide as that
        dense = promise is not None and (direct or self._is_dense(mask, promise))
        if promise is None or promise.whole or not dense:
            return plain(query, key, value, mask)
        return self._answer(call, promise, query, value.shape[-1], mask, kwargs, plain)

    def _check_width(self, call: Call, width: int) -> None:
        """Refuse heads that are too wide for flash attention with the channels that a bias takes."""
        if width + CHANNELS > FLASH:
            raise UseError(
                f"layer {call.layer} of {self._bound.name} has heads of {width} channels, and "
                f"{self._bound.plan.select!r} adds {CHANNELS}: {call.implementation!r} takes {FLASH} at most. Use "
                "attn_implementation='sdpa', or refit=False."
            )

    def _show(self, call: Call, cohort: Cohort, group: int, slot: int, queries: Tensor) -> None:
        """Show a cohort's queries (B, H*G, new, D) to the score: now in a second reading, otherwise at the settling."""
        store, batch = cohort.stores[group], self.batch
        if not batch.reading:
            store.remember(slot, queries, cohort.seen, batch.recording)
            return
        with exactly(call):
            store.hear(slot, queries, cohort.seen, self.learned.scaling[call.layer], batch.work)

    def _is_dense(self, mask: Any, promise: Promise) -> bool:
        """Return True if a mask is over all tokens that the model has seen."""
        return not isinstance(mask, Tensor) or mask.shape[-1] >= self.batch.columns[promise.layer]

    # ---- what the cache is asked

    def update(self, key_states: Tensor, value_states: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H, new, D); returns all that its attention should see."""
        batch, call = self.batch, running()
        ours = call is not None and call.listener is self
        rows, new = key_states.shape[0], key_states.shape[2]
        if self.binding is None:  # the caller may go on writing to what it gave
            key_states, value_states = key_states.clone(), value_states.clone()
        if self._begins(layer):
            self._begin(rows, new, call if ours else None)
        batch.running, self._forward.begun = True, False
        if ours and call is not None and self._forward.positions is not None:
            self._check_rotation(call, self._forward.positions)
        self._forward.fed.add(layer)
        # count what a dense cache would hold
        batch.columns[layer] += new
        numbers = key_states.shape[1] * (key_states.shape[3] + value_states.shape[3])
        batch.shapes[layer] = (numbers, key_states.element_size())
        # store it, unless the layer reads another one
        group, slot = batch.binding.places[layer]
        fresh = [key_states, value_states]
        if batch.binding.plan.hidden:
            assert call is not None  # a stack with a transform is bound
            fresh.append(self._hidden(call))
        if layer not in batch.binding.shares:
            for cohort in batch.cohorts:
                if cohort.new:
                    cohort.stores[group].append(slot, KV(*(cohort.its(x) for x in fresh)))
        # hand out all that is held, or a promise of it
        promise = self._promises.make(layer, KV(key_states, value_states), ours)
        batch.running = batch.running and ours  # without hooks nobody says when a forward ends
        return promise.kv.keys, promise.kv.values

    def _begins(self, layer: int) -> bool:
        """Return True if this layer is the first of a forward whose beginning was not seen yet."""
        forward = self._forward
        return not forward.begun and (not forward.fed or layer in forward.fed)

    def _begin(self, rows: int, new: int, call: Call | None) -> None:
        """A new forward: check it, and find out which of its tokens are padding."""
        batch = self.batch
        if batch.size is not None and rows != batch.size:
            raise UseError(
                f"{self.label} holds {batch.size} rows and was given {rows}. Use reset() or a new stack for another "
                "text, batch_repeat_interleave or batch_select_indices for other rows of this one."
            )
        if not batch.reading:
            batch.check_complete()
            if len(set(batch.columns.values())) > 1:  # without hooks nobody says when a forward ends
                batch.stopped = "the last forward"
                batch.check_complete()
            batch.catch_up(self.learned.scaling)
            batch.check_text(rows, new)
        seen = max(batch.columns.values(), default=0)
        tells = self.splits and batch.binding.tells_padding
        real = masks.real_tokens(call.mask, seen, new) if call is not None and tells else None
        self._forget()
        watched = call is not None and bool(batch.binding.rotary)
        positions = self._forward.positions = self._positions(call, rows, new) if call and watched else None
        if batch.binding.plan.renumbers and positions is not None:
            check_places(self.label, batch, positions, real)
        # from here on an interrupt leaves the batch between two forwards
        batch.running = True
        batch.writes += 1
        batch.begin(rows, new, real)
        if positions is not None:
            batch.place(batch.binding.rotary[0].marked(positions))
        self._forward.begun, self._forward.new = True, new

    def _positions(self, call: Call, rows: int, new: int) -> Tensor:
        """The positions (B, axes, new) that the model's rotary module was given for the new tokens."""
        binding, first = self._bound, self.batch.columns[call.layer]
        own = binding.ropes.get(call.layer)
        own = own if own in binding.rotary else None
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
            "was handed rotary tables (position_embeddings) that are not those of the position_ids. Let the model "
            "compute its tables, or use stages that take keys as they are cached, such as Quant."
        )

    def _hidden(self, call: Call) -> Tensor:
        """Hidden states that the running attention module was given, (B, 1, new, hidden size)."""
        if call.hidden is None:
            transform = self._bound.plan.transform
            raise UseError(
                f"{transform and transform.stage!r} needs the hidden states, and layer {call.layer} of "
                f"{self._bound.name} is not given any as `hidden_states`. Use merge='project'."
            )
        return call.hidden.unsqueeze(1)

    # ---- the answer

    def _answer(
        self,
        call: Call,
        promise: Promise,
        query: Tensor,
        width: int,
        mask: Any,
        kwargs: Mapping[str, Any],
        plain: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention from the store, one cohort after the other: output (B, new, query heads, D) and, with eager
        attention, weights (B, query heads, new, tokens seen): evicted tokens have none."""
        batch = self.batch
        group, slot = batch.binding.places[promise.layer]
        rows, heads, new, _ = query.shape
        dense = batch.columns[promise.layer]
        out = weights = None
        for number, cohort in enumerate(batch.cohorts):
            places, n = self._asked(cohort, new)
            if not n:
                continue
            every = cohort.rows is None and places is None
            q = query
            if not every:
                where = torch.arange(rows, device=query.device) if cohort.rows is None else cohort.rows.to(query.device)
                at = torch.arange(new, device=query.device) if places is None else places.to(query.device)
                q = query[where[:, None], :, at].transpose(1, 2)
            asked = Asked(call, cohort, number, places, n, q, mask, dense, every, promise.attached, slot, kwargs)
            answer, looked = answered(asked, cohort.stores[group].pieces, partial(self._of_piece, plain=plain))
            if every:
                return answer, looked
            if out is None:
                out = query.new_zeros(rows, new, heads, width)
            out[where[:, None], at] = answer
            if looked is not None:
                if weights is None:
                    weights = query.new_zeros(rows, heads, new, dense)
                weights[where[:, None], :, at] = looked.to(weights.dtype).transpose(1, 2)
        out = query.new_zeros(rows, new, heads, width) if out is None else out
        return self._with_newest(call, out, promise, query, mask, plain), weights

    def _of_piece(self, asked: Asked, store: Store, plain: Any) -> tuple[Tensor, Tensor | None]:
        """The answer of heads that hold equally many tokens, and their weights over all tokens seen."""
        call, cohort, dense, q, slot, attached = (
            asked.call, asked.cohort, asked.dense, asked.query, asked.slot, asked.attached
        )  # fmt: skip
        fits = asked.every and store.held == dense
        fuses = self._may_fuse(store, asked.n) and _is_simple(asked.kwargs)
        part = None
        if fuses or not fits:
            part = self._sight.part(asked.mask, call, asked.number, cohort, asked.places, asked.n, dense)
            part = part if part is None else asked.cut(part)
        if fuses:
            answer, looked = self._fused(call, store, slot, cohort, q, part, attached is not None)
        else:
            # scratch memory is written again by the next layer, and a backward pass comes later
            work = Workspace() if torch.is_grad_enabled() and q.requires_grad else self.batch.work
            kv = self._promises.attach(store.read(slot, cohort.seen, work), cohort, attached)
            own = asked.cut(asked.mask) if fits else self._sight.mask(call, store, cohort, q, part)
            # positions of all rows: only flash attention looks at them, to find packed texts
            changes = {} if asked.every or "position_ids" not in asked.kwargs else {"position_ids": None}
            bias, scaling = store.bias(slot), self.learned.scaling[call.layer]
            answer, looked = _with_bias(plain, q, kv, own, bias, scaling, **changes)
        if looked is not None and store.held < dense:
            looked = spread(looked, store, cohort, dense)
        return answer.to(q.dtype), looked

    def _with_newest(self, call: Call, out: Tensor, promise: Promise, query: Tensor, mask: Any, plain: Any) -> Tensor:
        """`out` with an answer for the newest query of rows where it is left out: a token that none sees, not even
        itself, is padding on the right, or belongs to a mask of another kind, and then its logits are wanted."""
        batch = self.batch
        last = self._forward.new - 1
        group, slot = batch.binding.places[promise.layer]
        for number, cohort in enumerate(batch.cohorts):
            dense = batch.columns[promise.layer]
            left_out = cohort.places is not None and not bool((cohort.places == last).any())
            if not left_out or not isinstance(mask, Tensor) or mask.dim() != 4 or not cohort.stores[group].held:
                continue
            rows = torch.arange(out.shape[0]) if cohort.rows is None else cohort.rows
            newest = torch.tensor([mask.shape[2] - 1])
            columns = cohort.columns.of(cohort.seen, mask.device)
            part = masks.cut(mask, cohort.rows, newest, columns, dense)
            q = query[rows.to(query.device), :, -1:]
            asked = Asked(call, cohort, number, None, 1, q, part, dense, False, promise.attached, slot, {})
            pieces = cohort.stores[group].pieces
            seen = (fitted(asked.of(heads, asked.groups_of(pieces)), piece) for heads, piece in pieces)
            if not any(bool(masks.visible(own).any()) for own in seen):
                continue  # padding on the left sees nothing
            answer, _ = answered(asked, pieces, partial(self._of_newest, plain=plain))
            out[rows.to(out.device), -1:] = answer.to(out.dtype)
        return out

    def _of_newest(self, asked: Asked, store: Store, plain: Any) -> tuple[Tensor, None]:
        """The answer to the newest query alone, whose weights nobody wants."""
        kv = self._promises.attach(store.read(asked.slot, asked.cohort.seen, Workspace()), asked.cohort, asked.attached)
        bias, scaling = store.bias(asked.slot), self.learned.scaling[asked.call.layer]
        return _with_bias(plain, asked.query, kv, fitted(asked, store), bias, scaling)[0], None

    def _asked(self, cohort: Cohort, queries: int) -> tuple[Tensor | None, int]:
        """Return the part of the `queries` that are a cohort's tokens (None: all), and how many: a layer that reuses
        the keys of another may ask for the newest tokens of a forward alone."""
        if cohort.places is None:
            return None, min(queries, cohort.new)
        places = cohort.places - (self._forward.new - queries)
        places = places[places >= 0]
        return None if len(places) == queries else places, len(places)

    def _may_fuse(self, store: Store, new: int) -> bool:
        return self.fused and store.plan.fuses and new == 1 and store.sealed_tokens > 0

    def _fused(
        self, call: Call, store: Store, slot: int, cohort: Cohort, query: Tensor, part: Tensor | None, attached: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One query, answered from packed codes. `attached`: gradients may be asked for of the new token."""
        if part is not None:
            part = masks.visible(part)[:, None, None] if part.dim() == 2 else part
            part = masks.fitted(part, store.positions(cohort.seen), query.shape[1])
        scaling = self.learned.scaling[call.layer]
        with torch.no_grad(), exactly(call):
            answer, unsorted = store.attend(slot, query.detach(), cohort.seen, scaling, self.batch.work, part)
        looked = store.in_order(unsorted) if call.implementation == "eager" else None
        if torch.is_grad_enabled() and (query.requires_grad or attached or self.batch.attached):
            why = (
                f"{self.label} answered a single query from packed codes, which has no gradient. Use fused=False, or a "
                "DynamicCache."
            )
            answer = refusing_gradient(answer, why)
            looked = None if looked is None else refusing_gradient(looked, why)
        return answer, looked

    @property
    def _bound(self) -> Binding:
        assert self.binding is not None  # `enter` has refused what is not bound
        return self.binding


def _with_bias(
    plain: Any, query: Tensor, kv: KV, mask: Any, bias: Tensor | None, scaling: float, **changes: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention with `bias` (B, H, T) added to the logits, whatever computes it: as one channel more, in which every
    query has a one."""
    if bias is None:
        answer: tuple[Tensor, Tensor | None] = plain(query, kv.keys, kv.values, mask, **changes)
        return answer
    more = -query.shape[-1] % CHANNELS or CHANNELS  # kernels want heads of even sizes, and values as wide as keys
    ones = torch.nn.functional.pad(query.new_ones(*query.shape[:-1], 1), (0, more - 1))
    biases = torch.nn.functional.pad((bias / scaling).unsqueeze(-1).to(kv.keys), (0, more - 1))
    width, wider = kv.values.shape[-1], query.shape[-1] + more
    keys = torch.cat([kv.keys, biases], dim=-1)
    values = torch.nn.functional.pad(kv.values, (0, max(0, wider - width)))
    out, weights = plain(torch.cat([query, ones], dim=-1), keys, values, mask, scaling=scaling, **changes)
    return out[..., :width].contiguous(), weights


def exactly(call: Call) -> AbstractContextManager[Any]:
    """Arithmetic as it is written, whatever autocast would make of it."""
    device = (device_of(call.module) if call.hidden is None else call.hidden.device).type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_simple(kwargs: Mapping[str, Any]) -> bool:
    """Return True if attention is plain softmax(qk)v, without any of the extras some models ask for."""
    extras = ("softcap", "s_aux", "position_bias", "sliding_window")
    return not kwargs.get("dropout") and all(kwargs.get(name) is None for name in extras)


def _is_tiled(key: Tensor, cached: Tensor) -> bool:
    """Return True if attention was called with all kv heads `cached`, one time after the other (JetMoe: each expert has
    its queries)."""
    times, rest = divmod(key.shape[1], cached.shape[1])
    fits = times > 1 and not rest and key.shape[2:] == cached.shape[2:]
    return fits and all(torch.equal(x, cached) for x in key.chunk(times, dim=1))


def _untiled(query: Tensor, heads: int) -> Tensor:
    """Queries (B, times * heads, ...) of tiled keys, those of one kv head side by side."""
    return query.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)


def _by_row(positions: Any, rows: int, new: int) -> Tensor | None:
    """`positions` (B or 1, new) or (axes, B or 1, new) as (B, axes, new); None where they are none of these tokens."""
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3) or positions.shape[-1] != new:
        return None
    by_row = positions.unsqueeze(1) if positions.dim() == 2 else positions.permute(1, 0, 2)
    return by_row.expand(rows, -1, -1) if by_row.shape[0] in (1, rows) else None
