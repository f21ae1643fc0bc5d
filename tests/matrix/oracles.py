"""What a stack must be equal to: a dense cache of the same model that is told what the stack held.

A run with a stack is recorded: every forward, and what each layer held when it began. Then the same forwards run on a
`DynamicCache` in which the held tokens have the stack's decoded keys and values, and all other tokens are hidden from
attention, for each layer, row and kv head, by a mask. Where the logits are equal, attention saw what the stack says it
holds, at the right positions, under the model's own mask. How far that is from what was fed is the stage's own loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvstack import KV, KVStack
from kvstack.model.attention import attention_modules

__all__ = ["Held", "NotChecked", "Recorded", "Told", "difference", "loss", "record", "replay"]


class NotChecked(Exception):
    """The dense model cannot be told what to see."""


@dataclass
class Held:
    """What one layer held for one row.

    Attributes:
        columns: of the batch, padding counted: (H or 1, held), ascending.
        kv: decoded, (1, H, held, D); None where nothing is held.
    """

    columns: Tensor
    kv: KV | None


@dataclass
class Forward:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: Tensor  # (B, columns fed before) bool: no padding
    held: dict[int, list[Held]] = field(default_factory=dict)
    logits: Tensor | None = None
    attended: int = 0  # attention modules that ended


@dataclass
class Change:
    """A call that moves rows or takes tokens back."""

    name: str
    args: tuple[Any, ...]


@dataclass
class Recorded:
    """A run: its forwards and what happened between them."""

    events: list[Forward | Change] = field(default_factory=list)
    replaced: str = ""
    """The class of a cache that took ours' place."""

    @property
    def forwards(self) -> list[Forward]:
        return [event for event in self.events if isinstance(event, Forward)]


# ---- recording


def record(model: Any, cache: Any, run: Callable[[Any, Any], None], recorded: Recorded) -> None:
    """Call `run(model, cache)` and fill `recorded`, which can be read when that raises."""
    with ExitStack() as hooks:
        for handle in _listen(model, cache, recorded):
            hooks.callback(handle.remove)
        for name in ("activate_past_recording", "reorder_cache", "crop"):
            hooks.enter_context(_noted(cache, name, recorded))
        run(model, cache)


