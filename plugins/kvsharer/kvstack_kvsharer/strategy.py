"""The strategy: the layers that read another layer, searched for once for a model, and kept as a small file.

average    keys and values of every layer, over some short texts
rank       pairs of layers by the distance of these averages, most different first
try        let the deeper layer of a pair read the other; keep it so where the last hidden state stays near
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from kvstack import KV, CalibrationError
from kvstack.authoring import (
    LayerGroups,
    Share,
    at_rest,
    cached_shapes,
    device_of,
    heads_of,
    is_of,
    kv_fingerprint,
    tokenizer_of,
    windows_of,
    write_bytes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Strategy", "kinds_of", "layers_of", "search", "what_is_wrong"]

log = logging.getLogger("kvstack")

FORMAT = "kvstack-kvsharer strategy 1"
RANKS = ("different", "similar", "random")
TEXTS, TOKENS = 30, 64
"""Texts searched with, and tokens of each (the paper's)."""
READ = 10_240
"""Tokens of the package's own texts that these are cut out of, so that all kinds are among them."""


@dataclass(frozen=True)
class Strategy:
    """The layers that hold nothing, and the layer that each of them reads.

    Attributes:
        shares: layer -> the earlier layer whose keys and values it attends with. Chains are resolved: where 3 reads 2
            and 2 reads 1, both read 1.
        cosine: mean cosine of the last hidden state with that of the dense model, on the texts searched with; None
            where nothing was searched.
        pairs: those taken, in their order and before chains are resolved: (layer, earlier layer, distance of their
            averages, cosine with all pairs up to this one).
        identity: fingerprint of the model it was searched for; empty: any model is taken.
        settings: the settings of the search.

    Raises:
        CalibrationError: a layer that reads itself or a later one.
    """

    shares: Mapping[int, int] = field(hash=False)
    cosine: float | None = None
    pairs: Sequence[tuple[int, int, float, float]] = field(default=(), repr=False, hash=False)
    identity: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for layer, read in self.shares.items():
            if not 0 <= read < layer:
                raise CalibrationError(f"layer {layer} cannot read layer {read}: give it an earlier one, from 0 on.")
        object.__setattr__(self, "shares", resolved(self.shares))
        object.__setattr__(self, "pairs", tuple(tuple(pair) for pair in self.pairs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, complete or not at all."""
        described = asdict(self) | {"format": FORMAT, "shares": list(self.shares.items())}
        write_bytes(Path(path), json.dumps(described, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: no such file, damaged, or of another format.
        """
        name, again = os.fspath(path), "Make it again: kvstack_kvsharer.search(model).save(path)."
        try:
            described = json.loads(Path(path).read_bytes())
            if described.pop("format") != FORMAT:
                raise CalibrationError(f"{name!r} is not a strategy of this version of kvstack-kvsharer. {again}")
            return cls(**described | {"shares": {int(layer): int(read) for layer, read in described["shares"]}})
        except FileNotFoundError:
            raise CalibrationError(f"{name!r} does not exist. {again}") from None
        except CalibrationError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CalibrationError(f"{name!r} is damaged or not a strategy: {error!r}. {again}") from None

    def check(self, model: PreTrainedModel) -> None:
        """Raise `CalibrationError` where this was searched for another model."""
        if self.identity and not is_of(self.identity, model):
            raise CalibrationError(
                f"{self!r} was searched for another model than this {type(model).__name__}. Search one for it: "
                "kvstack_kvsharer.search(model)."
            )


def resolved(shares: Mapping[int, int]) -> dict[int, int]:
    """The same with every layer reading one that reads no other."""
    last: dict[int, int] = {}
    for layer in sorted(shares):  # what a layer reads is earlier, so it is settled by then
        last[layer] = last.get(shares[layer], shares[layer])
    return last


def what_is_wrong(share: Any, rank: Any, threshold: Any) -> str | None:
    """Return the fault of these settings, with the fix; None if you can search with them."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        return f"share={share!r} is not a part of the layers, 0 or more and below 1. Use share=0.25 for a quarter."
    if rank not in RANKS:
        return f"{rank!r} is not a way to rank pairs of layers. Use one of: {', '.join(RANKS)}."
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        return f"threshold={threshold!r} is not a cosine. Use a number from -1 to 1."
    return None


# ---- the search


def search(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None = None,
    share: float = 0.25,
    *,
    rank: str = "different",
    threshold: float = 0.5,
    seed: int = 0,
    tokens: int = TOKENS,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Strategy:
    """Find which layers of `model` can do with the keys and values of an earlier one.

    Args:
        model: any decoder-only model of transformers. Its weights are not changed.
        texts: texts to read, each up to `tokens` long. Default: 30 cuts of prose, documentation, code, numbers and chat
            that come with Python and with kvstack.
        share: the part of the full-attention layers that shall hold nothing; rounded to whole layers.
        rank: pairs in the order they are tried: `different` (default), `similar` or `random`.
        threshold: least cosine of the last hidden state with that of the dense model (default 0.5).
        seed: of the random order.
        tokens: read of each text (default 64).
        tokenizer: the model's; default the one in the folder the model was loaded from. With no tokenizer at all the
            model is searched with text that it writes itself.

    Raises:
        CalibrationError: settings that make no sense, fewer layers than `share` needs, or no text.

    Source: KVSharer, arXiv 2410.18517, section 3. Where fewer layers pass the threshold than `share` asks for, the
    strategy holds these, and a warning says so. Differs from the published code: all texts count in the averages,
    whatever their length.
    """
    if problem := what_is_wrong(share, rank, threshold):
        raise CalibrationError(f"search: {problem}")
    kinds = kinds_of(model)
    wanted = layers_of(share, len(kinds))
    if share and not wanted:
        least = 1 / max(1, len(kinds))
        raise CalibrationError(
            f"share={share} of {len(kinds)} full-attention layers of {type(model).__name__} is none. "
            f"Use share={least:.2g} or more."
        )
    settings = {"share": share, "rank": rank, "threshold": threshold, "seed": seed, "tokens": tokens}
    if not wanted:
        return Strategy({}, identity=kv_fingerprint(model), settings=settings)
    samples, source = _samples(model, texts, tokens, tokenizer)
    shares: dict[int, int] = {}
    taken: list[tuple[int, int, float, float]] = []
    with at_rest(model):
        # processes that hold heads of one model take the same pairs, or each would wait in another forward
        heads = heads_of(model)
        apart = _mean(heads.gathered(_distances(_averages(model, samples, list(kinds)), kinds)))
        dense = _last_hidden(model, samples, {})
        for layer, read in _ranked(apart, rank, seed):
            if len(shares) == wanted:
                break
            if layer in shares:
                continue
            trial = resolved(shares | {layer: read})
            cosine = heads.gathered(_cosine(_last_hidden(model, samples, trial), dense))[0]
            if cosine > threshold:
                shares = trial
                taken.append((layer, read, apart[layer, read], cosine))
    if len(shares) < wanted:
        log.warning(
            "KVSharer: only %d of %d layers of this %s share with a cosine above %s. A lower threshold allows more.",
            len(shares),
            wanted,
            type(model).__name__,
            threshold,
        )
    cosine = taken[-1][3] if taken else 1.0
    return Strategy(shares, cosine, taken, kv_fingerprint(model), settings | {"texts": source})


def layers_of(share: float, count: int) -> int:
    """Return `share` of `count` layers as a number of layers; the first layer has nothing to read."""
    return max(0, min(round(share * count), count - 1))


def _samples(
    model: PreTrainedModel,
    texts: Iterable[str] | Mapping[str, str] | None,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[list[Tensor], str]:
    """Token ids, one batch (B, T) for each length, and what they were made of."""
    if texts is None:
        windows, source = windows_of(model, None, READ, tokenizer, may_be_split=True)
        each = -(-TEXTS // len(windows))
        samples = []
        for ids, _ in windows:
            last = max(0, ids.shape[1] - tokens)
            samples += [ids[:, start : start + tokens] for start in (last * i // each for i in range(each))]
        samples = samples[:TEXTS]
    else:
        tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
        if tokenizer is None:
            raise CalibrationError(
                f"the tokenizer of this {type(model).__name__} is not known, and texts were given. Pass tokenizer=."
            )
        given = [texts] if isinstance(texts, str) else texts.values() if isinstance(texts, Mapping) else texts
        given = list(given)
        source = "sha256:" + hashlib.sha256("\0".join(given).encode()).hexdigest()[:32]
        samples = [tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :tokens] for text in given]
        samples = [ids for ids in samples if ids.numel()]
    if not samples:
        raise CalibrationError("no text to search with. Give some, or none for those that come with kvstack.")
    lengths = sorted({ids.shape[1] for ids in samples})
    batches = [torch.cat([ids for ids in samples if ids.shape[1] == length]) for length in lengths]
    return [ids.to(device_of(model)) for ids in batches], source


def _held(model: PreTrainedModel, ids: Tensor, layers: Sequence[int]) -> dict[int, KV]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model.base_model(ids, past_key_values=cache, use_cache=True)
    held: Any = cache.layers
    return {i: KV(held[i].keys, held[i].values) for i in layers}


def _averages(model: PreTrainedModel, batches: Sequence[Tensor], layers: Sequence[int]) -> dict[int, KV]:
    """Each layer's mean keys and values (1, H, T, D) over the texts; a position counts the texts that reach it."""
    longest = max(ids.shape[1] for ids in batches)
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    count = torch.zeros(longest, 1)
    for ids in batches:
        missing = longest - ids.shape[1]
        for layer, kv in _held(model, ids, layers).items():
            new = [pad(x.float().sum(0).cpu(), (0, 0, 0, missing)) for x in (kv.keys, kv.values)]
            old = sums.get(layer, (torch.zeros(()), torch.zeros(())))
            sums[layer] = old[0] + new[0], old[1] + new[1]
        count[: ids.shape[1]] += len(ids)
    return {layer: KV(keys[None] / count, values[None] / count) for layer, (keys, values) in sums.items()}


def _distances(averages: Mapping[int, KV], kinds: Mapping[int, Kind]) -> dict[tuple[int, int], float]:
    """(deeper layer, earlier layer) -> mean Euclidean distance of their keys and of their values, the mean of both."""
    apart = {}
    for earlier, deeper in combinations(averages, 2):
        if kinds[earlier] == kinds[deeper]:
            one, other = averages[earlier], averages[deeper]
            keys = (one.keys - other.keys).norm(dim=-1).mean()
            values = (one.values - other.values).norm(dim=-1).mean()
            apart[deeper, earlier] = float(keys + values) / 2
    return apart


def _mean(each: Sequence[Mapping[tuple[int, int], float]]) -> dict[tuple[int, int], float]:
    """The distances over all heads, of those over the heads of each process."""
    return {pair: sum(apart[pair] for apart in each) / len(each) for pair in each[0]}


def _ranked(apart: Mapping[tuple[int, int], float], rank: str, seed: int) -> list[tuple[int, int]]:
    if rank == "random":
        return random.Random(seed).sample(sorted(apart), len(apart))
    return sorted(apart, key=lambda pair: apart[pair], reverse=rank == "different")


@dataclass(frozen=True, repr=False)
class _Trial(Share):
    """Shares as they are given."""

    shares: Mapping[int, int]

    def bind(self, model: PreTrainedModel) -> Mapping[int, int]:
        return self.shares


def _last_hidden(model: PreTrainedModel, batches: Sequence[Tensor], shares: Mapping[int, int]) -> list[Tensor]:
    """The last hidden state of every text, (B, T * hidden size) for each batch, where layers share."""
    from kvstack import KVStack

    hidden = []
    for ids in batches:
        stack = KVStack([_Trial(shares)], model=model)
        try:
            hidden.append(model.base_model(ids, past_key_values=stack, use_cache=True).last_hidden_state)
        finally:
            stack.unbind()
    return [x.flatten(1).float() for x in hidden]


def _cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(torch.cat([cosine_similarity(a, b, dim=1) for a, b in zip(one, other, strict=True)]).mean())


# ---- which layers are alike


Kind = str
"""The kind of a layer's cache, in words: only layers of the same kind share."""


def kinds_of(model: PreTrainedModel) -> dict[int, Kind]:
    """Full-attention layer -> what it holds, and where."""
    layers = LayerGroups(model, 1)
    # keys that are rotated mean nothing to a layer whose queries are not
    plain = set(layers.full) - set(layers.rotated) if layers.rotates else set()
    return {
        i: f"{shape} on {layers.devices[i]}{', not rotated' if i in plain else ''}"
        for i, shape in cached_shapes(model).items()
    }
