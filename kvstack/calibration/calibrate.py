"""Calibration: which axes a model's keys and values vary along, and how much each of their numbers matters.

A window of text is parted in two. The first part is read as a prompt; its un-rotated keys and values give the
covariance of every group of layers. The second part is then read from that cache, and the gradient of the log
likelihood of tokens *drawn from the model itself* is taken with regard to every cached number. The mean square of
that gradient is the diagonal of the Fisher information: half of it times the mean squared error of a number is, to
second order, the KL divergence that error causes. So errors in keys and values, in early and in late layers, are
weighed in one unit, nats, and one budget can be spent over all of them.

    covariance C (N, N), weight w (N,)   ->   eigenvectors of  sqrt(w) C sqrt(w)  are the axes, eigenvalues their energy

Windows are added up as they come, so memory does not grow with the number of tokens.

With `metric="variance"` all numbers weigh the same, and keys and values are apart: two groups of axes for the same
layers, first those of the keys, then those of the values. No gradients are taken.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BindError, CalibrationError
from ..model.adapters import unwrapped
from ..model.attention import device_of, expands
from ..model.fingerprint import kv_fingerprint
from ..model.layers import LayerGroups
from ..model.probing import SINKS, at_rest, observe
from ..model.rope import Rope
from ..types import KV
from . import keep
from .axes import flat
from .backward import OTHERWISE, differentiable, slopes
from .calibration import Calibration, GroupAxes, Metric, loaded
from .windows import draw, own_text, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..stage import Stage

__all__ = ["TOKENS", "calibrate", "calibration_for", "default_path"]

TOKENS = 10_240
"""Tokens read by default, scored ones not counted."""
RIDGE = 1e-3
"""Least weight of a number, as a share of the mean weight of its layer's keys or values."""

Progress = Callable[[int, int], None]


# ---- the public functions


