"""Calibration: which axes a model's keys and values vary along, and how much each of their numbers matters.

A window of text is parted in two. The first part is read as a prompt; its un-rotated keys and values give the
covariance of every group of layers. The second part is then read from that cache, and the gradient of the log
likelihood of tokens *drawn from the model itself* is taken with regard to every cached number. The mean square of
that gradient is the diagonal of the Fisher information: half of it times the mean squared error of a number is, to
second order, the KL divergence that error causes. So errors in keys and values, in early and in late layers, are
weighed in one unit, nats, and one budget can be spent over all of them.

Windows are added up as they come (sums.py), so memory does not grow with the number of tokens. It grows with the square
of the numbers that share axes, which plan.py bounds.

With `metric="variance"` all numbers weigh the same, and keys and values are apart: two groups of axes for the same
layers, first those of the keys, then those of the values. No gradients are taken.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import BindError, CalibrationError
from ..model.adapters import unwrapped
from ..model.attention import device_of, expands
from ..model.fingerprint import kv_fingerprint
from ..model.layers import LayerGroups
from ..model.probing import at_rest, observe
from ..model.ranks import heads_of
from ..types import KV
from . import keep
from .backward import OTHERWISE, differentiable, slopes
from .blocks import held_by
from .calibration import Calibration, Metric, loaded
from .in_float32 import in_float32
from .plan import BLOCK, EACH, KEPT, MEMORY, Block, CalibrationPlan, calibration_plan, check_tokens
from .sums import Found, OneKind, Sums, leading_axes
from .windows import Windows, draw, own_text, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..stage import Stage

__all__ = ["calibrate", "calibration_for", "default_path"]

Progress = Callable[[int, int], None]


# ---- the public functions


def calibrate(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None = None,
    tokens: int | None = None,
    *,
    layers: int | None = None,
    metric: Metric = "fisher",
    only: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_axes: float = KEPT,
    bits: int = 8,
    block: int = BLOCK,
    memory: float = MEMORY,
    progress: Progress | None = None,
) -> Calibration:
    """Find the axes that a model's cache is stored along, by `CommonKV` for one.

    It runs on the model's own device; on a processor in float32 whatever the model's type, if its layers are plain
    ones. In addition to the model it takes the sums of a pass (`memory`), four times the sums of one block while its
    axes are found, and a byte or two for each number of all axes.

    Args:
        model: any decoder-only model of transformers. Its weights are not changed.
        texts: texts to read, best of all kinds that will be read later; they take turns. Default: prose,
            documentation, code, numbers and chat that come with Python and with this package.
        tokens: number of tokens to read (default 10,240, or 2.5 for each axis of the largest block).
        layers: adjacent full-attention layers in a group; default a divisor of their number near 5, or with `variance`
            all of them, or fewer where they cache more than `block` numbers a token.
        metric: `fisher` (default) weighs each number by how much it matters to the model's predictions, and finds axes
            for a group's keys and values together. `variance` weighs all the same, and finds axes for the keys and
            others for the values.
        only: the full-attention layers to find axes for, where others hold nothing of their own; default all.
        tokenizer: the model's; default the one in the folder the model was loaded from. With no tokenizer at all the
            model is calibrated on text that it writes itself.
        keep_axes: share of the axes that is KEPT, those along which most energy lies (default 0.5: enough for any
            budget of up to two bits for each number of the cache).
        bits: of each number of an axis, 8 (default) or 16.
        block: numbers a token that share axes, at most (default 8,192). Axes take the square of it. A group of layers
            that you named, or a single layer, with more numbers is cut into runs of kv heads.
        memory: GiB for the sums of one pass over the texts, at least one block's (default 4.0).
        progress: called with (steps done, steps in all); a window read is a step, and so are the axes of a block.

    Raises:
        CalibrationError: `layers` does not divide the model's layers, all texts are shorter than a window (those
            that are get passed over), or a block has more numbers than tokens are read.
    """
    model = unwrapped(model)
    plan = calibration_plan(
        model,
        tokens,
        layers=layers,
        metric=metric,
        only=only,
        keep_axes=keep_axes,
        bits=bits,
        block=block,
        memory=memory,
    )
    windows, source = windows_of(model, texts, plan.tokens, tokenizer, math.ceil(EACH * plan.widest))
    read = sum(prompt for _, prompt in windows)
    check_tokens(plan, type(model).__name__, read)
    found, seconds = _found(model, plan, windows, progress)
    _check_power(model, plan, found)
    manifest = {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "identity": kv_fingerprint(model),
        "metric": metric,
        "rotated": ",".join(map(str, plan.groups.rotated)),
        "texts": source,
        "tokens": str(read),
        "seconds": ", ".join(f"{what} {spent:.0f}" for what, spent in seconds.items()),
        "kvstack": __version__,
        "torch": torch.__version__,
    }
    return Calibration(tuple(leading_axes(found, keep_axes)), manifest)


def calibration_for(
    stage: Stage,
    given: str | os.PathLike[str] | Calibration | None,
    model: PreTrainedModel,
    groups: LayerGroups,
    metric: Metric,
    *,
    complete: bool = False,
) -> Calibration:
    """Return the calibration passed by the user to `stage`, or load or create the default one for this model: with
    half of the axes in 8 bits, or `complete`, with all of them in 16. Where processes share the kv heads of the
    model, it is cut, and what is returned has the axes of those that are here; `everywhere` has those of all.

    Raises:
        CalibrationError, BindError: the user's is for another model, metric or grouping, or is wanted complete; or
            there is none, and the model is split among processes, so that none can be made now.
    """
    if given is None:
        calibration = _default(model, groups, metric, type(stage).__name__, complete)
    else:
        calibration = _given(stage, given, model, groups, metric, complete)
    return held_by(calibration, heads_of(model), groups.groups)


def _given(
    stage: Stage,
    given: str | os.PathLike[str] | Calibration,
    model: PreTrainedModel,
    groups: LayerGroups,
    metric: Metric,
    complete: bool,
) -> Calibration:
    """The user's calibration, which is checked."""
    calibration = given if isinstance(given, Calibration) else loaded(given)
    calibration.check(model, metric, groups.size)
    if calibration.layers != groups.size:
        raise BindError(
            f"{stage!r}: the calibration is for groups of {calibration.layers} layers, not of {groups.size}. "
            f"Use layers={calibration.layers}, or calibrate with layers={groups.size}."
        )
    _check_rotation(calibration, groups)
    held, every = calibration.kept
    if complete and held < every:
        raise BindError(
            f"{stage!r}: the calibration keeps {held} of {every} axes, and this stack has bits for more of them. "
            f"Calibrate with more, kvstack.calibrate(model, layers={groups.size}, metric={metric!r}, keep_axes=1.0, "
            "bits=16), or store less."
        )
    if not calibration.covers(groups.groups):
        raise BindError(
            f"{stage!r}: the calibration is for other groups than {groups.groups}, the layers that hold keys and "
            f"values here. Calibrate for them: kvstack.calibrate(model, layers={groups.size}, only={groups.full})."
        )
    return calibration


