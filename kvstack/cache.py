"""The one file that knows transformers' `Cache`: `KVStack` is that cache, and a pipeline of stages behind it.

    model.forward
      hook      an attention module with our cache begins                          (hook.py)
      update    new keys and values go behind the raw tokens; attention gets all   (store.py)
      attention runs on exact new tokens; the stack sees its queries               (hook.py)
      leave     the group of layers is complete: select, transform, encode, seal   (store.py)

Rows of a batch whose texts differ in length (left padding) are held apart, as cohorts of equal length without any
padding. So a padded row goes through exactly the arithmetic it would go through alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from . import disk as saved
from .calibration.windows import held_by
from .encode.exact import Plain
from .errors import BindError, StageError, UseError
from .model import hooks as hook
from .model.rope import Rope, find_ropes
from .packed import storage_bytes
from .report import Part, Report
from .spec import SETTINGS, parse, to_dict, to_spec
from .stage import Encode, Select, Stage, Transform, is_stage
from .store.budget import leading
from .store.store import RAW, Plan, Store
from .types import KV
from .workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KVStack"]

FULL = "full_attention"


class StackLayer(CacheLayerMixin):
    """Stands for one compressed layer where transformers asks a layer what it is; the stack does its work."""

    is_croppable = True
    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UseError("a KVStack stores groups of layers together: call update on the stack, not on one layer.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise UseError("call get_mask_sizes on the stack, not on one layer.")

    def get_seq_length(self) -> int:
        raise UseError("call get_seq_length on the stack, not on one layer.")

    def get_max_length(self) -> int:
        return -1


@dataclass
class Cohort:
    """Rows of the batch that have seen equally many tokens. `rows` is None where that is all of them."""

    rows: Tensor | None
    stores: list[Store]
    seen: int = 0
    new: int = 0  # tokens of the running forward
    fresh: int = 0  # tokens since the last settling

    def of(self, x: Tensor) -> Tensor:
        """This cohort's rows and new tokens of `x` (B, heads, new, ...)."""
        x = x if self.rows is None else x.index_select(0, self.rows.to(x.device))
        return x if self.new == x.shape[2] else x[:, :, x.shape[2] - self.new :]

    def pick(self, rows: Tensor | None, local: Tensor) -> Cohort:
        """The cohort of those of our own rows that `local` names, now numbered `rows` in the batch."""
        return Cohort(rows, [store.rows(local) for store in self.stores], self.seen, self.new, self.fresh)


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
    queries: dict[int, Tensor] = field(default_factory=dict)


