"""Calibration: which axes a model's keys and values vary along, and how much each of their numbers matters.

A window of text is parted in two. The first part is read as a prompt; its un-rotated keys and values give the
covariance of every group of layers. The second part is then read from that cache, and the gradient of the log
likelihood of tokens *drawn from the model itself* is taken with regard to every cached number. The mean square of
that gradient is the diagonal of the Fisher information: half of it times the mean squared error of a number is, to
second order, the KL divergence that error causes. So errors in keys and values, in early and in late layers, are
weighed in one unit, nats, and one budget can be spent over all of them.

    covariance C (N, N), weight w (N,)   ->   eigenvectors of  sqrt(w) C sqrt(w)  are the axes, eigenvalues their energy

Windows are added up as they come, so memory does not grow with the number of tokens.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

from . import hook, samples
from .basis import flat
from .calibration import Calibration, Group, identity
from .errors import CalibrationError
from .rope import Rope, find_ropes
from .types import KV

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TOKENS", "Grouping", "calibrate", "calibrated", "group_size", "observe", "sensitivity", "usual_path"]

log = logging.getLogger("kvstack")

TOKENS = 10_240
"""Tokens read by default, scored ones not counted."""
PROMPT, SCORED = 1024, 128
SAMPLED_TOKENS, SAMPLED_WINDOW = 2048, 160
SINKS = 4
"""First tokens of a text, which are unlike all others and stay raw in any stack."""
RIDGE = 1e-3
"""Least weight of a number, as a share of the mean weight of its layer's keys or values."""
MOST_LAYERS = 8

Progress = Callable[[int, int], None]


# ---- the public functions


