"""What the benchmarks share: the run's settings, the model, the caches to compare, and how results are written."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.cache_utils import CacheLayerMixin

from .. import KVStack, __version__, models, registry
from ..errors import KVStackError, SpecError
from ..packed import storage_bytes
from ..store import RAW
from .texts import documentation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DENSE",
    "Run",
    "Subject",
    "Variant",
    "chosen",
    "console",
    "held_bytes",
    "mib",
    "opened",
    "prefill",
    "progress",
    "rotated",
    "share_of_bfloat16",
    "step",
    "table",
    "variants",
    "write",
]

T = TypeVar("T")
DENSE = "dense"
"""Label of transformers' DynamicCache, which all else is compared with."""
# hqq's 3 bits cannot be read back from tensors with four axes
PEER = re.compile(r"hqq:(?P<bits>[248])(?:,group=(?P<group>\d+))?")


@dataclass(frozen=True)
class Run:
    """What every benchmark is told."""

    contexts: tuple[int, ...]
    stacks: tuple[str, ...]
    model: str | None = None
    dtype: str = "float32"
    threads: int = 2
    seed: int = 0
    tiny: bool = False
    json: Path | None = None


# ---- the model


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def tokens(self, length: int, seed: int) -> Tensor:
        """(1, length) tokens of Python's documentation, or random ones where there is no tokenizer."""
        return self.encode(documentation(), length) if self.tokenizer else self.random(length, seed)

    def encode(self, text: str, length: int) -> Tensor:
        """The first `length` tokens of `text`, (1, length)."""
        assert self.tokenizer is not None
        # no tokenizer makes more than some 12 characters of ordinary text into one token
        ids: Tensor = self.tokenizer(text[: 12 * length], return_tensors="pt")["input_ids"]
        if ids.shape[1] < length:
            raise KVStackError(f"a text has {ids.shape[1]:,} tokens and {length:,} are needed. Use a longer one.")
        return ids[:, :length]

    def random(self, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.model.config.vocab_size, (1, length), generator=generator)


@contextmanager
def opened(run: Run) -> Iterator[Subject]:
    """The run's model, with the run's number of threads and without gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        with torch.no_grad():
            yield _tiny(run) if run.tiny else _loaded(run)
    finally:
        torch.set_num_threads(threads)


def _loaded(run: Run) -> Subject:
    with progress("loading the model"):
        model, tokenizer = models.load(run.model, dtype=getattr(torch, run.dtype))
    return Subject(run.model or models.DEFAULT_MODEL, model, tokenizer)


def _tiny(run: Run) -> Subject:
    """A random llama of a few thousand weights, so that a benchmark itself can be tested."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # with the default 0.02 a random model is nearly indifferent to its cache
    )
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        model = LlamaForCausalLM(config).eval().to(getattr(torch, run.dtype))
    return Subject("tiny random llama", model, None)


# ---- the caches


@dataclass(frozen=True)
class Variant:
    """A cache under test: its label and what makes an empty one for a model."""

    label: str
    make: Callable[[PreTrainedModel], Cache]
    peer: bool = False
    """Whether it is transformers' quantized cache."""


def variants(specs: Sequence[str]) -> list[Variant]:
    """The dense cache, then one variant per spec.

    dense              transformers' DynamicCache
    empty              a stack without stages
    hqq:4  hqq:2,group=32    transformers' QuantizedCache, hqq backend, axis 1, 64 numbers a group unless said
    quant:2+evict:0.2  a stack, as everywhere
    quant:4@fused=False      a stack with other settings than its stages
    """
    return [_variant(spec.strip()) for spec in dict.fromkeys((DENSE, *specs))]


def chosen(run: Run) -> list[Variant]:
    """The run's variants, less those whose package is not installed, which is said."""
    found = variants(run.stacks)
    if importlib.util.find_spec("hqq") is None:
        for variant in found:
            if variant.peer:
                console().print(f"{variant.label}: skipped, the package hqq is not installed.", highlight=False)
        found = [variant for variant in found if not variant.peer]
    return found