class KVStack(Cache):
    """A KV cache that is a pipeline: stages of three kinds compress what a model caches.

    Args:
        stages: at most one stage that selects tokens (`Evict`), one that transforms groups of layers, and one that
            encodes numbers (`Quant`), in any order: the kind gives the place. None at all is a plain cache.
        model: bind to this model at once. Without it the stack binds itself to the model in whose forward it
            first appears.
        sinks: first tokens of a text that always stay as they are (default 4).
        window: newest tokens that always stay as they are (default 64).
        block: while decoding, tokens are compressed this many at a time (default 32; at least what the encoder
            packs together).
        fused: let attention read packed codes for a single query (default True). False always hands it decoded
            tensors; the two agree up to rounding.

    Raises:
        StageError: the stages cannot work together. BindError: they cannot work with this model.

    Example:
        >>> from kvstack import Evict, KVStack, Quant
        >>> KVStack([Quant(2), Evict(0.2)])
        KVStack([Quant(bits=2), Evict(keep=0.2)])
    """

    def __init__(
        self,
        stages: Sequence[Stage] = (),
        *,
        model: PreTrainedModel | None = None,
        sinks: int = 4,
        window: int = 64,
        block: int = 32,
        fused: bool = True,
    ) -> None:
        super().__init__(layers=[])
        self.stages = _checked(stages)
        for name, value, least in (("sinks", sinks, 0), ("window", window, 0), ("block", block, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise StageError(f"KVStack({name}={value!r}): {name} is a number of tokens, {least} or more.")
        self.sinks, self.window, self.block, self.fused = sinks, window, block, fused
        self._model_name: str | None = None
        self._finish: Callable[[], Any] | None = None
        self._model: PreTrainedModel | None = None
        self._work = Workspace()
        self._plan = self._make_plan(self.stages)
        self._modules: dict[int, torch.nn.Module] = {}
        self._ropes: dict[int, Rope | None] = {}
        self._place: dict[int, tuple[int, int]] = {}  # layer -> (group, slot in the group)
        self._groups: list[list[int]] = []
        self._shares: dict[int, int] = {}  # layer that holds nothing -> the layer whose keys and values it reads
        self._ends: list[int] = []  # of each group, the last layer that reads it
        self._scaling: dict[int, float] = {}
        self._direct: set[int] = set()  # layers whose attention uses just what update returned
        self._empty()
        self._disarm = hook.arm(self) if model is None else None
        if model is not None:
            self.bind(model)

    def _empty(self) -> None:
        self._cohorts = [self._new_cohort()]
        self._columns = dict.fromkeys(self._place, 0)
        self._shapes: dict[int, tuple[int, int]] = {}  # layer -> (numbers, bytes of a number) per token and row
        self._batch: int | None = None
        self._recording = False  # tokens may still be taken back: compress in crop
        self._uncropped = False
        self._forward = Forward()
        self._work.clear()

    def _new_cohort(self) -> Cohort:
        return Cohort(None, [Store(self._plan, group, self._ropes) for group in self._groups])

    # ---- what it is

    def __repr__(self) -> str:
        settings = [repr(list(self.stages))]
        for name, default in (("sinks", 4), ("window", 64), ("block", 32), ("fused", True)):
            value = getattr(self, name)
            settings += [f"{name}={value!r}"] if value != default else []
        return f"KVStack({', '.join(settings)})"

    def __bool__(self) -> bool:
        # Cache has a length, so an unbound stack (no layers yet) would count as "no cache"
        return True

    @classmethod
    def from_spec(cls, spec: str | Mapping[str, Any], *, model: PreTrainedModel | None = None) -> Self:
        """The stack that a spec describes: a string such as `"quant:2+evict:0.2,score=snapkv(window=32)"` or the
        dict of `to_dict`. Round-trips with `spec` and `to_dict`."""
        stages, settings = parse(spec)
        return cls(stages, model=model, **settings)

    @property
    def spec(self) -> str:
        """The stages as a spec string; the other settings are in `to_dict`."""
        return to_spec(self.stages)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, for JSON."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {"stages": [to_dict(stage) for stage in self.stages], **settings}

    # ---- binding

    def _make_plan(self, stages: Sequence[Stage]) -> Plan:
        kinds: dict[str, Any] = {stage.kind: stage for stage in stages}
        transform: Transform | None = None if _sharing(stages) else kinds.get("transform")
        encode: Encode | None = kinds.get("encode") or (Plain() if transform else None)
        return Plan(kinds.get("select"), transform, encode, self.sinks, self.window, self.block)

    def bind(self, model: PreTrainedModel) -> Self:
        """Fit the stages to `model` and put the hooks on it. Done by itself at the first forward."""
        if self._model is model:
            return self
        name = type(model).__name__
        if self._model is not None:
            raise BindError(f"{self!r} is bound to a {self._model_name}; make a new stack for this {name}.")
        if model.config.is_encoder_decoder:
            raise BindError(
                f"{name} is an encoder-decoder: kvstack compresses decoder-only models. "
                "Use transformers' own cache for it."
            )
        config = model.config.get_text_config(decoder=True)
        types, arguments = get_layer_types_and_kwargs(config)
        modules = hook.attention_modules(model)
        full = [i for i, kind in enumerate(types) if kind == FULL]
        lost = [i for i in full if i not in modules]
        if lost or not modules:
            where = f"layers {lost}" if lost and modules else "it"
            raise BindError(f"{name} has no kv cache that kvstack can find: no attention module of {where} takes one.")
        if self.stages:
            self._check_model(name, full, types, modules)
            _check_sharing(self.stages, name, full, modules)
            # a transform may take a minute to fit: what is wrong elsewhere is said before
            stages = sorted(self.stages, key=lambda stage: stage.kind == "transform")
            # what stages keep for all stacks must not be inference tensors, whatever forward this happens in
            with torch.inference_mode(False), torch.no_grad():
                bound = [stage.bind(model) for stage in stages]
                self._plan = _allotted(self._make_plan(bound))
            _check_nesting(bound)
            _check_sharing(bound, name, full, modules)
            self._ropes = find_ropes(model, {i: modules[i] for i in full}, types)
            transform = self._plan.transform
            if transform and transform.unrotated and (bare := [i for i in full if self._ropes[i] is None]):
                raise BindError(
                    f"{transform!r} wants keys without rotary embedding, and {name} has none that kvstack knows "
                    f"in layers {bare}."
                )
            self._shares = _checked_shares(bound, model, full, modules)
        self._set_groups(full)
        self._layer_types, self._layer_arguments, self._modules = types, arguments, modules
        self.layers = self._new_layers()
        recording = self._recording  # assisted decoding says so before the first forward
        self._empty()
        self._model, self._model_name = model, name
        if recording:
            self.activate_past_recording()
        self._finish = hook.install(self, model)
        if self._disarm is not None:
            self._disarm()
            self._disarm = None
        return self

    def _check_model(self, name: str, full: list[int], types: list[str], modules: Mapping[int, Any]) -> None:
        if not full:
            kinds = ", ".join(sorted(set(types)))
            raise BindError(
                f"{name} has only layers of type {kinds}, whose memory is bounded already, so {self!r} has nothing "
                "to compress. Use a DynamicCache."
            )
        transform, select = self._plan.transform, self._plan.select
        if transform and transform.layers and len(full) % transform.layers:
            divisors = [n for n in range(1, len(full) + 1) if len(full) % n == 0]
            raise BindError(
                f"{transform!r} stores {transform.layers} layers together, and {name} has {len(full)} full-attention "
                f"layers, which do not divide. Use layers= one of {divisors}."
            )
        silent = [i for i in full if not hook.gives_queries(modules[i])]
        if silent and select and (select.queries or select.tracks):
            raise BindError(
                f"{select!r} needs the queries, and the attention of {name} (layer {silent[0]}) does not go through "
                'transformers\' interface, so it gives none. Use score="keydiff", "knorm" or "streaming".'
            )

    def unbind(self) -> None:
        """Take the hooks off the model. The stack keeps its tokens, but can no longer be used in a forward."""
        if self._finish is not None:
            self._finish()
            self._finish = None

    def _set_groups(self, layers: list[int]) -> None:
        size = self._plan.layers
        holding = [layer for layer in layers if layer not in self._shares]
        self._groups = [holding[i : i + size] for i in range(0, len(holding), size)]
        self._place = {layer: (g, s) for g, group in enumerate(self._groups) for s, layer in enumerate(group)}
        self._place |= {layer: self._place[source] for layer, source in self._shares.items()}
        self._ends = [max(i for i in layers if self._place[i][0] == g) for g in range(len(self._groups))]

    def _new_layers(self) -> list[Any]:
        return [
            StackLayer() if kind == FULL else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for kind, arguments in zip(self._layer_types, self._layer_arguments, strict=True)
        ]

    def _others(self) -> list[Any]:
        """The layers that are not ours to compress, as transformers made them."""
        return [other for layer, other in enumerate(self.layers) if layer not in self._place]

    # ---- lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens the model has fed through a layer, padding included; not how many are held."""
        if layer_idx in self._place:
            return self._columns[layer_idx]
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], CacheLayerMixin):
            return cast(int, super().get_seq_length(layer_idx))
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(tokens attention will see, position of the first of them): the held tokens count as the newest ones."""
        if layer_idx not in self._place:
            return super().get_mask_sizes(query_length, layer_idx) if self.layers else (query_length, 0)
        self._catch_up()
        held, seen = self.held, self._columns[layer_idx]
        return held + query_length, seen - held

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self._batch is not None

    @property
    def batch_size(self) -> int:
        return -1 if self._batch is None else self._batch

    @property
    def seen(self) -> int:
        """Tokens the model saw, padding included."""
        return min(self._columns.values(), default=0)

    @property
    def held(self) -> int:
        """Tokens held in each compressed layer (the most of any row)."""
        return max((store.held for cohort in self._cohorts for store in cohort.stores[:1]), default=0)

    @property
    def compressed_layers(self) -> list[int]:
        """Indices of the layers this stack compresses: those with full attention. Empty before it is bound."""
        return sorted(self._place)

    def positions(self, layer_idx: int, row: int = 0) -> Tensor:
        """True positions of the tokens a layer holds for one row: (H or 1, held), ascending, padding not counted."""
        group, _ = self._place[layer_idx]
        cohort, local = self._cohort_of(row)
        positions = cohort.stores[group].positions(cohort.seen)
        return positions[local if positions.shape[0] > 1 else 0]

    def read(self, layer_idx: int, row: int = 0) -> KV:
        """What a layer holds for one row, decoded: keys and values (1, H, held, D) in the order of `positions`."""
        group, slot = self._place[layer_idx]
        cohort, local = self._cohort_of(row)
        store = cohort.stores[group]
        kv = store.read(slot, cohort.seen, Workspace())
        store.end_forward()
        return KV(kv.keys[local : local + 1].clone(), kv.values[local : local + 1].clone())

    def _cohort_of(self, row: int) -> tuple[Cohort, int]:
        for cohort in self._cohorts:
            rows = range(self._batch or 0) if cohort.rows is None else cohort.rows.tolist()
            if row in rows:
                return cohort, list(rows).index(row)
        raise UseError(f"row {row} is not in this cache, which has {self._batch or 0} rows.")

    # ---- a forward

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H, new, D); returns all that attention should see."""
        call = hook.running()
        ours = call is not None and call.stack is self
        if self._model is not None and not ours:
            raise UseError(
                f"{self!r} is bound to a {self._model_name}, and something else called its update. A stack serves "
                "one model: make a new KVStack for another, and call the model, not its cache. Hooks do not run inside "
                "a model that torch.compile compiled whole: leave it uncompiled, or compile its mlp blocks."
            )
        if self._model is None:
            self._grow_unbound(layer_idx)
        if layer_idx not in self._place:
            return cast(tuple[Tensor, Tensor], super().update(key_states, value_states, layer_idx, *args, **kwargs))
        if not self._forward.fed or layer_idx in self._forward.fed:
            self._begin(key_states, call if ours else None)
        self._forward.fed.add(layer_idx)
        new = key_states.shape[2]
        self._columns[layer_idx] += new
        numbers = key_states.shape[1] * (key_states.shape[3] + value_states.shape[3])
        self._shapes[layer_idx] = (numbers, key_states.element_size())
        own = layer_idx not in self._shares
        group, slot = self._place[layer_idx]
        kv = KV(key_states, value_states)
        ragged = len(self._cohorts) > 1 or self._cohorts[0].new != new
        deferred = ragged
        fresh = [key_states, value_states]
        if self._plan.hidden:
            assert call is not None  # a stack with a transform is bound
            fresh.append(self._hidden(call))
        for cohort in self._cohorts:
            store = cohort.stores[group]
            if cohort.new and own:
                store.append(slot, KV(*(cohort.of(x) for x in fresh)))
            if ragged:
                continue
            deferred = ours and self._may_fuse(store, layer_idx, new)
            if not deferred:
                kv = store.read(slot, cohort.seen, self._work)
        if deferred and not (call is not None and ours and hook.gives_queries(call.module)):
            raise UseError(
                f"padded batches need a model that calls attention through transformers' interface, and "
                f"{self._model_name} does not. Use batches of texts of one length."
            )
        self._forward.given[layer_idx] = Given(kv, deferred)
        return kv.keys, kv.values

    def _hidden(self, call: hook.Call) -> Tensor:
        """What the running attention module was given, (B, 1, new, hidden size)."""
        if call.hidden is None:
            raise UseError(
                f"{self._plan.transform!r} needs the hidden states, and layer {call.layer} of {self._model_name} is "
                "not given any as `hidden_states`. Use merge='project'."
            )
        return call.hidden.unsqueeze(1)

    def _grow_unbound(self, layer_idx: int) -> None:
        """Serve a caller that is no transformers model: layers come as they are named, and are settled when the
        next forward begins."""
        select = self._plan.select
        if self._plan.transform or _sharing(self.stages) or (select and (select.queries or select.tracks)):
            raise UseError(
                f"{self!r} does not know its model, which this stack needs. Pass model=: KVStack([...], model=model)."
            )
        if layer_idx >= len(self.layers):
            held = self._cohorts
            self._set_groups(list(range(layer_idx + 1)))
            self.layers = [*self.layers, *(StackLayer() for _ in range(layer_idx + 1 - len(self.layers)))]
            self._columns = {layer: self._columns.get(layer, 0) for layer in self._place}
            for cohort in held:
                cohort.stores += [Store(self._plan, group, self._ropes) for group in self._groups[len(cohort.stores) :]]

    def _may_fuse(self, store: Store, layer: int, new: int) -> bool:
        return self.fused and new == 1 and store.sealed_tokens > 0 and layer in self._direct

    def _begin(self, keys: Tensor, call: hook.Call | None) -> None:
        """A new forward: check it, and find out which of its tokens are padding."""
        rows, new = keys.shape[0], keys.shape[2]
        if self._batch is not None and rows != self._batch:
            raise UseError(
                f"{self!r} holds {self._batch} rows and was given {rows}. Use reset() or a new stack for another "
                "text, batch_repeat_interleave or batch_select_indices for other rows of this one."
            )
        self._catch_up()
        self._forward = Forward()
        self._batch = rows
        for cohort in self._cohorts:
            cohort.new = new
            if not any(store.dirty for store in cohort.stores):
                cohort.fresh = 0
        # a stack without stages holds padding as DynamicCache does, so that the two are equal bit for bit
        if self.stages and call is not None and new > 1:
            real = hook.new_tokens(call.mask, new)
            if real is not None:
                self._split(real)
        for cohort in self._cohorts:
            cohort.seen += cohort.new
            cohort.fresh += cohort.new
        self._uncropped = True

    def _split(self, real: Tensor) -> None:
        """Part the cohorts so that rows with equally many real new tokens are together."""
        counts = real.sum(1)
        steps = torch.arange(real.shape[1], device=real.device)
        if not torch.equal(real, steps >= real.shape[1] - counts[:, None]):
            raise UseError(
                "padding must be on the left of the new tokens, and a row of this batch has it elsewhere. "
                "Use tokenizer.padding_side = 'left'."
            )
        parted = []
        for cohort in self._cohorts:
            rows = torch.arange(len(counts), device=counts.device) if cohort.rows is None else cohort.rows
            rows = rows.to(counts.device)
            mine = counts[rows]
            lengths = mine.unique().tolist()
            for length in lengths:
                local = (mine == length).nonzero().flatten()
                part = cohort if len(lengths) == 1 else cohort.pick(rows[local], local)
                part.new = int(length)
                parted.append(part)
        self._cohorts = parted

    def _enter(self, call: hook.Call) -> None:
        """An attention module begins with this cache (called by its hook)."""
        if self._model is None:
            raise UseError(f"{self!r} was put on a model's attention without being bound to the model.")
        if self._modules.get(call.layer) is not call.module:
            raise UseError(
                f"{self!r} is bound to a {self._model_name} and was given to another model. "
                "A stack serves one model: make a new KVStack for the other."
            )

    def _attention(
        self,
        call: hook.Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: Mapping[str, Any],
        plain: Any,
    ) -> Any:
        """Stands in for the attention function while one of our layers runs (called by its hook)."""
        given = self._forward.given.get(call.layer)
        if given is None:  # a layer that is not ours to compress
            return plain(query, key, value, mask)
        direct = key is given.kv.keys and value is given.kv.values
        if direct:
            self._direct.add(call.layer)
        select = self._plan.select
        if not direct and (given.deferred or (select and (select.queries or select.tracks))):
            what = "a padded batch" if given.deferred else repr(select)
            raise UseError(
                f"layer {call.layer} of {self._model_name} does not attend to the keys it caches, so {what} cannot "
                'work with it. Use batch size 1 and a score without queries, such as "keydiff".'
            )
        scaling = kwargs.get("scaling")
        self._scaling[call.layer] = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        group, slot = self._place[call.layer]
        if select and (select.queries or select.tracks) and call.layer not in self._shares:
            for cohort in self._cohorts:
                if cohort.new:
                    cohort.stores[group].remember(slot, cohort.of(query))
            if select.tracks:
                self._forward.queries[call.layer] = query
        if not given.deferred:
            return plain(query, key, value, mask)
        return self._attend_cohorts(call, query, value, kwargs, plain)

    def _attend_cohorts(
        self, call: hook.Call, query: Tensor, value: Tensor, kwargs: Mapping[str, Any], plain: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention from the store, one cohort after the other: output (B, new, query heads, D) and, with eager
        attention, weights (B, query heads, new, most tokens of any row)."""
        group, slot = self._place[call.layer]
        rows, heads, new, _ = query.shape
        out = query.new_zeros(rows, new, heads, value.shape[-1])
        weights = None
        if call.implementation == "eager":
            weights = query.new_zeros(rows, heads, new, max(c.stores[group].held for c in self._cohorts))
        for cohort in self._cohorts:
            if not cohort.new:
                continue
            store, q = cohort.stores[group], cohort.of(query)
            if self._may_fuse(store, call.layer, cohort.new) and _is_simple(kwargs):
                part, unsorted = store.attend(slot, q, cohort.seen, self._scaling[call.layer], self._work)
                seen = None if weights is None else store.in_order(unsorted)
            else:
                kv = store.read(slot, cohort.seen, self._work)
                mask = hook.causal_mask(call.implementation, cohort.new, kv.tokens, q)
                # positions of all rows: only flash attention looks at them, to find packed texts
                changes = {"position_ids": None} if "position_ids" in kwargs else {}
                part, seen = plain(q, kv.keys, kv.values, mask, **changes)
            part = part.to(query.dtype)
            if cohort.rows is None and cohort.new == new:
                return part, seen
            where = torch.arange(rows, device=out.device) if cohort.rows is None else cohort.rows.to(out.device)
            out[where, new - cohort.new :] = part
            if weights is not None and seen is not None:
                weights[where, :, new - cohort.new :, weights.shape[-1] - seen.shape[-1] :] = seen.to(weights.dtype)
        return out, weights

    @torch.no_grad()
    def _leave(self, call: hook.Call) -> None:
        """An attention module has ended (called by its hook): compress what is complete."""
        if self._forward.given.pop(call.layer, None) is None:
            return
        group, slot = self._place[call.layer]
        queries = self._forward.queries.pop(call.layer, None)
        if queries is not None:
            for cohort in self._cohorts:
                if cohort.new:
                    store = cohort.stores[group]
                    store.track(slot, cohort.seen, self._scaling[call.layer], cohort.of(queries), self._work)
        if call.layer == self._ends[group] and not self._recording:
            self._settle(group)
        if call.layer == max(self._ends):
            self._work.clear()
            for cohort in self._cohorts:
                for store in cohort.stores:
                    store.end_forward()

    # ---- compressing

    def _settle(self, group: int) -> None:
        for cohort in self._cohorts:
            store = cohort.stores[group]
            if store.dirty:
                scalings = [self._scaling.get(layer, 1.0) for layer in store.layers]
                store.settle(cohort.seen, cohort.fresh, scalings, self._work)

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Compress what an earlier forward left: its tokens had to be verified first, or no hook said it ended."""
        if self._recording and self._uncropped:
            self._recording = False  # nobody cropped after the last forward: it was not assisted decoding
        if not self._recording:
            for group in range(len(self._groups)):
                self._settle(group)
            self._work.clear()

    def activate_past_recording(self) -> None:
        """Assisted decoding begins: wait for `crop` before compressing, since tokens may be taken back."""
        if self.seen:
            raise UseError(
                "transformers feeds the whole text again when assisted decoding or prompt lookup starts on a cache "
                "that already holds tokens. Start with a new stack, or continue without assistance."
            )
        super().activate_past_recording()
        self._recording, self._uncropped = True, False

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: 0 or a negative number, as transformers has it. Where the text is cut back to
        before tokens that were evicted or sealed, what is held of it stays; heads that kept different tokens let go
        of their newest until all hold equally many."""
        if tokens_to_remove > 0:
            raise UseError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove, or 0.")
        remove = -tokens_to_remove
        if remove > self.seen:
            raise UseError(f"crop({tokens_to_remove}): the cache has seen {self.seen} tokens.")
        for other in self._others():
            other.crop(tokens_to_remove)
        if remove:
            for cohort in self._cohorts:
                gone = min(remove, cohort.seen)
                if not cohort.seen:
                    continue
                # one count for all layers: one attention mask serves them all
                stay = min(store.older_than(cohort.seen - gone, cohort.seen) for store in cohort.stores)
                for store in cohort.stores:
                    store.crop(cohort.seen, gone, stay)
                cohort.seen -= gone
                cohort.fresh = max(0, cohort.fresh - gone)
            self._columns = {layer: seen - remove for layer, seen in self._columns.items()}
        self._uncropped = False
        if self._recording:
            for group in range(len(self._groups)):
                self._settle(group)

    # ---- rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of `beam_idx` (B,), as beam search asks at every step."""
        for other in self._others():
            other.reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        for other in self._others():
            other.batch_repeat_interleave(repeats)
        if self._batch is not None:
            self._select_rows(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows at `indices`."""
        for other in self._others():
            other.batch_select_indices(indices)
        self._select_rows(indices)

    def _select_rows(self, indices: Tensor) -> None:
        if self._batch is None:
            return
        self._catch_up()
        indices = torch.arange(self._batch, device=indices.device)[indices]  # a boolean mask is welcome too
        if indices.numel() == self._batch and bool((indices == torch.arange(self._batch, device=indices.device)).all()):
            return
        chosen = []
        for cohort in self._cohorts:
            if cohort.rows is None:
                chosen.append(cohort.pick(None, indices))
                continue
            mine = cohort.rows.to(indices.device)
            where, local = (indices[:, None] == mine[None, :]).nonzero(as_tuple=True)
            if len(where):
                chosen.append(cohort.pick(where, local))
        self._cohorts = chosen
        self._batch = indices.numel()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        raise UseError(
            "a KVStack cannot be offloaded layer by layer: it stores groups of layers, compressed, in place."
        )

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self.offload(layer_idx, only_non_sliding)

    def reset(self) -> None:
        """Forget everything, ready for another text; the stack stays bound."""
        if self._model is not None:
            self.layers = self._new_layers()
        self._empty()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVStack:
        import copy

        other = KVStack(
            self.stages, sinks=self.sinks, window=self.window, block=self.block, fused=self.fused, model=self._model
        )
        memo[id(self)] = other
        if self._model is None:
            other._set_groups([layer for group in self._groups for layer in group])
        other.layers = copy.deepcopy(self.layers, memo)
        everything = torch.arange(self._batch or 0)
        other._cohorts = [
            cohort.pick(cohort.rows, everything if cohort.rows is None else torch.arange(len(cohort.rows)))
            for cohort in self._cohorts
        ]
        for name in ("_columns", "_shapes", "_scaling", "_direct"):
            setattr(other, name, copy.copy(getattr(self, name)))
        for name in ("_batch", "_recording", "_uncropped"):
            setattr(other, name, getattr(self, name))
        return other

    def __reduce__(self) -> Any:
        raise UseError(
            "a KVStack belongs to a model in memory and cannot be pickled. copy.deepcopy works, and save() and load()."
        )

    # ---- on disk

    @torch.no_grad()
    def save(self, path: str | os.PathLike[str], *, compress: bool = False) -> None:
        """Write what is held to one safetensors file, packed as it is.

        Args:
            path: the file.
            compress: deflate every tensor that gets smaller by it (zlib, level 9), which takes longer. `load` reads
                both, and gives back the same bits.
        """
        if self._model is None:
            raise UseError(f"{self!r} is not bound to a model, so there is nothing to save. Pass model=.")
        self._catch_up()
        saved.write(self, path, compress)

    @classmethod
    @torch.no_grad()
    def load(cls, path: str | os.PathLike[str], *, model: PreTrainedModel) -> Self:
        """A stack that goes on where the one that was saved to `path` stopped.

        Raises:
            UseError: no such file, damaged, or saved with another model or calibration.
        """
        described, tensors = saved.load(path)
        saved.check(described, model, os.fspath(path))
        stack = cls.from_spec(described["stack"], model=model)
        saved.read(stack, described, tensors, os.fspath(path))
        return stack

    def _device_of(self, layer: int) -> torch.device:
        return next(self._modules[layer].parameters()).device

    # ---- bytes

    def _parts(self) -> list[tuple[str, str, Tensor]]:
        found = [part for cohort in self._cohorts for store in cohort.stores for part in store.parts()]
        for other in self._others():
            found += [("model", "uncompressed layers", x) for x in _tensors_in(vars(other))]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: their whole storages, reserve and scratch memory included."""
        return storage_bytes([tensor for *_, tensor in self._parts()] + self._work.tensors())

    @property
    def model_nbytes(self) -> int:
        """Bytes of what stages fitted to the model (axes of a calibration): held once for all caches of the model, so
        not part of `nbytes`."""
        stores = self._cohorts[0].stores
        return storage_bytes([x for store in stores for stage in store.transforms.values() for x in stage.tensors])

    @property
    def dense_nbytes(self) -> int:
        """Bytes a dense cache of the same seen tokens holds, in the model's own dtype."""
        rows = self._batch or 0
        dense = sum(rows * self._columns[i] * numbers * size for i, (numbers, size) in self._shapes.items())
        others = [x for other in self._others() for x in _tensors_in(vars(other))]
        return dense + storage_bytes(others)

    @property
    def compression(self) -> float:
        """Share of the dense bytes that is saved: 0.9 means a tenth is held."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

    def report(self) -> Report:
        """Bytes by stage and part; prints as a table, `to_dict()` for data."""
        groups: dict[tuple[str, str], int] = {}
        for payer, part, nbytes in self._part_bytes():
            groups[payer, part] = groups.get((payer, part), 0) + nbytes
        parts = [Part(payer, part, nbytes) for (payer, part), nbytes in groups.items() if nbytes]
        return Report(repr(self), self.seen, self.held, self.nbytes, self.dense_nbytes, parts, self.model_nbytes)

    def _part_bytes(self) -> list[tuple[str, str, int]]:
        raw = [part for cohort in self._cohorts for store in cohort.stores for part in store.raw_bytes()]
        rest = [(payer, part, storage_bytes([x])) for payer, part, x in self._parts() if (payer, part) != RAW]
        return [*((RAW[0], name, nbytes) for name, nbytes in raw), *rest, ("stack", "scratch", self._scratch)]

    @property
    def _scratch(self) -> int:
        return storage_bytes(self._work.tensors())


def _tensors_in(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, Mapping):
        return [x for value in thing.values() for x in _tensors_in(value)]
    if isinstance(thing, list | tuple):
        return [x for value in thing for x in _tensors_in(value)]
    return []


def _is_simple(kwargs: Mapping[str, Any]) -> bool:
    """Whether attention is plain softmax(qk)v, without any of the extras some models ask for."""
    extras = ("softcap", "s_aux", "position_bias", "sliding_window")
    return not kwargs.get("dropout") and all(kwargs.get(name) is None for name in extras)


def _sharing(stages: Sequence[Stage]) -> Transform | None:
    """The transform that lets layers read other layers' keys and values, if there is one."""
    return next((stage for stage in stages if isinstance(stage, Transform) and stage.shares is not None), None)


def _check_sharing(stages: Sequence[Stage], name: str, full: Sequence[int], modules: Mapping[int, Any]) -> None:
    """Layers can read each other where attention shows itself, and reads just what is cached."""
    sharing = _sharing(stages)
    if sharing is None:
        return
    problem = None
    if silent := [i for i in full if not hook.gives_queries(modules[i])]:
        problem = f"the attention of {name} (layer {silent[0]}) does not go through transformers' interface"
    elif any(hook.expands(modules[i]) for i in full):
        problem = f"{name} expands what it caches with each layer's own weights"
    if problem is not None:
        raise BindError(
            f"{sharing!r} lets layers read each other's keys and values, and {problem}. "
            f"Leave {sharing!r} out for this model."
        )


def _checked_shares(
    stages: Sequence[Stage], model: PreTrainedModel, full: Sequence[int], modules: Mapping[int, torch.nn.Module]
) -> dict[int, int]:
    name, sharing = type(model).__name__, _sharing(stages)
    shares = dict(sharing.shares or {}) if sharing else {}
    for layer, source in shares.items():
        if not (layer in full and source in full and source < layer and source not in shares):
            raise BindError(
                f"{sharing!r} lets layer {layer} of {name} read layer {source}. A full-attention layer, of {full}, can "
                "read an earlier one that reads no other."
            )
    held = held_by(model) if shares else {}
    for layer, source in shares.items():
        one, other = (f"{held[i]} on {next(modules[i].parameters()).device}" for i in (layer, source))
        if one != other:
            raise BindError(
                f"{sharing!r} lets layer {layer} of {name} read layer {source}: they hold {one} and {other}. "
                f"Leave {sharing!r} out, or pair layers alike."
            )
    return shares


def _allotted(plan: Plan) -> Plan:
    """Where the transform knows its channels, they compete for its budget: of bits where the encoder can spend them
    unevenly, of places otherwise."""
    transform, encode = plan.transform, plan.encode
    if transform is None or encode is None or transform.allotted or not transform.channels:
        return plan
    channels = encode.allot(transform.channels, transform.numbers)
    return replace(plan, transform=transform.trim(channels or leading(transform.channels, transform.numbers)))


def _checked(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    if isinstance(stages, str):
        raise StageError(f"KVStack({stages!r}): stages is a list. Use KVStack.from_spec({stages!r}).")
    if is_stage(stages):
        raise StageError(f"KVStack({stages!r}): stages is a list. Use KVStack([{stages!r}]).")
    found: dict[str, Stage] = {}
    for stage in stages:
        if not is_stage(stage):
            hint = (
                f"Use {stage.__name__}(...)." if isinstance(stage, type) else "See `kvstack stages` for the catalogue."
            )
            raise StageError(f"{stage!r} is no stage. {hint}")
        if stage.kind in found:
            raise StageError(
                f"{found[stage.kind]!r} and {stage!r} are both of the kind {stage.kind!r}: a stack has one place for "
                "each kind. Keep one of them."
            )
        found[stage.kind] = stage
    transform, encode = found.get("transform"), found.get("encode")
    if isinstance(transform, Transform) and transform.allotted and encode:
        raise StageError(f"{transform!r} packs its numbers itself, and {encode!r} has none left. Leave it out.")
    _check_nesting(list(found.values()))
    return tuple(stages)


def _check_nesting(stages: Sequence[Stage]) -> None:
    """Layers that share tokens and layers that are stored together must nest."""
    found = {stage.kind: stage for stage in stages}
    transform, select = found.get("transform"), found.get("select")
    if isinstance(transform, Transform) and isinstance(select, Select) and select.layers and transform.layers:
        few, many = sorted((transform.layers, select.layers))
        if many % few:
            raise StageError(
                f"{transform!r} and {select!r}: {transform.layers} and {select.layers} layers do not nest. "
                f"Use layers= a divisor or multiple of {transform.layers} in {type(select).__name__}."
            )