def calibrate(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None = None,
    tokens: int = TOKENS,
    *,
    layers: int | None = None,
    metric: Metric = "fisher",
    only: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find the axes that a model's cache is stored along, by `CommonKV` for one.

    Args:
        model: any decoder-only model of transformers. Its weights are not changed.
        texts: what to read, best of all kinds that will be read later; they take turns. Default: prose,
            documentation, code, numbers and chat that come with Python and with this package.
        tokens: how many to read (default 10,240).
        layers: adjacent full-attention layers in a group; default a divisor of their number near 5, or with `variance`
            all of them.
        metric: `fisher` (default) weighs each number by how much it matters to the model's predictions, and finds axes
            for a group's keys and values together. `variance` weighs all the same, and finds axes for the keys and
            others for the values.
        only: the full-attention layers to find axes for, where others hold nothing of their own; default all.
        tokenizer: the model's; default the one in the folder the model was loaded from. With no tokenizer at all the
            model is calibrated on text that it writes itself.
        progress: called with (windows read, windows in all).

    Raises:
        CalibrationError: `layers` does not divide the model's layers, all texts are shorter than a window (those
            that are get passed over), or with `variance` a group has more numbers than tokens are read.
    """
    model = unwrapped(model)
    if metric not in ("fisher", "variance"):
        raise CalibrationError(f'{metric!r} is no metric. Use "fisher" or "variance".')
    if metric == "fisher" and model.get_output_embeddings() is None:
        raise CalibrationError(
            f"{type(model).__name__} predicts no tokens, and calibration asks how its predictions change. "
            "Pass the causal model it is part of: KVStack([...], model=...)."
        )
    if layers is None and metric == "variance":
        layers = len(LayerGroups(model, 1, only).full)
    groups = LayerGroups(model, layers, only)
    if groups.refusal:
        raise CalibrationError(
            f"calibration takes the rotary embedding off the keys of {type(model).__name__}, which cannot be done in "
            f"{groups.refusal}. Use stages that take keys as they are cached, such as Quant."
        )
    windows, source = windows_of(model, texts, tokens, tokenizer)
    with at_rest(model):
        sums: list[Sums]
        if metric == "variance":
            sums = [_OneKind(group, kind) for group in groups.groups for kind in ("keys", "values")]
        else:
            sums = [Sums(group, groups.ropes) for group in groups.groups]
        for number, (ids, prompt) in enumerate(windows):
            if metric == "variance":
                cache = gradients = observe(model, groups, ids[:, :prompt])
                _check_tokens(model, groups, cache, sum(prompt for _, prompt in windows))
            else:
                cache, gradients = read_window(model, ids.to(device_of(model)), prompt, groups.full, seed=number)
            for each in sums:
                each.add(cache, gradients)
            if progress is not None:
                progress(number + 1, len(windows))
        axes = _finish(model, sums)
    manifest = {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "identity": kv_fingerprint(model),
        "metric": metric,
        "rotated": ",".join(map(str, groups.rotated)),
        "texts": source,
        "tokens": str(sum(prompt for _, prompt in windows)),
        "kvstack": importlib.metadata.version("kvstack"),
        "torch": torch.__version__,
    }
    return Calibration(tuple(axes), manifest)


def calibration_for(
    stage: Stage,
    given: str | os.PathLike[str] | Calibration | None,
    model: PreTrainedModel,
    groups: LayerGroups,
    metric: Metric,
) -> Calibration:
    """Return the calibration passed by the user to `stage`, or load or create the default one for this model.

    Raises:
        CalibrationError, BindError: the user's is for another model, metric or grouping.
    """
    if given is None:
        return _default(model, groups, metric, type(stage).__name__)
    calibration = given if isinstance(given, Calibration) else loaded(given)
    calibration.check(model, metric, groups.size)
    if calibration.layers != groups.size:
        raise BindError(
            f"{stage!r}: the calibration is for groups of {calibration.layers} layers, not of {groups.size}. "
            f"Use layers={calibration.layers}, or calibrate with layers={groups.size}."
        )
    _check_rotation(calibration, groups)
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


def _default(model: PreTrainedModel, groups: LayerGroups, metric: Metric, who: str) -> Calibration:
    """Known in this process, loaded from the user's cache folder, or made now (for the stage `who`) and kept there."""

    def notice() -> str:
        what = f"{who} calibrates itself for this {type(model).__name__}, once: about a minute for a small model."
        return " ".join(filter(None, [what, own_text(model)]))

    def read(path: Path) -> Calibration:
        calibration = Calibration.load(path)
        calibration.check(model, metric, groups.size)
        _check_rotation(calibration, groups)
        if calibration.layers != groups.size or not calibration.covers(groups.groups):
            raise CalibrationError(f"{os.fspath(path)!r} is for other groups of layers than {groups.groups}.")
        return calibration

    every = LayerGroups(model, 1).full
    only = None if groups.full == every else groups.full
    make = partial(calibrate, model, layers=groups.size, metric=metric, only=only)
    return keep.load_or_make(model, _file_name(model, groups.size, metric, only), read, make, notice)


def default_path(
    model: PreTrainedModel, layers: int, metric: Metric = "fisher", only: Sequence[int] | None = None
) -> Path:
    """Where stages look for a calibration of `model` for groups of `layers`."""
    return keep.folder() / _file_name(model, layers, metric, only)


def _file_name(model: PreTrainedModel, layers: int, metric: Metric, only: Sequence[int] | None) -> str:
    kind = "" if metric == "fisher" else f"-{metric}"
    if only is not None:
        kind += f"-{hashlib.sha256(repr(list(only)).encode()).hexdigest()[:8]}"
    model_type = model.config.get_text_config(decoder=True).model_type
    return f"{model_type}-{kv_fingerprint(model)}-{layers}{kind}.safetensors"


# ---- reading it


def read_window(
    model: PreTrainedModel, ids: Tensor, prompt: int, full: Sequence[int], seed: int
) -> tuple[dict[int, KV], dict[int, KV]]:
    """What the prompt leaves in the cache of the `full` layers, and the gradient of the rest with regard to it."""
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


def _check_tokens(model: PreTrainedModel, groups: LayerGroups, cache: Mapping[int, KV], tokens: int) -> None:
    """A covariance of N numbers has no more axes than tokens, and its N^2 sums and N^3 steps grow beyond bounds."""
    each = max(x.shape[1] * x.shape[3] for kv in cache.values() for x in (kv.keys, kv.values))
    if each * groups.size <= tokens:
        return
    count = len(groups.full)
    fewer = [n for n in range(1, groups.size) if count % n == 0 and n * each <= tokens]
    raise CalibrationError(
        f"{groups.size} layers of {type(model).__name__} cache {each * groups.size} numbers a token of keys or of "
        f"values, and {tokens} tokens tell of no more axes than that many. Use "
        f"{f'layers= one of {fewer}, or ' * bool(fewer)}tokens={4 * each * groups.size} or more."
    )