def _listen(model: Any, cache: Any, recorded: Recorded) -> Iterator[Any]:
    def ours(args: Any, kwargs: Any) -> bool:
        return any(given is cache for given in [*args, *kwargs.values()])

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if ours(args, kwargs):
            # a model may take things out of a dict that it is given
            given = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
            recorded.events.append(Forward(args, given, _real(recorded)))
        elif recorded.forwards and recorded.forwards[-1].logits is not None:
            # not one that fits a stage to the model while the first forward waits
            recorded.replaced = type(kwargs.get("past_key_values")).__name__

    def attend(module: nn.Module, args: Any, kwargs: Any) -> None:
        if isinstance(cache, KVStack) and ours(args, kwargs) and cache.seen:
            forward = recorded.forwards[-1]
            if not forward.attended and not forward.held:
                forward.held = snapshot(cache, forward.real)

    def attended(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if ours(args, kwargs):
            recorded.forwards[-1].attended += 1

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if ours(args, kwargs):
            recorded.forwards[-1].logits = output.logits.detach().clone()

    yield model.register_forward_pre_hook(begin, with_kwargs=True)
    yield model.register_forward_hook(end, with_kwargs=True)
    for module in attention_modules(model).values():
        yield module.register_forward_pre_hook(attend, with_kwargs=True)
        yield module.register_forward_hook(attended, with_kwargs=True)


@contextmanager
def _noted(cache: Any, name: str, recorded: Recorded) -> Iterator[None]:
    method = getattr(cache, name)

    def noted(*args: Any) -> Any:
        recorded.events.append(Change(name, args))
        return method(*args)

    setattr(cache, name, noted)
    try:
        yield
    finally:
        delattr(cache, name)


def new_real(forward: Forward) -> Tensor:
    """Which tokens a forward brought are not padding: (B, new) bool."""
    ids = forward.kwargs["input_ids"]
    mask = forward.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.ones(ids.shape, dtype=torch.bool)
    return mask[:, -ids.shape[1] :].bool()


def _real(recorded: Recorded) -> Tensor:
    """Which columns fed so far are not padding."""
    real: Tensor | None = None
    for event in recorded.events:
        if isinstance(event, Forward):
            new = new_real(event)
            real = new if real is None else torch.cat([real, new], dim=1)
        elif real is not None and event.name == "crop":
            real = real[:, : real.shape[1] + event.args[0]]
        elif real is not None and event.name == "reorder_cache":
            real = real[event.args[0]]
    return torch.ones(0, 0, dtype=torch.bool) if real is None else real


def snapshot(stack: KVStack, real: Tensor) -> dict[int, list[Held]]:
    """What each compressed layer holds for each row."""

    def held(layer: int, row: int) -> Held:
        if not bool(real[row].any()):
            return Held(torch.zeros(1, 0, dtype=torch.long), None)
        columns = columns_of(stack.positions(layer, row).long(), real[row])
        return Held(columns, stack.read(layer, row) if columns.numel() else None)

    return {layer: [held(layer, row) for row in range(stack.batch_size)] for layer in stack.compressed_layers}


def columns_of(positions: Tensor, real: Tensor) -> Tensor:
    """Columns of a row's positions: the same where the newest token has the newest position, otherwise those of real
    tokens alone were counted."""
    if bool(real.all()) or (positions.numel() and int(positions.max()) + 1 == len(real)):
        return positions
    columns = real.nonzero().flatten()
    assert positions.numel() == 0 or int(positions.max()) < len(columns), "positions beyond the tokens that were fed"
    return columns[positions]


# ---- replaying


class Told(DynamicCache):
    """A dense cache whose `update` returns, for the tokens that a stack holds, what the stack holds."""

    held: Mapping[int, list[Held]] = {}
    real: Tensor
    new = 0
    """Tokens of the running forward."""
    shares: Mapping[int, int] = {}
    """Layer -> the layer whose keys and values it reads."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.shares:
            source = self.layers[self.shares[layer_idx]]
            keys, values = source.keys, source.values
        if layer_idx in self.held:
            keys, values = keys.clone(), values.clone()
            for row, held in enumerate(self.held[layer_idx]):
                if held.kv is None:
                    continue
                for into, x in ((keys, held.kv.keys), (values, held.kv.values)):
                    index = held.columns.expand(into.shape[1], -1)[..., None].expand(-1, -1, into.shape[3])
                    into[row].scatter_(1, index, x[0].to(into.dtype))
        return keys, values

    def hidden(self, layer: int) -> Tensor | None:
        """Columns of real tokens that attention must not see, (B, H or 1, columns before), or None where there are
        none."""
        if layer not in self.held:
            return None
        heads = max(len(held.columns) for held in self.held[layer])
        hidden = self.real[:, None].repeat(1, heads, 1)
        for row, held in enumerate(self.held[layer]):
            hidden[row].scatter_(1, held.columns.expand(heads, -1), False)
        return hidden if bool(hidden.any()) else None


def replay(model: Any, recorded: Recorded, cache: DynamicCache) -> list[Tensor]:
    """The logits of the recorded forwards on another cache."""
    logits = []
    with ExitStack() as hooks:
        modules = attention_modules(model) if isinstance(cache, Told) else {}
        for layer, module in modules.items():
            hook = _hiding(cache, _read_by(layer, modules), module, model.config.get_text_config(decoder=True))
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for event in recorded.events:
            if isinstance(event, Change):
                getattr(cache, event.name)(*event.args)
                continue
            if isinstance(cache, Told):
                cache.held, cache.real, cache.new = event.held, event.real, new_real(event).shape[1]
            given = {name: dict(value) if isinstance(value, dict) else value for name, value in event.kwargs.items()}
            logits.append(model(*event.args, **(given | {"past_key_values": cache})).logits)
    return logits


def _read_by(layer: int, modules: Mapping[int, nn.Module]) -> int:
    """The layer whose keys and values a layer reads: in Gemma 3n and 4, maybe the last of its type that makes some."""
    if not getattr(modules[layer], "is_kv_shared_layer", False):
        return layer
    kind = modules[layer].layer_type
    return max(i for i, m in modules.items() if m.layer_type == kind and not m.is_kv_shared_layer)


def _hiding(cache: Told, layer: int, module: nn.Module, config: Any) -> Any:
    signature = inspect.signature(module.forward)

    def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = cache.hidden(layer)
        if hidden is None:
            return None
        if "attention_mask" not in signature.parameters:
            raise NotChecked(f"{type(module).__name__} takes no attention_mask")
        given = signature.bind(*args, **kwargs)
        states = next(x for x in [*args, *kwargs.values()] if isinstance(x, Tensor))
        mask = given.arguments.get("attention_mask")
        queries, heads = states.shape[1], config.num_attention_heads  # the last layers may be asked for fewer
        hidden = hidden.repeat_interleave(heads // hidden.shape[1] if hidden.shape[1] > 1 else 1, 1)
        hidden = torch.cat([hidden, hidden.new_zeros(*hidden.shape[:2], cache.new)], dim=2)[:, :, None]
        given.arguments["attention_mask"] = _with_hidden(mask, hidden, queries, config._attn_implementation)
        return given.args, given.kwargs

    return hide


def _with_hidden(mask: Tensor | None, hidden: Tensor, queries: int, implementation: str) -> Tensor:
    """`mask` (B or 1, heads or 1, queries, columns), where `hidden` (B, heads or 1, 1, columns) is hidden too."""
    if mask is None:
        if implementation != "sdpa":
            raise NotChecked(f"{implementation} attention was given no mask")
        columns = hidden.shape[-1]
        mask = torch.ones(queries, columns, dtype=torch.bool).tril(columns - queries)[None, None]
    if mask.dtype != torch.bool:
        return torch.where(hidden, torch.finfo(mask.dtype).min, mask)
    # in a mask of bools, True is what sdpa sees, and what eager attention hides
    return mask & ~hidden if implementation == "sdpa" else mask | hidden


# ---- comparing


def difference(recorded: Recorded, expected: list[Tensor]) -> float:
    """Most that the log-probabilities of any token that is no padding differ, of all forwards; infinite where a number
    is not finite."""
    most = 0.0
    for forward, logits in zip(recorded.forwards, expected, strict=True):
        assert forward.logits is not None
        real = new_real(forward)[:, -logits.shape[1] :]
        found = forward.logits[real].log_softmax(-1)
        gap = (found - logits[real].log_softmax(-1)).abs()
        most = max(most, float(torch.nan_to_num(gap, nan=torch.inf).max()) if gap.numel() else 0.0)
    return most


def loss(stack: KVStack, recorded: Recorded, fed: DynamicCache) -> float:
    """How far what the stack holds is from what it was fed, as a share of its norm: of the worst layer."""
    worst = 0.0
    for layer, rows in snapshot(stack, _real(recorded)).items():
        if stack.binding is not None and layer in stack.binding.shares:
            continue
        for row, held in enumerate(rows):
            if held.kv is None:
                continue
            for x, dense in ((held.kv.keys, fed.layers[layer].keys), (held.kv.values, fed.layers[layer].values)):
                index = held.columns.expand(dense.shape[1], -1)[..., None].expand(-1, -1, dense.shape[3])
                true = dense[row].gather(1, index)
                worst = max(worst, float((x[0] - true).norm() / true.norm().clamp_min(1e-6)))
    return worst