def _check_rotation(calibration: Calibration, groups: LayerGroups) -> None:
    """Refuse a calibration whose keys were not un-rotated in the same layers as here: version 0.1 took all layers of a
    model for rotated, and latents for keys."""
    told = calibration.manifest.get("rotated")
    mixed = groups.rotates and len(groups.rotated) < len(groups.full)
    stale = mixed or any(expands(groups.modules[i]) for i in groups.full)
    if told is not None:
        stale = set(told.split(",")) & set(map(str, groups.full)) != set(map(str, groups.rotated))
    if stale:
        raise CalibrationError(
            f"{calibration!r} takes other layers for rotated than {groups.rotated}. Make it again: "
            f"kvstack.calibrate(model, layers={groups.size}, metric={calibration.metric!r})."
        )


def _default(model: PreTrainedModel, groups: LayerGroups, metric: Metric, who: str, complete: bool) -> Calibration:
    """Known in this process, loaded from the user's cache folder, or made now (for the stage `who`) and kept there."""

    def notice() -> str:
        if heads_of(model).size > 1:  # it is refused instead
            return ""
        why = ", with all axes for a large budget" * complete
        what = f"{who} calibrates itself for this {type(model).__name__}, once{why}: about a minute for a small model."
        return " ".join(filter(None, [what, own_text(model)]))

    def read(path: Path) -> Calibration:
        calibration = Calibration.load(path)
        calibration.check(model, metric, groups.size)
        _check_rotation(calibration, groups)
        if calibration.layers != groups.size or not calibration.covers(groups.groups):
            raise CalibrationError(f"{os.fspath(path)!r} is for other groups of layers than {groups.groups}.")
        held, all_axes = calibration.kept
        if complete and held < all_axes:
            raise CalibrationError(f"{os.fspath(path)!r} keeps {held} of {all_axes} axes, and all are wanted.")
        return calibration

    every = LayerGroups(model, 1).full
    only = None if groups.full == every else groups.full
    share, bits = (1.0, 16) if complete else (KEPT, 8)
    settings: dict[str, Any] = {"layers": groups.size, "metric": metric, "only": only}
    settings |= {"keep_axes": share, "bits": bits}
    make = partial(calibrate, model, **settings)
    if heads_of(model).size > 1:
        make = partial(_refuse_to_make, model, who, settings)
    return keep.load_or_make(model, _file_name(model, groups.size, metric, only, complete), read, make, notice)


def _refuse_to_make(model: PreTrainedModel, who: str, settings: Mapping[str, Any]) -> Calibration:
    """Say how to make a calibration that all of several processes find."""
    said = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
    raise CalibrationError(
        f"{who} needs a calibration. One process makes it of a whole model, and this {type(model).__name__} is split "
        f"among {heads_of(model).size} processes, which do not all find one in {keep.folder()}. Make it in one "
        f"process, kvstack.calibrate(model, {said}).save(path), and use {who}(calibration=path) in all of them."
    )


