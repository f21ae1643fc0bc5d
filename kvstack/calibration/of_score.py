"""The data that a score is fitted to: found once for a model by reading texts, and kept for all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..errors import BindError, CalibrationError
from ..model.attention import expands
from ..model.fingerprint import kv_fingerprint
from ..model.layers import LayerGroups
from ..model.ranks import heads_of
from ..model.rest import at_rest
from . import keep
from .by_layer import ByLayer, Sizes
from .in_float32 import in_float32
from .listening import Read, listening
from .windows import OWN_TEXT, SAVE_TOKENIZER, longest_text, own_text, tokenizer_of, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Find", "Fits", "check_finite", "fitted_to"]


INSTEAD = 'score="snapkv"'
"""Works where a score cannot be fitted."""


class Fits(Protocol):
    """A score, or something else that is fitted by reading texts; its repr tells the settings."""

    @property
    def name(self) -> str: ...


Find = Callable[[Read, Sequence[Tensor], LayerGroups], Mapping[int, Mapping[str, Tensor]]]
"""Reads texts (1, T) and returns, for every layer, tensors by name."""


def fitted_to(
    model: PreTrainedModel,
    layers: Sequence[int],
    score: Fits,
    sizes: Mapping[int, Sizes],
    find: Find,
    tokens: int,
    readings: int = 1,
) -> ByLayer:
    """Return the findings of `find` for `score` in `layers` of `model`, of these `sizes`: known in this process, loaded
    from the user's cache folder, or found now in some `tokens` of text, and kept there.

    Args:
        readings: times that `find` reads each text in one go: they are short enough for that.

    Raises:
        BindError: the model caches latents, or its attention looks at something else than it caches.
        CalibrationError: the model is split among processes, and they do not all find what one of them has kept.
    """
    latent = next((i for i, module in LayerGroups(model, 1).modules.items() if i in layers and expands(module)), None)
    if latent is not None:
        raise BindError(
            f"{score!r} is fitted to keys and values, and {type(model).__name__} caches latents in their place (layer "
            f"{latent}). Use {getattr(score, 'instead', INSTEAD)}."
        )
    make = _refused if heads_of(model).size > 1 else _made
    kind = type(model).__name__
    told = f"{type(score).__name__} calibrates itself for this {kind}, once: it reads {readings * tokens:,} tokens."

    def notice() -> str:
        return " ".join(filter(None, [told, own_text(model, SAVE_TOKENIZER)])) if make is _made else ""

    def is_current(found: ByLayer) -> bool:
        # what was found in text of the model's own goes as soon as there is a tokenizer
        return found.manifest.get("texts") != OWN_TEXT or tokenizer_of(model) is None

    def read(path: Path) -> ByLayer:
        found = ByLayer.load(path, model=model, score=repr(score), sizes=sizes)
        if not is_current(found):
            raise CalibrationError(f"{str(path)!r} was found in text that the model wrote, and its tokenizer is known.")
        return found

    make_now = partial(make, model, layers, score, find, tokens, readings)
    return keep.load_or_make(model, _file_name(model, layers, score), read, make_now, notice, is_current)


def check_finite(x: Tensor, layer: int) -> None:
    """Refuse sums over the tokens of a layer that are no numbers.

    Raises:
        CalibrationError: they are not.
    """
    if not bool(x.isfinite().all()):
        raise CalibrationError(
            f"queries, keys or values of layer {layer} are not finite, or so large that their squares are not. Load "
            "the model in bfloat16 or float32, or look for weights that are not finite."
        )


def _file_name(model: PreTrainedModel, layers: Sequence[int], score: Fits) -> str:
    told = hashlib.sha256(f"{score!r} {list(layers)}".encode()).hexdigest()[:8]
    model_type = model.config.get_text_config(decoder=True).model_type
    return f"{model_type}-{kv_fingerprint(model)}-{score.name}-{told}.safetensors"


def _made(
    model: PreTrainedModel, layers: Sequence[int], score: Fits, find: Find, tokens: int, readings: int
) -> ByLayer:
    windows, source = windows_of(model, None, tokens, None)
    longest = longest_text(model) // readings
    texts = [ids[:, : min(prompt, longest)] for ids, prompt in windows]
    with at_rest(model), in_float32(model), listening(model, layers) as read:
        found = find(read, texts, LayerGroups(model, 1, layers))
    manifest = {
        "score": repr(score),
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "identity": kv_fingerprint(model),
        "texts": source,
        "tokens": str(sum(ids.shape[1] for ids in texts)),
    }
    return ByLayer({layer: dict(found[layer]) for layer in layers}, manifest)


def _refused(
    model: PreTrainedModel, layers: Sequence[int], score: Fits, find: Find, tokens: int, readings: int
) -> ByLayer:
    raise CalibrationError(
        f"{score!r} needs a calibration. One process makes it of a whole model, and this {type(model).__name__} is "
        f"split among {heads_of(model).size} processes, which do not all find one in {keep.folder()}. Make it there in "
        "one process, with the same stages: KVStack([...], model=model)."
    )
