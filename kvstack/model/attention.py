"""Finding a model's attention modules, and what they can do."""

from __future__ import annotations

import inspect
import itertools
import re
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CACHE_ARGUMENTS",
    "adds_to_softmax",
    "attention_modules",
    "checkpointing",
    "checkpoints",
    "counts_tokens",
    "cross_attention_layers",
    "decoder_of",
    "device_of",
    "expands",
    "gives_queries",
    "implementation",
    "interface",
    "layer_of",
    "offload_hooks",
    "parameters",
    "reuses",
    "takes_cache",
    "tensors_of",
]

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
CROSS = re.compile(r"(cross_?att|encoder_att|encoder_decoder_att|encdec_?att)", re.IGNORECASE)
"""Names, of modules and of their classes, that attend to something else than the text: images, an encoder's output."""


def parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of a module's forward, known once for each class: a model has hundreds of modules, and is searched often."""
    if "forward" in vars(module):  # of this module alone: accelerate and plans of transformers put one around it
        own = inspect.signature(module.forward).parameters
        if any(known.kind not in _ANYTHING for known in own.values()):
            return own
    forward = type(module).forward
    known = _known.get(type(module))
    if known is None or known[0] is not forward:  # someone has put another one into the class
        known = _known[type(module)] = forward, inspect.signature(partial(forward, module)).parameters
    return known[1]


_ANYTHING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_known: weakref.WeakKeyDictionary[type[nn.Module], tuple[Any, Mapping[str, inspect.Parameter]]] = (
    weakref.WeakKeyDictionary()
)


def takes_cache(module: nn.Module) -> bool:
    return any(name in parameters(module) for name in CACHE_ARGUMENTS)


def layer_of(module: nn.Module) -> int | None:
    """The index of the layer that a module says it belongs to."""
    for name in ("layer_idx", "layer_id"):
        layer = getattr(module, name, None)
        if isinstance(layer, int) and layer >= 0:
            return layer
    return None


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer index -> the module of that layer that attends to the text and updates the cache.

    Left out are layers that attend to something else than the text, and those that no module has to itself: one that
    is run several times in a forward, with another layer's cache each time, cannot be told by its index.
    """
    by_layer: dict[int, nn.Module] = {}
    for layer, found in _updating(model).items():
        own = [module for name, module in found if not _attends_elsewhere(name, module)]
        if len(own) > 1:  # a model may hold several decoders: the text's is meant
            config = _text_config(model)
            own = [module for module in own if config is not None and getattr(module, "config", None) is config]
        if len(own) == 1 and "layer_idx" not in parameters(own[0]):
            by_layer[layer] = own[0]
    return by_layer


def cross_attention_layers(model: nn.Module) -> set[int]:
    """Layers that cache nothing of the text, but something else that they attend to."""
    return {
        layer
        for layer, found in _updating(model).items()
        if all(_attends_elsewhere(name, module) for name, module in found)
    }


def _updating(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Layer index -> the modules that say they belong to it and call `update` of a cache they take, with names."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        layer = layer_of(module)
        if layer is not None and takes_cache(module) and "update" in _names_in(module):
            found.setdefault(layer, []).append((name, module))
    return found


def _names_in(module: nn.Module) -> Sequence[str]:
    """Names of the attributes and functions that a module's forward uses."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)  # what wraps it on the module is not asked
    return () if code is None else code.co_names


def _attends_elsewhere(name: str, module: nn.Module) -> bool:
    own = name.rpartition(".")[2]
    named = CROSS.search(own) or CROSS.search(type(module).__name__)
    return bool(named) or getattr(module, "is_cross_attention", False) is True


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_of(model: Any) -> PreTrainedModel:
    """The innermost transformers model in `model` that holds all its attention modules: `model.model` without the
    head, or `model` itself where there is none."""
    from transformers import PreTrainedModel

    wanted, found = set(attention_modules(model).values()), model
    if wanted:
        for inner in model.modules():  # from the outside in
            if isinstance(inner, PreTrainedModel) and wanted <= set(inner.modules()):
                found = inner
    decoder: PreTrainedModel = found
    return decoder


REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""The name of transformers' registry of attention functions, in files that import it."""


def interface(module: nn.Module) -> Any:
    """The registry of attention functions that this module's forward looks into, or None."""
    kind = type(module)
    known = _looking.get(kind)
    if known is None or known[0] is not kind.forward:  # someone has put another one into the class
        known = _looking[kind] = kind.forward, _looks_into(kind)
    return known[1].get(REGISTRY)


_looking: weakref.WeakKeyDictionary[type[nn.Module], tuple[Any, Mapping[str, Any]]] = weakref.WeakKeyDictionary()


def _looks_into(kind: type[nn.Module]) -> Mapping[str, Any]:
    """Return the names of the file in which the forward of a class, or what that calls, looks for attention functions;
    none where it attends by itself, though another class of its file may not (GIT, BigBird-Pegasus, Informer)."""
    waiting, met = [kind.forward], set[Any]()
    while waiting:
        function: Any = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in met:
            continue
        met.add(code)
        names = {name for inner in _codes_in(code) for name in inner.co_names}
        if REGISTRY in names:
            found: Mapping[str, Any] = function.__globals__
            return found
        own = kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name in names:
            methods = [vars(each)[name] for each in own if inspect.isfunction(vars(each).get(name))]
            waiting += methods if "super" in names else methods[:1]
            called = function.__globals__.get(name)
            if inspect.isfunction(called) and REGISTRY in called.__globals__:
                waiting.append(called)
    return {}


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, and of those that it defines."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes_in(inner)


def gives_queries(module: nn.Module) -> bool:
    """Return True if this module calls its attention through transformers' interface."""
    return interface(module) is not None


def checkpointing(model: nn.Module) -> list[nn.Module]:
    """The modules that can be computed again in the backward pass, of those that the text goes through."""
    attention = set(attention_modules(model).values())
    return [
        module
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
        and (not attention or not attention.isdisjoint(module.modules()))
        and not getattr(module, "_can_checkpoint_with_cache", False)  # it only reads the cache, and so gets it
    ]


def checkpoints(module: nn.Module) -> bool:
    """Return True if this module is computed again in the backward pass: then it gets no cache."""
    return module.training and bool(module.gradient_checkpointing)


def counts_tokens(module: nn.Module) -> bool:
    """Return True if this module asks its cache for the tokens seen, to make a mask or a position bias of its own."""
    return not {"get_mask_sizes", "get_query_offset"}.isdisjoint(_names_in(module))


def expands(module: nn.Module) -> bool:
    """Return True if this module caches latents and makes keys and values of them after reading (DeepSeek V2, V3)."""
    return hasattr(module, "expand_kv")


def adds_to_softmax(module: nn.Module) -> bool:
    """Return True if this module caps its logits (Gemma 2) or lets them compete with a learned one (GPT-OSS)."""
    return any(getattr(module, name, None) is not None for name in ("attn_logit_softcapping", "sinks"))


def reuses(module: nn.Module) -> bool:
    """Return True if this module attends to the keys and values of an earlier layer (Gemma 3n and 4)."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def implementation(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


def offload_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate on a module whose weights are kept elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers: some kinds of quantized weights are buffers."""
    return itertools.chain(module.parameters(), module.buffers())


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes; its weights may be kept elsewhere between its calls."""
    device = next(tensors_of(module)).device
    if device.type != "meta":
        return device
    places = [getattr(hook, "execution_device", None) for inner in module.modules() for hook in offload_hooks(inner)]
    return torch.device(next((place for place in places if place is not None), device))