def calibrate(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None = None,
    tokens: int = TOKENS,
    *,
    layers: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find the axes that `CommonKV` stores a model's cache along.

    Args:
        model: any decoder-only model of transformers. Its weights are not changed.
        texts: what to read, best of all kinds that will be read later; they take turns. Default: prose,
            documentation, code, numbers and chat that come with Python and with this package.
        tokens: how many to read (default 10,240).
        layers: adjacent full-attention layers in a group; default a divisor of their number near 5.
        tokenizer: the model's; default the one in the folder the model was loaded from. With no tokenizer at all the
            model is calibrated on text that it writes itself.
        progress: called with (windows read, windows in all).

    Raises:
        CalibrationError: `layers` does not divide the model's layers, or a text is too short.
    """
    plan = Grouping(model, layers)
    windows, source = _windows(model, texts, tokens, tokenizer)
    with _at_rest(model):
        sums = [_Sums(group, plan.ropes) for group in plan.groups]
        for number, (ids, prompt) in enumerate(windows):
            cache, gradients = _read(model, ids.to(model.device), prompt, plan.full, seed=number)
            for group in sums:
                group.add(cache, gradients)
            if progress is not None:
                progress(number + 1, len(windows))
        groups = _finish(sums)
    manifest = {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "identity": identity(model),
        "texts": source,
        "tokens": str(sum(prompt for _, prompt in windows)),
        "kvstack": importlib.metadata.version("kvstack"),
        "torch": torch.__version__,
    }
    return Calibration(tuple(groups), manifest)


def sensitivity(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None = None,
    tokens: int = PROMPT,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[float, ...]:
    """How much each full-attention layer's keys matter: the nats per token that are lost when they are replaced by
    noise of the same mean and spread. Never below 0.

    Weights for the paper's merge: `CommonKV(basis="weights", merge="mean", weights=sensitivity(model))`. Arguments are
    those of `calibrate`.

    Source: CommonKV's published code. Differs from it: text of its own, never the text that is compressed later.
    """
    plan = Grouping(model, 1)
    windows, _ = _windows(model, texts, tokens, tokenizer)
    lost = torch.zeros(len(plan.full), dtype=torch.float64)
    with _at_rest(model):
        for number, (window, prompt) in enumerate(windows):
            ids = window.to(model.device)
            cache = DynamicCache(config=model.config)
            model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
            exact = _likelihood(model, ids, prompt, cache)
            generator = torch.Generator().manual_seed(number)
            for n, i in enumerate(plan.full):
                layer: Any = cache.layers[i]
                keys = layer.keys
                noise = torch.randn(keys.shape, generator=generator).to(keys)
                layer.keys = noise * keys.std(2, keepdim=True) + keys.mean(2, keepdim=True)
                lost[n] += exact - _likelihood(model, ids, prompt, cache)
                layer.keys = keys
    return tuple((lost / len(windows)).clamp_min(0).tolist())


def _likelihood(model: PreTrainedModel, ids: Tensor, prompt: int, cache: DynamicCache) -> float:
    """Mean log likelihood of what follows the prompt; the cache stays as it was."""
    again = copy.deepcopy(cache)
    logits = model(ids[:, prompt:-1], past_key_values=again, use_cache=True).logits[0].float()
    return -float(torch.nn.functional.cross_entropy(logits, ids[0, prompt + 1 :]))


_known: weakref.WeakKeyDictionary[Any, dict[str, Calibration]] = weakref.WeakKeyDictionary()


def calibrated(model: PreTrainedModel, layers: int) -> Calibration:
    """The calibration of `model` for groups of `layers`: made before in this process, kept in the user's cache
    folder, or made now and kept there."""
    path = usual_path(model, layers)
    known = _known.setdefault(model, {})
    if path.name in known:
        return known[path.name]
    found = _kept(model, path)
    if found is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # the lock goes when its process goes; a second process waits here and finds the work done
            with FileLock(path.with_suffix(".lock")):
                found = _kept(model, path) or _made(model, layers, path)
        except OSError as error:
            log.warning("The calibration cannot be kept, and is made for this process alone: %s", error)
            found = calibrate(model, layers=layers)
    known[path.name] = found
    return found


def _kept(model: PreTrainedModel, path: Path) -> Calibration | None:
    if not path.exists():
        return None
    try:
        found = Calibration.load(path)
        found.check(model)
    except CalibrationError as error:
        log.warning("%s It is made anew.", error)
        return None
    return found


def _made(model: PreTrainedModel, layers: int, path: Path) -> Calibration:
    log.warning(
        "CommonKV calibrates itself for this %s, once: about a minute for a small model. Kept in %s",
        type(model).__name__,
        path,
    )
    found = calibrate(model, layers=layers)
    found.save(path)
    return found


def usual_path(model: PreTrainedModel, layers: int) -> Path:
    """Where `CommonKV()` looks for a calibration of `model`."""
    return folder() / f"{model.config.model_type}-{identity(model)}-{layers}.safetensors"


def folder() -> Path:
    """Where calibrations are kept between runs."""
    from .models import cache_dir

    return cache_dir() / "calibrations"


def group_size(count: int) -> int:
    """How many of `count` layers to store together: the divisor nearest to 5, of those up to 8."""
    return min((n for n in range(1, MOST_LAYERS + 1) if count % n == 0), key=lambda n: (abs(n - 5), n))


# ---- what is read


class Grouping:
    """The full-attention layers of a model, in groups, on which device they are and how their keys are rotated."""

    def __init__(self, model: PreTrainedModel, layers: int | None) -> None:
        types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        self.modules = hook.attention_modules(model)
        self.full = [i for i, kind in enumerate(types) if kind == "full_attention" and i in self.modules]
        if not self.full:
            raise CalibrationError(f"{type(model).__name__} has no full-attention layer to calibrate for.")
        self.size = group_size(len(self.full)) if layers is None else layers
        if self.size < 1 or len(self.full) % self.size:
            divisors = [n for n in range(1, len(self.full) + 1) if len(self.full) % n == 0]
            raise CalibrationError(
                f"layers={layers}: {type(model).__name__} has {len(self.full)} full-attention layers, which do not "
                f"divide. Use one of {divisors}."
            )
        self.groups = [self.full[i : i + self.size] for i in range(0, len(self.full), self.size)]
        self.devices = {i: next(self.modules[i].parameters()).device for i in self.full}
        self.ropes = find_ropes(model, {i: self.modules[i] for i in self.full}, types)
        self.rotates = all(rope is not None for rope in self.ropes.values())
        if not self.rotates:  # all or none: keys of a group are compared with each other
            self.ropes = dict.fromkeys(self.full)


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    where = getattr(model, "name_or_path", "")
    if not where:
        return None
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception:  # whatever a folder without one, or a name without a network, raises
        return None


def _windows(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Windows, str]:
    """What is read, and what that is."""
    tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(model)
    if tokenizer is not None:
        kinds = _kinds(texts)
        return _cut(kinds, tokenizer, tokens, _longest(model)), _digest(kinds)
    if texts is not None:
        raise CalibrationError(
            f"the tokenizer of this {type(model).__name__} is not known, and texts were given. Pass tokenizer=."
        )
    with _at_rest(model):
        return _written_by(model, min(tokens, SAMPLED_TOKENS)), "the model itself"


def _kinds(texts: Iterable[str] | Mapping[str, str] | None) -> dict[str, str]:
    if texts is None:
        return samples.mixed()
    if isinstance(texts, str):
        return {"text": texts}
    return dict(texts) if isinstance(texts, Mapping) else {str(i): text for i, text in enumerate(texts)}


def _digest(kinds: Mapping[str, str]) -> str:
    return "sha256:" + hashlib.sha256("\0".join(kinds.values()).encode()).hexdigest()[:32]


def _longest(model: PreTrainedModel) -> int:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit or PROMPT + SCORED)


Windows = Sequence[tuple[Tensor, int]]
"""Token ids (1, T), and how many of them are the prompt."""


def _cut(kinds: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int) -> Windows:
    """Windows of all texts in turn: equal parts of each text, so that all of it is seen."""
    length = min(PROMPT + SCORED, longest)
    prompt = length * PROMPT // (PROMPT + SCORED)
    count = max(1, -(-tokens // prompt))
    ids = {}
    for name, text in kinds.items():
        # no tokenizer makes more than some 12 characters of ordinary text into one token
        found = tokenizer(text[: 12 * (tokens + length)], return_tensors="pt", verbose=False)["input_ids"]
        if found.shape[1] >= length:
            ids[name] = found
    if not ids:
        raise CalibrationError(f"no text has {length} tokens, which one window of calibration takes. Give longer ones.")
    names = list(ids)
    each = {name: len(range(i, count, len(names))) for i, name in enumerate(names)}
    windows = []
    for number in range(count):
        name, turn = names[number % len(names)], number // len(names)
        start = (ids[name].shape[1] - length) * turn // max(1, each[name] - 1)
        windows.append((ids[name][:, start : start + length], prompt))
    return windows


def _written_by(model: PreTrainedModel, tokens: int) -> Windows:
    """Windows that the model writes, from random first tokens."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    length = min(SAMPLED_WINDOW, _longest(model))
    rows = max(1, tokens // length)
    ids = torch.randint(0, vocabulary, (rows, 8), generator=generator)
    cache = DynamicCache(config=model.config)
    given = ids.to(model.device)
    while ids.shape[1] < length:
        logits = model(given, past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids, given = torch.cat([ids, drawn], dim=1), drawn.to(model.device)
    return [(row[None], length * PROMPT // (PROMPT + SCORED)) for row in ids]


# ---- reading it


@contextmanager
def _at_rest(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients for weights, and gradients possible whatever the caller has switched off."""
    training = model.training
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        model.train(training)


def _read(
    model: PreTrainedModel, ids: Tensor, prompt: int, full: Sequence[int], seed: int
) -> tuple[dict[int, KV], dict[int, KV]]:
    """What the prompt leaves in the cache of the `full` layers, and the gradient of the rest with regard to it."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    held: dict[int, KV] = {}
    for i in full:
        layer: Any = cache.layers[i]
        layer.keys, layer.values = (x.detach().requires_grad_(True) for x in (layer.keys, layer.values))
        held[i] = KV(layer.keys, layer.values)
    with torch.enable_grad():
        logits = model(ids[:, prompt:], past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=generator).to(logits.device)
        likelihood = logits.gather(-1, drawn).sum()
        leaves = [x for kv in held.values() for x in (kv.keys, kv.values)]
        found = torch.autograd.grad(likelihood, leaves, materialize_grads=True)
    gradients = {i: KV(found[2 * n], found[2 * n + 1]) for n, i in enumerate(full)}
    return {i: KV(kv.keys.detach(), kv.values.detach()) for i, kv in held.items()}, gradients


def observe(model: PreTrainedModel, plan: Grouping, ids: Tensor | None = None) -> dict[int, KV]:
    """Un-rotated keys, values and hidden states of every full-attention layer, on `ids` (1, T) or one window of the
    usual texts."""
    hidden: dict[int, Tensor] = {}

    def listen(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden[layer] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()

        return hook

    if ids is None:
        (ids, _), *_ = _windows(model, None, PROMPT, None)[0]
    with _at_rest(model):
        handles = [plan.modules[i].register_forward_pre_hook(listen(i), with_kwargs=True) for i in plan.full]
        cache = DynamicCache(config=model.config)
        try:
            model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
    found = {}
    for i in plan.full:
        layer: Any = cache.layers[i]
        keys, rope = layer.keys, plan.ropes[i]
        if rope is not None:
            keys = rope.unrotate(keys, torch.arange(keys.shape[2], device=keys.device)[None, None])
        found[i] = KV(keys[:, :, SINKS:], layer.values[:, :, SINKS:], hidden[i][:, None, SINKS:])
    return found


class _Sums:
    """What is added up for one group of layers."""

    def __init__(self, layers: Sequence[int], ropes: Mapping[int, Rope | None]) -> None:
        self.layers, self.ropes = layers, ropes
        self.count = 0
        self.origin: Tensor | None = None  # numbers are taken from here, or a large mean would eat their digits
        self.shapes: tuple[tuple[int, int, int], ...] = ()

    def add(self, cache: Mapping[int, KV], gradients: Mapping[int, KV]) -> None:
        x = self._flat(cache, lambda rope, x, positions: rope.unrotate(x, positions))
        g = self._flat(gradients, lambda rope, x, positions: rope.pull(x, positions))
        if self.origin is None:
            kvs = [cache[i] for i in self.layers]
            self.shapes = tuple((kv.keys.shape[1], kv.keys.shape[3], kv.values.shape[3]) for kv in kvs)
            n = x.shape[1]
            self.origin, self.total = x.mean(0), x.new_zeros(n)
            self.square, self.gradient = x.new_zeros(n, n), x.new_zeros(n)
        x = x - self.origin
        self.count += x.shape[0]
        self.total += x.sum(0)
        self.square.addmm_(x.T, x)
        self.gradient += g.square().sum(0)

    def _flat(self, kvs: Mapping[int, KV], turn: Callable[[Rope, Tensor, Tensor], Tensor]) -> Tensor:
        """(T, N) without the sinks."""
        found = []
        for i in self.layers:
            kv, rope = kvs[i], self.ropes[i]
            if rope is not None:
                positions = torch.arange(kv.tokens, device=kv.keys.device)[None, None]
                kv = KV(turn(rope, kv.keys, positions), kv.values)
            found.append(kv)
        return flat(found)[0, SINKS:]

    def weight(self) -> Tensor:
        """(N,) mean square of the gradient, never far below the mean of the same layer's keys or values."""
        found = (self.gradient / self.count).split([h * width for h, *widths in self.shapes for width in widths])
        return torch.cat([part + RIDGE * part.mean() for part in found])

    def group(self, weight: Tensor) -> Group:
        assert self.origin is not None
        mean = self.total / self.count
        covariance = self.square / self.count - torch.outer(mean, mean)
        root = weight.sqrt()
        energy, axes = torch.linalg.eigh(root[:, None] * covariance * root)
        energy, axes = energy.flip(0).clamp_min(LEAST), axes.T.flip(0)
        tensors = [(self.origin + mean), weight, axes.half(), energy]
        return Group(tuple(self.layers), self.shapes, *(x.cpu().contiguous() for x in tensors))


def _finish(sums: Sequence[_Sums]) -> list[Group]:
    weights = [group.weight() for group in sums]
    # one factor for all groups, so that latents are numbers of ordinary size
    power = sum(float((w * g.square.diagonal() / g.count).sum()) for w, g in zip(weights, sums, strict=True))
    numbers = sum(len(w) for w in weights)
    factor = numbers / power if power > 0 else 1.0
    return [group.group(weight * factor + TINY) for weight, group in zip(weights, sums, strict=True)]


TINY = 1e-12
"""Least weight: a model that does not look at its cache at all still has axes."""
LEAST = 1e-8
"""Least energy, where 1 is the mean: what never varied in the text read may vary in others."""
