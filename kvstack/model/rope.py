"""Finding out how each layer of a model rotates its keys: by running it.

Some layers of a model rotate, others don't (SmolLM3, Llama 4); some rotate a part of each head; each modelling file has
a rotation of its own. So nothing is taken from names: one token is read at several positions. Its hidden states are the
same at all of them, as it attends to itself only, so its cached keys differ just by their rotation. A rotation that
brings them together is the right one.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import attention_modules, device_of, parameters
from .changes import Handles, changes
from .rest import at_rest
from .rotation import Form, Rope, RotaryCall, Tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Rope", "find_ropes", "rotary_modules", "tables_of"]

PLACES = (0, 1, 2, 5, 11, 29)
"""Positions that one token is read at."""
TOKENS = 3
"""Different tokens read at each."""
FAR = 1 << 20
"""A position beyond any table for short texts."""


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that make rotary tables of positions."""
    leaves = (module for module in model.modules() if next(module.children(), None) is None)
    return [module for module in leaves if "position_ids" in parameters(module)]


def tables_of(given: Mapping[str, Any]) -> Tables:
    """The rotary tables among the arguments of an attention module; empty where there are none."""
    tables = given.get("position_embeddings")
    if isinstance(tables, Tensor):
        return (tables,)
    fits = isinstance(tables, tuple | list) and all(isinstance(x, Tensor) for x in tables)
    return tuple(tables) if fits and tables else ()


_finding = threading.RLock()
_known: weakref.WeakKeyDictionary[Any, dict[int, Rope | None]] = weakref.WeakKeyDictionary()