def default_path(
    model: PreTrainedModel,
    layers: int,
    metric: Metric = "fisher",
    only: Sequence[int] | None = None,
    *,
    complete: bool = False,
) -> Path:
    """Return the file in which stages look for a calibration of `model` for groups of `layers`: for one with half of
    the axes, or for the `complete` one, which large budgets want."""
    return keep.folder() / _file_name(model, layers, metric, only, complete)


def _file_name(model: PreTrainedModel, layers: int, metric: Metric, only: Sequence[int] | None, complete: bool) -> str:
    kind = ("" if metric == "fisher" else f"-{metric}") + ("-all" if complete else "-half")
    if only is not None:
        kind += f"-{hashlib.sha256(repr(list(only)).encode()).hexdigest()[:8]}"
    model_type = model.config.get_text_config(decoder=True).model_type
    return f"{model_type}-{kv_fingerprint(model)}-{layers}{kind}.safetensors"


# ---- reading


def _check_power(model: PreTrainedModel, plan: CalibrationPlan, found: Sequence[Found]) -> None:
    """Refuse what has no axes."""
    name = type(model).__name__
    lost = sorted({each.layers for each in found if not math.isfinite(each.power)})
    if lost:
        raise CalibrationError(
            f"keys or values of layers {list(lost[0])} of this {name} in {model.dtype} are not finite, or so large "
            "that their squares are not. Load it in bfloat16 or float32, or look for weights that are not finite."
        )
    if any(each.power > 0 for each in found):
        return
    if plan.metric == "variance":
        raise CalibrationError(
            f"calibration of this {name}: keys and values are the same for all tokens. Use other texts."
        )
    raise CalibrationError(f"calibration takes gradients, and those of this {name} are all zero. {OTHERWISE}")


def _found(
    model: PreTrainedModel, plan: CalibrationPlan, windows: Windows, progress: Progress | None
) -> tuple[list[Found], dict[str, float]]:
    """All axes of all blocks, and the seconds that reading took and finding axes."""
    steps = len(plan.passes) * len(windows) + len(plan.blocks)
    found, seconds, done = list[Found](), {"reading": 0.0, "axes": 0.0}, 0
    with at_rest(model), in_float32(model):
        for numbers in plan.passes:
            sums = [_sums(plan, plan.blocks[number]) for number in numbers]
            began = time.monotonic()
            for number, (ids, prompt) in enumerate(windows):
                cache, gradients = _window(model, plan, ids, prompt, seed=number)
                for each in sums:
                    each.add(cache, gradients)
                done += 1
                if progress is not None:
                    progress(done, steps)
            seconds["reading"] += time.monotonic() - began
            began = time.monotonic()
            for each in sums:
                found.append(each.found(plan.bits))
                done += 1
                if progress is not None:
                    progress(done, steps)
            seconds["axes"] += time.monotonic() - began
    return found, seconds


def _sums(plan: CalibrationPlan, block: Block) -> Sums:
    if plan.metric == "variance":
        return OneKind(block.layers, "keys" if block.shapes[0][1] else "values")
    return Sums(block.layers, plan.groups.ropes, block.heads)


def _window(
    model: PreTrainedModel, plan: CalibrationPlan, ids: Tensor, prompt: int, seed: int
) -> tuple[Mapping[int, KV], Mapping[int, KV]]:
    """Return the cache after a window, and the gradients with regard to it, if the metric needs them."""
    if plan.metric == "variance":
        seen = observe(model, plan.groups, ids[:, :prompt])
        return seen, seen
    return read_window(model, ids.to(device_of(model)), prompt, plan.groups.full, seed)


def read_window(
    model: PreTrainedModel, ids: Tensor, prompt: int, full: Sequence[int], seed: int
) -> tuple[dict[int, KV], dict[int, KV]]:
    """Return the cache of the `full` layers after the prompt, and the gradient of the rest with regard to it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    held: dict[int, KV] = {}
    for i in full:
        layer: Any = cache.layers[i]
        layer.keys, layer.values = (x.detach().requires_grad_(True) for x in (layer.keys, layer.values))
        held[i] = KV(layer.keys, layer.values)
    with torch.enable_grad(), differentiable(model, cache):
        logits = model(ids[:, prompt:], past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
        drawn = draw(model, logits.detach(), torch.Generator().manual_seed(seed))
        likelihood = logits.gather(-1, drawn).sum()
        found = slopes(model, likelihood, [x for kv in held.values() for x in (kv.keys, kv.values)])
    gradients = {i: KV(found[2 * n], found[2 * n + 1]) for n, i in enumerate(full)}
    return {i: KV(kv.keys.detach(), kv.values.detach()) for i, kv in held.items()}, gradients