class Sums:
    """What is added up for one group of layers."""

    def __init__(self, layers: Sequence[int], ropes: Mapping[int, Rope | None]) -> None:
        self.layers, self.ropes = layers, ropes
        self.gradient: Tensor | float = 0.0
        self.count = 0
        self.origin: Tensor | None = None  # numbers are taken from here, or a large mean would eat their digits
        self.shapes: tuple[tuple[int, int, int], ...] = ()

    def add(self, cache: Mapping[int, KV], gradients: Mapping[int, KV]) -> None:
        x = self.flat(cache, lambda rope, x, positions: rope.unrotate(x, positions))
        g = self.flat(gradients, lambda rope, x, positions: rope.pull(x, positions))
        self._add([cache[i] for i in self.layers], x)
        self.gradient = self.gradient + g.square().sum(0)

    def _add(self, kvs: Sequence[KV], x: Tensor) -> None:
        if self.origin is None:
            self.shapes = tuple((kv.keys.shape[1], kv.keys.shape[3], kv.values.shape[3]) for kv in kvs)
            n = x.shape[1]
            self.origin, self.total = x.mean(0), x.new_zeros(n)
            self.square = x.new_zeros(n, n)
        x = x - self.origin
        self.count += x.shape[0]
        self.total += x.sum(0)
        self.square.addmm_(x.T, x)

    def flat(self, kvs: Mapping[int, KV], turn: Callable[[Rope, Tensor, Tensor], Tensor]) -> Tensor:
        """(T, N) without the sinks."""
        unrotated = []
        for i in self.layers:
            kv, rope = kvs[i], self.ropes[i]
            if rope is not None:
                positions = rope.marked(torch.arange(kv.tokens, device=kv.keys.device)[None, None])
                kv = KV(turn(rope, kv.keys, positions), kv.values)
            unrotated.append(kv)
        return flat(unrotated)[0, SINKS:]

    def weight(self) -> Tensor:
        """(N,) mean square of the gradient, never far below the mean of the same layer's keys or values."""
        assert isinstance(self.gradient, Tensor)
        parts = (self.gradient / self.count).split([h * width for h, *widths in self.shapes for width in widths])
        return torch.cat([part + RIDGE * part.mean() for part in parts])

    def group(self, weight: Tensor) -> GroupAxes:
        assert self.origin is not None
        mean = self.total / self.count
        covariance = self.square / self.count - torch.outer(mean, mean)
        root = weight.sqrt()
        energy, axes = torch.linalg.eigh(root[:, None] * covariance * root)
        energy, axes = energy.flip(0).clamp_min(LEAST), axes.T.flip(0)
        tensors = [(self.origin + mean), weight, axes.half(), energy]
        return GroupAxes(tuple(self.layers), self.shapes, *(x.cpu().contiguous() for x in tensors))


class _OneKind(Sums):
    """The keys alone or the values alone of a group of layers, all numbers of one weight."""

    def __init__(self, layers: Sequence[int], kind: str) -> None:
        super().__init__(layers, {})
        self.kind = kind

    def add(self, cache: Mapping[int, KV], gradients: Mapping[int, KV]) -> None:
        kvs = [cache[i].only(self.kind) for i in self.layers]  # un-rotated and without sinks already
        self._add(kvs, flat(kvs)[0])

    def weight(self) -> Tensor:
        return torch.ones_like(self.total)


def _finish(model: PreTrainedModel, sums: Sequence[Sums]) -> list[GroupAxes]:
    weights = [group.weight() for group in sums]
    # one factor for all groups, so that latents are numbers of ordinary size
    power = sum(float((w * g.square.diagonal() / g.count).sum()) for w, g in zip(weights, sums, strict=True))
    if not power > 0:
        raise CalibrationError(
            f"calibration takes gradients, and those of this {type(model).__name__} are all zero. {OTHERWISE}"
        )
    factor = sum(len(w) for w in weights) / power
    return [group.group(weight * factor + TINY) for weight, group in zip(weights, sums, strict=True)]


TINY = 1e-12
"""Least weight: a layer that the model does not look at still has axes."""
LEAST = 1e-8
"""Least energy, where 1 is the mean: what never varied in the text read may vary in others."""