def find_ropes(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> dict[int, Rope | None]:
    """The rotary embedding of every layer in `modules` (layer -> attention module); None where keys are not rotated.
    Layers that rotate alike share one. A rotation that cannot be undone has a `refusal`."""
    with _finding:
        if model not in _known:
            _known[model] = _find(model, attention_modules(model))
        known = _known[model]
    return {layer: known.get(layer) for layer in modules}


# ---- reading one token


@dataclass
class _Reading:
    """One token read at several positions.

    Attributes:
        cached: layer -> keys and values (rows, H, 1, D).
        calls: layer -> the call of a rotary module that made the layer's tables.
    """

    cached: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: dict[int, tuple[RotaryCall, Tensor]] = field(default_factory=dict)


def _find(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> dict[int, Rope | None]:
    if not modules:
        return {}
    reader = _reader(model, modules)
    if "position_ids" not in parameters(reader):
        # nothing tells such a model a position, so nothing can be tried: its file says whether it rotates at all
        return {layer: _blind(module) for layer, module in modules.items()}
    device = device_of(next(iter(modules.values())))
    places = torch.tensor(PLACES, device=device).repeat_interleave(TOKENS)[:, None]
    try:
        with at_rest(model):
            read = _read(reader, modules, None)
            if any(call.axes for call, _ in read.calls.values()):
                axes = max(call.axes for call, _ in read.calls.values())
                places = torch.stack([places * (axis + 1) + axis for axis in range(axes)])
            read = _read(reader, modules, places)
            return _judge(read, modules)
    except Exception as error:  # a model may want more than ids: whoever needs its rotation hears why it is not known
        reason = f"reading one token to see them failed ({type(error).__name__}: {error})"
        return dict.fromkeys(modules, Rope(None, None, refusal=reason))


def _blind(attention: nn.Module) -> Rope | None:
    names = vars(sys.modules[type(attention).__module__])
    if any("rotary" in name.lower() for name in names):
        return Rope(None, None, refusal="the model takes no position_ids, so kvstack cannot see how it rotates")
    return None


def _reader(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> PreTrainedModel:
    """The innermost model that all of `modules` are part of: of a model that sees images, the one that reads text."""
    from transformers import PreTrainedModel

    wanted, reader = set(map(id, modules.values())), model
    for inner in model.modules():  # from the outside in
        reads = isinstance(inner, PreTrainedModel) and "input_ids" in parameters(inner)
        if reads and wanted <= set(map(id, inner.modules())):
            reader = inner
    return reader


def _read(reader: PreTrainedModel, modules: Mapping[int, nn.Module], places: Tensor | None) -> _Reading:
    from transformers import DynamicCache

    made: list[tuple[RotaryCall, Tensor, Tables]] = []
    read = _Reading()

    def rotary(module: nn.Module, args: Any, *rest: Any) -> None:
        if threading.get_ident() != mine:  # somebody else uses the model meanwhile
            return
        kwargs, output = rest
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        tables = tables_of({"position_embeddings": output})
        if tables:
            first = next(iter(given))
            extra = {name: x for name, x in given.items() if name not in (first, "position_ids")}
            positions = given["position_ids"]
            axes = positions.shape[0] if positions.dim() == 3 else 0
            made.append((RotaryCall(module, extra, axes, tables[0].dtype), positions, tables))

    def attention(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if threading.get_ident() != mine:
            return
        tables = tables_of(dict(zip(parameters(module), args, strict=False)) | kwargs)
        for call, positions, output in made:
            if tables and tables[0] is output[0]:
                read.calls[numbers[id(module)]] = call, positions

    mine = threading.get_ident()
    numbers = {id(module): layer for layer, module in modules.items()}
    handles = Handles()

    def watch() -> None:
        for module in rotary_modules(reader):
            handles.after_with_keywords(module, rotary)
        for module in modules.values():
            handles.before_with_keywords(module, attention)

    changes.make(watch)
    cache = DynamicCache(config=reader.config)
    rows = TOKENS * len(PLACES)
    device = device_of(next(iter(modules.values())))
    ids = torch.arange(3, 3 + TOKENS, device=device).remainder(reader.config.get_text_config().vocab_size)
    position = {} if places is None else {"position_ids": places}
    try:
        reader(input_ids=ids.repeat(rows // TOKENS)[:, None], past_key_values=cache, use_cache=True, **position)
    finally:
        changes.make(handles.remove)
    layers: Any = cache.layers
    for layer in modules:
        keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
        if isinstance(keys, Tensor):
            read.cached[layer] = keys, layers[layer].values
    return read


# ---- what the keys say


def _judge(read: _Reading, modules: Mapping[int, nn.Module]) -> dict[int, Rope | None]:
    ropes: dict[int, Rope | None] = {}
    alike: dict[Any, Rope] = {}
    for layer, module in modules.items():
        ropes[layer] = None
        if layer not in read.cached:  # reads another layer's
            continue
        keys, values = read.cached[layer]
        loose = _tolerance(keys)
        if layer in read.calls:
            call, positions = read.calls[layer]
            form, apart = _best_form(keys, call, positions, module)
            if form is None and apart > loose:
                ropes[layer] = Rope(
                    None,
                    None,
                    refusal="what it caches is no rotation that kvstack knows: some models norm keys after it",
                )
            elif form is not None:
                # the same module, called alike, with the same function
                key = (id(call.module), tuple(call.extra.items()), form)
                if key not in alike:
                    alike[key] = _rope(call, form)
                ropes[layer] = alike[key]
        elif _apart(keys) > loose and _apart(values) <= loose:  # positions in the hidden states move values too
            ropes[layer] = Rope(None, None, refusal="no rotary tables are handed to it, so it makes its own")
    return ropes


def _best_form(keys: Tensor, call: RotaryCall, positions: Tensor, module: nn.Module) -> tuple[Form | None, float]:
    """The rotation that brings the keys of one token together best, and how far apart they still are; None where
    they are together best as they are."""
    places = positions.permute(1, 0, 2) if call.axes else positions[:, None]
    best: Form | None = None
    least = _apart(keys)
    for form in _forms(module):
        try:
            rope = Rope(call, form)
            plain = rope.unrotate(keys, places.unsqueeze(2))
            turned = rope.rotate(plain, places.unsqueeze(2))
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue  # the function takes another part of the head
        if plain.shape != keys.shape or not _same(turned, keys):
            continue
        apart = _apart(plain)
        if apart < least / 2 and apart <= _tolerance(keys):
            best, least = form, apart
    return best, least


def _forms(attention: nn.Module) -> Iterator[Form]:
    """All ways in which the modelling file of `attention` may rotate, the likeliest first."""
    names = vars(sys.modules[type(attention).__module__])
    for name in ("apply_rotary_pos_emb", "apply_rotary_emb", "apply_multimodal_rotary_pos_emb"):
        apply = names.get(name)
        if apply is None:
            continue
        arguments = list(inspect.signature(apply).parameters)
        takes: Any = "pair" if "cos" in arguments[2:3] else "single" if "cos" in arguments[1:2] else "complex"
        for part in ("whole", "first", "last"):
            yield Form(apply, takes, part)


def _apart(x: Tensor) -> float:
    """Return the largest difference of `x` (rows, H, 1, D), one token, between positions: a share of its size."""
    x = x.double().unflatten(0, (len(PLACES), TOKENS))
    size = float(x.norm())
    return float((x - x.mean(0)).norm()) / size if size else 0.0


def _same(x: Tensor, y: Tensor) -> bool:
    return float((x.double() - y.double()).norm()) <= _tolerance(y) * float(y.double().norm())


def _tolerance(x: Tensor) -> float:
    # attention sinks and experts make a little of rounding more
    return max(1e-3, 16 * torch.finfo(x.dtype).eps)


# ---- tables that depend on the length of the text


def _rope(call: RotaryCall, form: Form) -> Rope:
    """The rotation, with what is to be done about tables that change with the text."""
    kind = _rope_type(call)
    near = _first(call, PLACES[-1])
    if _equal(near, _first(call, FAR)):
        return Rope(call, form)
    switch = _original_length(call)
    if kind == "longrope" and switch and switch > PLACES[-1]:
        long = _first(call, switch)
        if _equal(near, _first(call, switch - 1)) and _equal(long, _first(call, FAR)):
            return Rope(call, form, switch)
    how = f" (rope type {kind!r})" if kind else ""
    return Rope(None, None, refusal=f"the angle of a position changes with the length of the text{how}")


def _first(call: RotaryCall, last: int) -> Tables:
    """Tables of the first few positions, in a forward that reaches `last`."""
    twin = copy.deepcopy(call.module)
    positions = torch.tensor([0, 1, 2, 3, last])[None].to(next((x.device for x in twin.buffers()), "cpu"))
    if call.axes:
        positions = positions.expand(call.axes, 1, -1)
    like = torch.empty(0, dtype=call.dtype, device=positions.device)
    made = type(twin).forward(twin, like, position_ids=positions, **call.extra)
    return tuple(x[:, :4] for x in tables_of({"position_embeddings": made}))


def _equal(one: Tables, other: Tables) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def _settings(call: RotaryCall) -> Mapping[str, Any]:
    """The rope parameters of the configuration that this call goes by."""
    settings = getattr(getattr(call.module, "config", None), "rope_parameters", None) or {}
    kind = call.extra.get("layer_type")
    return settings[kind] if kind in settings and isinstance(settings[kind], Mapping) else settings


def _rope_type(call: RotaryCall) -> str:
    return str(_settings(call).get("rope_type", ""))


def _original_length(call: RotaryCall) -> int | None:
    return _settings(call).get("original_max_position_embeddings")
