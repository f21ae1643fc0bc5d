"""The one file that knows transformers' `Cache`: `KVStack` is that cache, and a pipeline of stages behind it.

what                                     who
stages fitted to the model               binding.py    settled once, frozen
rows, and what is held for them          batch.py      cohorts of stores (store/)
what attention gets                      attend.py     called by hooks on the model (model/hooks.py)
what a single layer tells                stack_layer.py
bytes                                    accounting.py
files                                    disk.py
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from . import accounting, disk
from .attend import Attention, Learned
from .batch import Batch
from .binding import Binding, bind, check_stages, is_fitted, needs_model, unbound, usual_window
from .devices import usable
from .errors import BindError, KVStackError, StageError, UseError
from .model.adapters import in_words, unwrapped
from .model.arming import arm
from .model.as_python import as_python
from .model.attention import checkpoints
from .model.head import with_head
from .model.hooks import install, running
from .model.ranks import heads_of
from .numbering import places_of
from .other_layers import forked_layer
from .packed import storage_bytes
from .report import Report
from .rereading import read_again, text_of
from .spec import parse, to_dict, to_spec
from .stack_layer import StackLayer
from .store.plan import Spans
from .store.tracks import putting_back
from .types import KV
from .workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .stage import Stage

__all__ = ["KVStack", "nbytes_of"]


AS_SAVED = "as saved"
"""No device has this name."""


class NoLength(UseError, AttributeError):
    """A `UseError` that `hasattr` takes for a missing attribute, as it is missing on a DynamicCache."""


class KVStack(Cache):
    """A KV cache that is a pipeline: stages of several kinds compress what a model caches.

    Args:
        stages: at most one stage of each kind, in any order (the kind gives the place): one that lets layers read
            each other's cache, one that selects tokens (`Evict`), one that transforms groups of layers (`CommonKV`),
            and one that encodes numbers (`Quant`). None at all is a plain cache.
        model: bind to this model at once. Without it the stack binds itself to the model in whose forward it
            first appears.
        sinks: first tokens of a text that always stay as they are (default 4).
        window: newest tokens that always stay as they are. None (the default): 16 where a transform that asks for few
            (`CommonKV`) stores tokens and none are evicted, 64 otherwise. The attribute is the number.
        block: while decoding, tokens are compressed this many at a time (default 32; at least what the encoder
            packs together).
        device: where compressed tokens are stored, such as `"cpu"` for a model on a GPU. When a layer is read, they are
            copied to the layer's device, and the copy is dropped when its group of layers is done. None (the default):
            where the layers are. Sinks, window and tokens not yet compressed always stay with the model.
        fused: let attention read packed codes for a single query (default True). False always hands it decoded
            tensors. The two agree up to rounding, unless a transform lets keys have rough scores: `CommonKV` with more
            than `exact` compressed tokens does.

    Attributes:
        binding: what was settled for the model; None before the stack is bound.
        batch: the rows, and what is held for them.

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
        *more: Any,
        model: PreTrainedModel | None = None,
        sinks: int = 4,
        window: int | None = None,
        block: int = 32,
        device: str | torch.device | None = None,
        fused: bool = True,
    ) -> None:
        if more:
            raise StageError(f"KVStack: stages is one list. Use KVStack([{', '.join(map(repr, (stages, *more)))}]).")
        super().__init__(layers=[])
        self.layers: list[Any]
        self.stages = check_stages(stages)
        window = usual_window(self.stages) if window is None else window
        for name, value, least in (("sinks", sinks, 0), ("window", window, 0), ("block", block, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise StageError(f"KVStack({name}={value!r}): {name} is a number of tokens, {least} or more.")
        self.sinks, self.window, self.block, self._fused = sinks, window, block, fused
        self.device = _device(device)
        self.binding: Binding | None = None
        self._unhook: Callable[[], Any] | None = None
        self._work = Workspace()
        self._learned = Learned()
        self._serve(Batch(self._unbound(0), self._work))
        self._in_binding = False
        self._disarm = arm(self) if model is None else None
        if model is not None:
            self.bind(model)

    def _serve(self, batch: Batch) -> None:
        """Hold `batch` from now on."""
        self.batch = batch
        # a stack without stages holds padding as DynamicCache does, so that the two are equal bit for bit
        self.attention_listener = Attention(
            repr(self), self.binding, batch, fused=self.fused, splits=bool(self.stages), learned=self._learned
        )

    @property
    def fused(self) -> bool:
        """True if attention may read packed codes; it can be switched at any time."""
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = self.attention_listener.fused = fused

    @property
    def _spans(self) -> Spans:
        return Spans(self.sinks, self.window, self.block, self.device)

    @property
    def _settings(self) -> dict[str, Any]:
        """The stack's own settings as plain data."""
        return {**self._spans._asdict(), "device": _name(self.device), "fused": self.fused}

    # ---- what it is

    def __repr__(self) -> str:
        settings = (f", {name}={value!r}" for name, value in self._changed.items())
        return f"KVStack({list(self.stages)!r}{''.join(settings)})"

    @property
    def _changed(self) -> dict[str, Any]:
        """The stack's own settings that are not the default."""
        signature = inspect.signature(KVStack.__init__).parameters
        defaults = {name: signature[name].default for name in self._settings} | {"window": usual_window(self.stages)}
        return {name: value for name, value in self._settings.items() if value != defaults[name]}

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
        """The string that `from_spec` builds this stack from: `"quant:bits=2+evict:keep=0.2@window=16"`."""
        return to_spec(self.stages, self._changed)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, for JSON."""
        stages = [to_dict(stage) for stage in self.stages]
        return {"stages": stages, **self._settings}

    # ---- binding

    def bind(self, model: PreTrainedModel) -> Self:
        """Fit the stages to `model` and put the hooks on it. Done by itself at the first forward."""
        if self.binding is not None and self.binding.serves(model):
            return self
        if self.binding is not None:
            raise BindError(
                f"{self!r} is bound to a {self.binding.name}; make a new stack for this {type(model).__name__}."
            )
        return self._adopt(bind(repr(self), self.stages, model, self._spans))

    def bind_met(self, model: PreTrainedModel) -> Self:
        """Bind to the outermost model that ran with this stack. What is fitted asks for predictions, so where only an
        inner model ran (`model.model(...)`, to save the logits), it is fitted to the causal model that holds that."""
        whole = with_head(unwrapped(model)) if is_fitted(self.stages) else None
        bound = self.bind(model if whole is None else whole)
        self._in_binding = True  # until the forward that runs now has ended
        return bound

    def _adopt(self, binding: Binding) -> Self:
        assert binding.model is not None
        recording = self.batch.recording  # assisted decoding says so before the first forward
        resting = {layer: binding.modules[layer] for layer in binding.shares}
        rotary = [rope.call.module for rope in binding.rotary if rope.call is not None]
        try:
            self._unhook = install(self, binding.model, resting, rotary, binding.plan.rereads)
            self.binding = binding
            self.begin_again()
        except BaseException:  # as if it had never met the model
            self.unbind()
            self.binding, self.layers = None, []
            self._serve(Batch(self._unbound(0), self._work))
            if recording:
                self.batch.record()
            raise
        if self._disarm is not None:
            self._disarm()
            self._disarm = None
        return self

    def check_given(self, given: Mapping[str, Any]) -> None:
        """A forward with this cache is about to begin, which was `given` these arguments.

        Raises:
            UseError: it says use_cache=False. generate then feeds the whole text at every step, and a cache that
                is there all the same takes it for new tokens.
        """
        if given.get("use_cache") is False:
            raise UseError(
                f"{self!r} was given together with use_cache=False, with which generate feeds the whole text again at "
                "every step. Pass use_cache=True (generate also looks at model.generation_config.use_cache), or leave "
                "out past_key_values."
            )

    def begin_forward(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The model begins a forward with this cache (its watched forward says so), which was `given` these arguments.
        Returns those that take the place of given ones. With other adapters than before, the stages are fitted again;
        where tokens are held, they would mean something else: it is refused."""
        self.check_given(given)
        if not self.batch.reading:
            self._check_complete()
            self._check_kept()
            self._check_forward()
            if self.batch.binding.plan.rereads:
                if not self.batch.running:
                    self._read_again()
                self.batch.text = text_of(given)
            ids = given.get("input_ids")
            self.batch.fed = ids if isinstance(ids, Tensor) else None
        if self.binding is None or not self.binding.plan.renumbers:
            return {}
        if not self.batch.running:
            self._catch_up()  # what goes now frees places
        places = places_of(repr(self), self.batch, given)
        return {} if places is None else {"position_ids": places}

    def _check_kept(self) -> None:
        """Refuse a model that leaves its cache out."""
        binding = self.binding
        if binding is None or not any(checkpoints(layer) for layer in binding.checkpointing):
            return
        new = hasattr(binding.model, "activation_checkpointing_disable")  # transformers has given it another name
        off = "activation_checkpointing_disable" if new else "gradient_checkpointing_disable"
        raise UseError(
            f"gradient checkpointing is on in this {binding.name}, which is in training mode: transformers leaves "
            f"out the cache, so {self!r} would hold no token, and the next forward would not know this text. Call "
            f"model.eval() or model.{off}()."
        )

    def _check_forward(self) -> None:
        binding = self.binding
        if binding is None or binding.model is None or binding.watch is None:
            return
        if self.batch.size is not None:
            self._check_adapters("continued")
        elif binding.watch.state() != binding.adapters:
            again = bind(repr(self), self.stages, binding.model, self._spans)
            self.unbind()
            self._adopt(again)

    @property
    def writes(self) -> int:
        """The number of times that forwards have changed a layer."""
        return self.batch.writes

    def stop_forward(self, writes: int) -> None:
        """A forward was stopped by an error or an interrupt; at its beginning there were so many `writes`. It may
        have fed some layers and not others, or all of them, and its caller will feed its tokens again."""
        if self.batch.writes != writes:
            self.batch.stopped = "the last forward"

    def end_binding(self) -> None:
        """The forward in which this was bound has ended."""
        self._in_binding = False

    def _check_complete(self) -> None:
        """Refuse to go on from a forward, or a change of all layers, that did not end."""
        if self._in_binding and self.batch.writes:  # no guard stood before the model yet
            self.batch.stopped = "the last forward"
        self.batch.check_complete()

    def end_forward(self, given: Mapping[str, Any]) -> None:
        """The model has ended a forward with this cache, which was `given` these arguments."""
        batch = self.batch
        if batch.reading or not batch.unread:
            return
        batch.text = batch.text or text_of(given)
        if batch.waits:
            self._read_again()

    def _read_again(self) -> None:
        """Read the last forward of several tokens a second time, and compress it, where the score wants that."""
        if self.batch.unread and not self.batch.reading:
            read_again(self, self.batch, self._learned.scaling)

    def check_text(self, text: Tensor) -> None:
        """A generation begins, of a whole `text`: ids (rows, n), or embeddings (rows, n, size). Its tokens behind those
        that were read will be fed.

        Raises:
            UseError: there are none, or the text does not begin with the tokens that were read.
        """
        self.batch.check_complete()  # before anything is said of a text that is half read
        seen = self.get_seq_length()
        if not seen:
            return
        self._check_adapters("continued")
        other = "For another text, use a new stack for each call, or call reset() first."
        if text.shape[1] <= seen:
            raise UseError(
                f"{self!r} has read {seen} tokens, and generate was given a text of {text.shape[1]}, so no new token "
                f"is left. {other} To continue this text, pass all ids (the {seen} that were read, then the new "
                "ones), or only the new ids with an attention_mask over all tokens."
            )
        if text.dim() == 2 and not self.batch.ids.begins(text):
            raise UseError(
                f"{self!r} has read {seen} tokens, and generate was given a text of {text.shape[1]} that does not "
                f"begin with them. {other} To ask several questions about one text, use fork() for each. To continue "
                "this text, pass the same ids, then the new ones, or only the new ids with an attention_mask over all "
                "tokens."
            )

    def _check_adapters(self, done: str) -> None:
        """Raise `UseError` where other adapters are at work than the tokens held were computed with."""
        if self.binding is None or self.binding.watch is None or self.batch.size is None:
            return
        then, now = self.binding.adapters, self.binding.watch.state()
        if then != now:
            was, is_now = in_words(then), in_words(now)
            how = f"{is_now} is active now" if is_now != was else "that has another factor or other layers now"
            raise UseError(
                f"{self!r} holds tokens that {self.binding.name} computed with {was}, and {how}, so it cannot "
                f"be {done}. Switch back, or use reset() or another stack."
            )

    def unbind(self) -> None:
        """Take the hooks off the model. The stack keeps its tokens, but can no longer be used in a forward."""
        if self._unhook is not None:
            self._unhook()
            self._unhook = None

    def _unbound(self, layers: int) -> Binding:
        return unbound(self.stages, layers, self._spans)

    def _new_layers(self, binding: Binding) -> list[Any]:
        kinds = zip(binding.layer_types, binding.layer_arguments, strict=True)
        return [
            # a hybrid layer holds its state itself, and its keys and values are ours
            StackLayer(self, layer) if binding.is_ours_alone(layer) else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for layer, (kind, arguments) in enumerate(kinds)
        ]

    @property
    def _others(self) -> list[Any]:
        """The layers that hold something that is not ours to compress, as transformers made them."""
        return [layer for layer in self.layers if not isinstance(layer, StackLayer)]

    # ---- lengths

    @as_python
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens the model has fed through a layer, padding included; not how many are held."""
        if layer_idx == 0:  # layers that count no tokens are passed over, as in DynamicCache
            layer_idx = next((i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)), 0)
        if layer_idx in self.batch.columns:
            return self.batch.columns[layer_idx]
        return cast(int, super().get_seq_length(layer_idx))

    @as_python
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(tokens that the model has seen, the new ones included, 0), as for a DynamicCache: the stack takes what it
        holds out of the mask that the model makes for these."""
        if layer_idx not in self.batch.columns:
            return super().get_mask_sizes(query_length, layer_idx) if self.layers else (query_length, 0)
        if not self.batch.running:
            self._catch_up()  # the next forward begins
        return self.batch.columns[layer_idx] + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the text may be of any length. A sliding layer, when it is asked for, tells its window."""
        return -1 if layer_idx is None else cast(int, super().get_max_length(layer_idx))

    @property
    def max_cache_len(self) -> int:
        """Missing, as on a DynamicCache."""
        raise NoLength(
            "a KVStack has no longest length (max_cache_len). PEFT's prefix tuning asks for it in order to put a cache "
            "of its own in the place of an empty one, so the stack would not be used: use an adapter of another kind."
        )

    @property
    def is_initialized(self) -> bool:
        return self.batch.size is not None if self.batch.columns else cast(bool, super().is_initialized)

    @property
    def batch_size(self) -> int:
        return -1 if self.batch.size is None else self.batch.size

    @property
    def seen(self) -> int:
        """Tokens the model saw, padding included; 0 where no layer of it counts them."""
        if self.batch.columns:
            return self.batch.seen
        return max((layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)), default=0)

    @property
    def held(self) -> int:
        """Tokens held in each compressed layer (the most of any row; a mean, where layers or heads differ)."""
        return self.batch.held

    @property
    def compressed_layers(self) -> list[int]:
        """Indices of the layers this stack compresses: those with full attention. Empty before it is bound."""
        return sorted(self.batch.binding.places)

    def positions(self, layer_idx: int, row: int = 0, head: int | None = None) -> Tensor:
        """True positions of the tokens a layer holds for one row: (H or 1, held), ascending, padding not counted; of
        one kv `head` (1, held)."""
        return self.batch.positions(layer_idx, row, head)

    def read(self, layer_idx: int, row: int = 0, head: int | None = None) -> KV:
        """Tokens that a layer holds for one row, decoded: keys and values (1, H, held, D) in the order of `positions`;
        of one kv `head` (1, 1, held, D). With `Evict(positions="cache")`, keys are rotated to their places in the
        cache.

        Raises:
            UseError: heads hold different numbers of tokens (`Evict(budgets="heads")`), and none is named.
        """
        return self.batch.read(layer_idx, row, head)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and sliding window of every layer, as a DynamicCache gives them: `for keys, values, _ in cache`.
        Those of compressed layers are decoded, (B, H, held, D), and None before the first forward."""
        for layer in self.layers:
            kv = self.decoded(layer._layer) if isinstance(layer, StackLayer) else layer
            yield getattr(kv, "keys", None), getattr(kv, "values", None), getattr(layer, "_sliding_window_tensor", None)

    def decoded(self, layer_idx: int) -> KV | None:
        """Tokens that a compressed layer holds for all rows, decoded; None before the first forward.

        Raises:
            UseError: rows hold different tokens (padding), so no one tensor can.
        """
        if self.batch.size is None:
            return None
        self.batch.check_complete()
        rows = [self.read(layer_idx, row) for row in range(self.batch.size)]
        if len({kv.tokens for kv in rows}) > 1:
            raise UseError(
                f"rows of this cache hold {sorted({kv.tokens for kv in rows})} tokens, which no one tensor can. "
                f"Read them one by one: KVStack.read({layer_idx}, row)."
            )
        return KV(torch.cat([kv.keys for kv in rows]), torch.cat([kv.values for kv in rows]))

    # ---- a forward

    @as_python
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H, new, D); returns all that attention should see."""
        call = running()
        if self.binding is None:
            self._grow_unbound(layer_idx)
        elif layer_idx not in self.batch.columns:  # transformers caches it
            self.batch.writes += 1
            return cast(tuple[Tensor, Tensor], super().update(key_states, value_states, layer_idx, *args, **kwargs))
        elif call is None or call.listener is not self.attention_listener:
            raise UseError(
                f"{self!r} is bound to a {self.binding.name}, and something else called its update. A stack serves "
                "one model: make a new KVStack for another, and call the model, not its cache."
            )
        return self.attention_listener.update(key_states, value_states, layer_idx)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self.batch.writes += 1
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self.batch.writes += 1
        return super().update_recurrent_state(*args, **kwargs)

    def update_indexer(self, *args: Any, **kwargs: Any) -> Tensor:
        self.batch.writes += 1
        return super().update_indexer(*args, **kwargs)

    def _grow_unbound(self, layer_idx: int) -> None:
        """Serve a caller that is no transformers model: layers come as they are named, and are settled when the
        next forward begins."""
        if needs_model(self.stages):
            raise UseError(
                f"{self!r} does not know its model, which this stack needs. Pass model=: KVStack([...], model=model)."
            )
        if layer_idx >= len(self.layers):
            self.batch.grow(self._unbound(layer_idx + 1))
            self.layers = [*self.layers, *(StackLayer(self, i) for i in range(len(self.layers), layer_idx + 1))]

    @torch.no_grad()
    def _catch_up(self) -> None:
        self.batch.check_complete()
        self._read_again()
        self.batch.catch_up(self._learned.scaling)

    def activate_past_recording(self) -> None:
        """Assisted decoding begins: wait for `crop` before compressing, since tokens may be taken back."""
        if self.seen:
            raise UseError(
                "transformers feeds the whole text again when assisted decoding or prompt lookup starts on a cache "
                "that already holds tokens. Start with a new stack, or continue without assistance."
            )
        super().activate_past_recording()
        self.batch.record()

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: 0 or a negative number, as transformers has it. Where the text is cut back to
        before tokens that were evicted or sealed, what is held of it stays; heads that kept different tokens let go
        of their newest until all hold equally many."""
        self._check_complete()
        if tokens_to_remove > 0:
            raise UseError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove, or 0.")
        if -tokens_to_remove > self.seen and not self.stages:
            tokens_to_remove = -self.seen  # all there is, as a DynamicCache has it
        if -tokens_to_remove > self.seen:
            raise UseError(f"crop({tokens_to_remove}): the cache has seen {self.seen} tokens.")
        with self._all_or_nothing("a crop"):
            for other in self._others:
                other.crop(tokens_to_remove)
            self.batch.crop(-tokens_to_remove, self._learned.scaling)
        self.batch.stopped = "a crop"  # a second one would take more tokens back
        self.batch.cropped(self._learned.scaling)
        self._read_again()
        self.batch.stopped = None

    @contextmanager
    def _all_or_nothing(self, what: str) -> Iterator[None]:
        """Let all layers change, or none of them, those included that transformers caches."""
        each = [self.batch.undo(), *(putting_back(other) for other in self._others)]
        try:
            yield
        except BaseException:
            self.batch.stopped = what  # until all is as it was: an interrupt may come now, too
            for undo in each:
                undo()
            self.batch.stopped = None
            raise

    # ---- rows

    def reorder_cache(self, beam_idx: Any) -> None:
        """Rows in the order of `beam_idx` (B,), as beam search asks at every step."""
        self._select_rows(self._indices("reorder_cache", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if not isinstance(repeats, int) or repeats < 1:
            raise UseError(f"batch_repeat_interleave({repeats!r}): pass how often each row is repeated, 1 or more.")
        if self._rows:
            self.batch_select_indices(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Only the rows at `indices`: a tensor, list or tuple of rows (negative ones count from the end), a boolean
        mask of all rows, or a slice."""
        self._select_rows(self._indices("batch_select_indices", indices))

    @property
    def _rows(self) -> int:
        """Rows of the batch; 0 before the first forward."""
        if self.batch.size is not None:
            return self.batch.size
        held = (x for other in self._others for x in accounting.tensors_in(vars(other)) if x.dim() > 2)
        return next((x.shape[0] for x in held), 0)

    def _indices(self, method: str, given: Any) -> Tensor:
        """`given` as rows (n,) of this cache, 0 and up; as it is where the cache has no rows yet."""
        size = self._rows or None
        if isinstance(given, slice):
            given = range(size or 0)[given]
        try:
            indices = torch.as_tensor(list(given) if isinstance(given, range) else given)
        except (TypeError, ValueError, RuntimeError):
            indices = torch.empty(0)
        mask = indices.dtype == torch.bool
        fits = indices.dim() == 1 and not indices.is_floating_point() and not indices.is_complex() and len(indices) > 0
        if not fits or (mask and size is not None and len(indices) != size):
            raise UseError(
                f"{method}({given!r}): pass the rows as a list or a tensor of one dimension, such as [0, 2], or a "
                f"boolean mask of all rows. This cache has {size or 0} rows."
            )
        indices = indices.nonzero().flatten() if mask else indices.long()
        if size is None:
            return indices
        if not len(indices) or int(indices.min()) < -size or int(indices.max()) >= size:
            raise UseError(
                f"{method}({given!r}): this cache has {size} rows, 0 to {size - 1}. Use reset() to drop all."
            )
        return torch.where(indices < 0, indices + size, indices)

    def _select_rows(self, indices: Tensor) -> None:
        self._check_complete()
        if self.batch.size is not None:
            self._catch_up()
        with self._all_or_nothing("a change of rows"):
            for other in self._others:
                other.reorder_cache(indices)  # the one way to choose rows that layers of every kind have
            self.batch.select(indices)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        raise UseError(
            "a KVStack cannot be offloaded layer by layer: it stores groups of layers, compressed, in place."
        )

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self.offload(layer_idx, only_non_sliding)

    def reset(self) -> None:
        """Forget everything, ready for another text; the stack stays bound."""
        if self.binding is not None:
            self.layers = self._new_layers(self.binding)
        self._work.clear()
        self._in_binding = False
        self._serve(Batch(self.binding or self._unbound(0), self._work))

    def begin_again(self) -> None:
        """Forget everything as `reset` does, where a running generation is about to read the whole text again."""
        recording = self.batch.recording  # assisted decoding says so once, before its first forward
        self.reset()
        if recording:
            self.activate_past_recording()

    def fork(self) -> KVStack:
        """A second stack that goes on from the same tokens: a branch. Each of the two may be used as any other stack,
        and neither sees what becomes of the other.

        Nothing is copied now. The first forward of a branch copies the raw tokens (sinks, window and those not yet
        compressed). Compressed tokens are shared until a branch compresses a block of its own or evicts: then it copies
        them. With `block=256`, for example, questions and answers of less than 256 tokens share all of them.
        `kvstack.nbytes_of([stack, branch])` counts what several stacks share once.

        Raises:
            UseError: a forward of this stack was stopped in the middle.

        Example:
            >>> from kvstack import KVStack, Quant
            >>> document = KVStack([Quant(4)], block=256)  # the model reads a long text with it
            >>> branches = [document.fork() for _ in range(3)]  # one for each question
        """
        return self._copied(KVStack(self.stages, **self._settings), self.batch.fork, forked_layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVStack:
        other = memo[id(self)] = KVStack(self.stages, **self._settings)
        return self._copied(other, self.batch.copy, lambda layer: copy.deepcopy(layer, memo))

    def _copied(self, other: KVStack, batch: Callable[[Workspace], Batch], layer_of: Callable[[Any], Any]) -> KVStack:
        """Let the new stack `other` hold copies of what this one does. `layer_of` copies a layer of transformers."""
        self._check_complete()
        other._learned = replace(self._learned, scaling=dict(self._learned.scaling), direct=set(self._learned.direct))
        if self.binding is not None:
            other._adopt(self.binding)
        other.layers = [
            StackLayer(other, i) if isinstance(layer, StackLayer) else layer_of(layer)
            for i, layer in enumerate(self.layers)
        ]
        other._serve(batch(other._work))
        return other

    def __copy__(self) -> KVStack:
        """As `copy.deepcopy`: two caches that share their tokens would disturb each other."""
        return copy.deepcopy(self)

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

        Where processes share the heads of a model, each of them writes a file of its own: the first of two writes
        `cache-0-of-2.safetensors` for `cache.safetensors`.

        A file that was there stays as it is until the new one is complete, keeps its permissions, and is replaced where
        `path` is a symbolic link to it.

        Raises:
            UseError: the stack is not bound yet. WriteError: the file cannot be written.
        """
        if self.binding is None:
            raise UseError(f"{self!r} is not bound to a model, so there is nothing to save. Pass model=.")
        self._check_adapters("saved")
        self._check_complete()
        self._catch_up()
        path = disk.own_file(path, self.binding.plan.heads)
        disk.write(path, self.to_dict(), self.batch, self._learned, self._others, compress)

    @classmethod
    @torch.no_grad()
    def load(
        cls, path: str | os.PathLike[str], *, model: PreTrainedModel, device: str | torch.device | None = AS_SAVED
    ) -> Self:
        """A stack that goes on where the one that was saved to `path` stopped.

        The model reads one token first: what it caches tells how large every tensor of the file must be. Tensors go
        where the layers of `model` are, wherever they were saved; compressed ones go to `device`.

        Args:
            path: the file.
            model: the one that the cache was saved with.
            device: the setting `device` of the stack, in place of the saved one (the default).

        Raises:
            UseError: no such file, damaged, saved with another model or calibration, or by a newer kvstack.
            StageError: no such device.
        """
        heads = heads_of(unwrapped(model))
        changed = {} if device == AS_SAVED else {"device": _name(_device(device))}
        saved = disk.load(disk.own_file(path, heads))
        saved.check_part(heads)
        saved.check(model)
        stack = saved.stack(lambda settings: cls.from_spec({**settings, **changed}, model=model))
        try:
            saved.fill(repr(stack), stack.batch, stack._learned, stack._others)
        except BaseException:
            stack.unbind()
            raise
        return stack

    # ---- bytes

    def parts(self) -> list[tuple[str, str, Tensor]]:
        """Every tensor held for the tokens, as (who pays for it, what it is, the tensor). Layers that transformers
        caches are among them, scratch memory is not."""
        return list(accounting.held(self.batch, self._others))

    def tensors(self) -> list[Tensor]:
        """The tensors of `parts`."""
        return [x for *_, x in self.parts()]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: their whole storages, reserve and scratch memory included."""
        return nbytes_of([self])

    @property
    def model_nbytes(self) -> int:
        """Bytes of what stages fitted to the model (axes of a calibration): held once for all caches of the model, so
        not part of `nbytes`."""
        return accounting.model_bytes(self.batch)

    @property
    def dense_nbytes(self) -> int:
        """Bytes a dense cache of the same seen tokens holds, in the model's own dtype."""
        return accounting.dense_bytes(self.batch, self._others)

    @property
    def compression(self) -> float:
        """Share of the dense bytes that is saved: 0.9 means a tenth is held."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

    def report(self) -> Report:
        """Bytes by stage and part; prints as a table, `to_dict()` for data."""
        parts = accounting.parts(self.batch, self._others, self._work)
        reads_with = list(self.binding.reads_with) if self.binding is not None and self.fused else []
        return Report(
            stack=repr(self),
            seen=self.seen,
            held=self.held,
            nbytes=self.nbytes,
            dense_nbytes=self.dense_nbytes,
            parts=parts,
            model_nbytes=self.model_nbytes,
            reads_with=reads_with,
            devices=accounting.devices(self.tensors() + self._work.tensors()),
            rows=max(1, self.batch_size),
        )


def nbytes_of(stacks: Iterable[KVStack]) -> int:
    """Bytes of all tensors that `stacks` hold, scratch memory included. Memory that several of them share counts once:
    `nbytes_of([stack, branch]) - stack.nbytes` is what a fork adds."""
    return storage_bytes([x for stack in stacks for x in (*stack.tensors(), *stack._work.tensors())])


def _device(given: object) -> torch.device | None:
    """The setting `device` of a stack, checked."""
    try:
        return None if given is None else usable(given)
    except KVStackError as error:
        raise StageError(f"KVStack(device={given!r}): {error} Use 'cpu', a GPU of this machine, or None.") from None


def _name(device: torch.device | None) -> str | None:
    return None if device is None else str(device)