def _variant(spec: str) -> Variant:
    if spec == DENSE:
        return Variant(spec, lambda model: DynamicCache(config=model.config))
    if peer := PEER.fullmatch(spec):
        return _hqq(spec, int(peer["bits"]), int(peer["group"] or 64))
    if spec.startswith("hqq"):
        raise SpecError(f"{spec!r}: the bits of transformers' QuantizedCache are 2, 4 or 8, as in 'hqq:4,group=32'.")
    stages_spec, _, settings_spec = spec.partition("@")
    stages, settings = registry.parse("" if stages_spec == "empty" else stages_spec)
    settings |= _settings(settings_spec, spec)
    try:
        KVStack(stages, **settings)  # says now what cannot work, not after the first minutes
    except TypeError as error:
        raise SpecError(f"{spec!r}: {error}.") from None
    return Variant(spec, lambda model: KVStack(stages, model=model, **settings))


def _hqq(label: str, bits: int, group: int) -> Variant:
    # axis 0 takes its groups across the whole text, so its error grows with every flush
    axes = {"axis_key": 1, "axis_value": 1}

    def make(model: PreTrainedModel) -> Cache:
        return QuantizedCache("hqq", model.config, nbits=bits, q_group_size=group, residual_length=128, **axes)

    return Variant(label, make, peer=True)


def _settings(text: str, spec: str) -> dict[str, Any]:
    settings = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            settings[name.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            raise SpecError(f"{spec!r}: {pair!r} is no setting. Write it as 'quant:4@fused=False'.") from None
    return settings


def held_bytes(cache: Cache) -> int:
    """Bytes of the storages of all tensors a cache holds, scales and zeros included."""
    return cache.nbytes if isinstance(cache, KVStack) else storage_bytes(_tensors_in(cache.layers))


def share_of_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes held, as a share of what a dense bfloat16 cache of the same tokens holds.

    Numbers a cache holds as the model made them (raw tokens, unquantized latents, a dense cache's all) count two
    bytes each, also where the model runs in float32; everything else counts what it is.
    """
    if isinstance(cache, KVStack):
        parts = cache._parts()
        raw = [x for payer, part, x in parts if payer == RAW[0] or part in PLAIN or part.endswith(": data")]
        wide = [x for x in raw if x.dtype == model.dtype]
        narrow = storage_bytes([x for *_, x in parts]) - storage_bytes(wide)
        size = model.dtype.itemsize
        return (narrow + storage_bytes(wide) * 2 / size) / (cache.dense_nbytes * 2 / size)
    tensors = _tensors_in(cache.layers)
    wide = [x for x in tensors if x.dtype == model.dtype]
    held = storage_bytes(tensors) - storage_bytes(wide) + storage_bytes(wide) * 2 / model.dtype.itemsize
    return held / _dense_bfloat16(cache, model)


PLAIN = ("recent queries", "uncompressed layers")


def _dense_bfloat16(cache: Cache, model: PreTrainedModel) -> float:
    """Bytes of a dense cache of the same tokens: that of a DynamicCache, worked out from one layer's shape."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return float(cache.get_seq_length() * len(cache.layers) * heads * width * 2 * 2)


def _tensors_in(thing: object) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, CacheLayerMixin):
        thing = vars(thing)
    if isinstance(thing, Mapping):
        thing = list(thing.values())
    return [x for part in thing for x in _tensors_in(part)] if isinstance(thing, list | tuple) else []


# ---- running


def prefill(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Feed `ids` (1, T); the next token, (1, 1)."""
    # logits of all tokens would cost more memory than most caches
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def step(model: PreTrainedModel, token: Tensor, cache: Cache) -> Tensor:
    """Decode greedily: the token after `token` (1, 1)."""
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def rotated(items: Sequence[T], by: int) -> list[T]:
    """`items` from number `by` on, then the others: in each round another one goes first."""
    start = by % len(items)
    return [*items[start:], *items[:start]]


# ---- results


def console() -> Console:
    # 80 columns, rich's guess for a file or a pipe, would break the tables
    return Console(width=None if sys.stdout.isatty() else 130)


@contextmanager
def progress(doing: str) -> Iterator[None]:
    """Says on stderr what takes so long."""
    with Console(stderr=True).status(doing):
        yield


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table whose first column is text and whose others are numbers."""
    made = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*row)
    console().print(made)


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.2f}"


def write(bench: str, run: Run, subject: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append one JSON line per row to the run's file, each with all that is needed to repeat it."""
    if run.json is None:
        return
    where = environment(run, subject)
    with run.json.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"bench": bench, **row, **where}) + "\n")


def environment(run: Run, subject: str) -> dict[str, Any]:
    return {
        "model": subject,
        "dtype": run.dtype,
        "threads": run.threads,
        "seed": run.seed,
        "hardware": hardware(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvstack": __version__,
    }


def hardware() -> str:
    """Processor, its cores, and the system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        name = found[1]
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
