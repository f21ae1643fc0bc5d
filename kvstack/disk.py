"""A cache on disk: one safetensors file with what is held, and the settings, lengths and fingerprints to go on with it.

Nothing is decoded: what is packed stays packed, so the file is about as large as the cache. With `compress`
the bytes of each tensor are deflated where that makes them fewer; "deflated" in the description has its type and shape.

    description    stack, model, dtype, batch, columns, shapes, scaling, direct, shares
                   heads: which process of how many, where they share a model
                   ids: a hash of the ids of each row (text_hash.py)
                   cohorts: rows, seen, columns, given (positions, where not the tokens' indices), stores: one entry
                   per track of the store, "sealed" by (slot, role)
                   others:  layers that transformers caches
    tensors        by number; the description holds the numbers in their place
"""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .attend import Learned
from .batch import Batch, Cohort
from .binding import Binding
from .checks import Get, Misfit, Tensors, count, entries, items, misfit, pairs
from .columns import Columns
from .errors import KVStackError, UseError
from .files import DTYPES, MOST_NUMBERS, parsed_json, read_tensors, write_tensors
from .heads import Heads
from .model.adapters import unwrapped
from .model.attention import expands, gives_queries
from .model.fingerprint import is_of, kv_fingerprint
from .model.probing import cached_layers
from .other_layers import describe_layer, fill_layer
from .store.store import Store
from .text_hash import TextHash
from .types import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Saved", "Writer", "load", "own_file", "write"]

FORMAT = "kvstack cache 1"


class Writer:
    """Collects tensors under short names; a description holds the names in their place."""

    def __init__(self, compress: bool = False) -> None:
        self.compress = compress
        self.tensors: dict[str, Tensor] = {}
        self.deflated: dict[str, tuple[str, list[int]]] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def put(self, x: Tensor | None) -> str | None:
        if x is None:
            return None
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device)  # what several share is written once
        if key not in self._known or not x.numel():
            name = self._known[key] = str(len(self.tensors))
            whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
            self.tensors[name] = x.contiguous() if whole else x.clone(memory_format=torch.contiguous_format)
            if self.compress:
                self._deflate(name)
        return self._known[key]

    def _deflate(self, name: str) -> None:
        x = self.tensors[name]
        plain = x.cpu().flatten().view(torch.uint8).numpy()
        smaller = zlib.compress(plain.data, 9)
        if len(smaller) < plain.nbytes:
            self.tensors[name] = torch.frombuffer(bytearray(smaller), dtype=torch.uint8)
            self.deflated[name] = str(x.dtype).removeprefix("torch."), list(x.shape)


def write(
    path: str | os.PathLike[str],
    stack: Mapping[str, Any],
    batch: Batch,
    learned: Learned,
    others: Sequence[Any],
    compress: bool = False,
) -> None:
    """Write a batch whose forwards are all settled; `stack` is the dict that builds the stack again."""
    writer, binding = Writer(compress), batch.binding
    assert binding.model is not None
    described = {
        "stack": stack,
        "model": kv_fingerprint(binding.model),
        "dtype": str(binding.model.dtype),
        "batch": batch.size,
        "columns": list(batch.columns.items()),
        "shapes": [[layer, *shape] for layer, shape in batch.shapes.items()],
        "scaling": list(learned.scaling.items()),
        "direct": sorted(learned.direct),
        "shares": list(binding.shares.items()),
        **_part_of(binding.plan.heads),
        "ids": batch.ids.all_read,
        "cohorts": [
            {
                "rows": None if cohort.rows is None else cohort.rows.tolist(),
                "seen": cohort.seen,
                "columns": cohort.columns.runs,
                "given": writer.put(cohort.given.told),
                "stores": [
                    _describe_store(piece, writer) | ({} if heads is None else {"heads": list(heads)})
                    for store in cohort.stores
                    for heads, piece in store.pieces
                ],
            }
            for cohort in batch.cohorts
        ],
        "others": [describe_layer(layer, writer.put) for layer in others],
    }
    described["deflated"] = writer.deflated
    write_tensors(Path(path), writer.tensors, {"format": FORMAT, "cache": json.dumps(described)})


def _describe_store(store: Store, writer: Writer) -> dict[str, Any]:
    """The state of all tracks; sealed tokens in one list, each entry with its slot."""
    state: dict[str, Any] = store.state(writer.put)
    parts, size = state.pop("sealed"), store.plan.stored_together
    (state["kept"],) = state.pop("kept")
    return state | {
        "sealed": [{"slot": i * size} | entry for i, part in enumerate(parts) for entry in part["codes"]],
        "sealed_tokens": store.sealed_tokens,
        "bases": [part["bases"] for part in parts if "bases" in part],
        "fitted": _fitted(store),
    }


def _part_of(heads: Heads) -> dict[str, list[int]]:
    """Return the entry of a file that holds the heads of one process among several."""
    return {"heads": [heads.rank, heads.size]} if heads.size > 1 else {}


def own_file(path: str | os.PathLike[str], heads: Heads) -> str | os.PathLike[str]:
    """The file of this process: all of those that share a model are told the same path, and hold different heads."""
    if heads.size == 1:
        return path
    path = Path(path)
    return path.with_name(f"{path.stem}-{heads.rank}-of-{heads.size}{path.suffix}")


def _fitted(store: Store) -> list[str]:
    """Return the fingerprints of the axes that the transform was fitted to: latents mean nothing on other axes."""
    return [codec.fingerprint for codec in store.codecs]


@dataclass(frozen=True)
class Saved:
    """A file that was read. Its description has the right keys; what they hold is checked when a stack is filled.

    Attributes:
        name: the file, as messages name it.
        described: its description.
        tensors: by the names in it.
    """

    name: str
    described: Mapping[str, Any]
    tensors: Tensors

    def check(self, model: PreTrainedModel) -> None:
        """Refuse another model before anything is fitted to it."""
        kind, described = type(unwrapped(model)).__name__, self.described
        if not is_of(described["model"], model):
            raise UseError(
                f"{self.name!r} was saved with another model than this {kind}, or another adapter. Load it with that."
            )
        if described["dtype"] != str(model.dtype):
            raise UseError(
                f"{self.name!r} was saved with a model in {described['dtype']}, and this one is in {model.dtype}."
            )

    def check_part(self, heads: Heads) -> None:
        """Refuse a file of other heads than those of this process."""
        if self.described.get("heads") != _part_of(heads).get("heads"):
            raise UseError(
                f"{self.name!r} does not hold the heads of process {heads.rank} of {heads.size}. Load the model in as "
                "many processes as it was in, and let each of them load what it saved."
            )

    @contextmanager
    def named(self, label: str) -> Iterator[None]:
        """Let every error name this file, and the stack `label` that it does not fit."""
        try:
            yield
        except Misfit as error:
            raise UseError(f"{self.name!r} does not fit {label}: {error} Save it again.") from error
        except KVStackError as error:
            raise UseError(f"{self.name!r} does not fit {label}: {error}") from error
        except torch.OutOfMemoryError:
            raise
        except UNEXPECTED as error:  # of a plugin's codec or score, which got numbers that it never makes
            raise UseError(f"{self.name!r} does not fit {label}: {error!r}. Save it again.") from error

    def stack(self, build: Callable[[Mapping[str, Any]], S]) -> S:
        """The stack that is described, still empty."""
        with self.named("this model, or what is installed here"):
            settings = self.described["stack"]
            return build(settings if isinstance(settings, dict) else entries(settings, "the stack", ()))

    def fill(self, label: str, batch: Batch, learned: Learned, others: Sequence[Any]) -> None:
        """Fill the empty batch of the stack `label`, and the layers that transformers caches."""
        with self.named(label):
            binding = batch.binding
            assert binding.model is not None
            # the model tells what a token takes, not the file
            layers = cached_layers(binding.model)
            layouts = {layer: _layout(binding, layer, layers[layer]) for group in binding.groups for layer in group}
            self._fill_batch(batch)
            self._fill_learned(learned, binding)
            self._check_shapes(batch, layouts)
            rows, seen = batch.size, max(batch.columns.values(), default=None)
            batch.ids = self._ids(rows or 0, seen or 0)
            batch.cohorts = self._cohorts(binding, layouts, rows, seen)
            models = [
                _state_of(layer) if i in binding.places else layer
                for i, layer in enumerate(layers)
                if not binding.is_ours_alone(i)
            ]
            held = items(self.described["others"], "the list of other layers", len(others))
            for other, model, state in zip(others, models, held, strict=True):
                fill_layer(other, model, state, self.tensors, rows, seen)

    def _fill_batch(self, batch: Batch) -> None:
        described, binding = self.described, batch.binding
        if pairs(described.get("shares", []), "the list of layers that read others") != dict(binding.shares):
            raise UseError(
                "it was saved where other layers shared keys and values than they do here. Keep the settings of the "
                "stack next to the cache."
            )
        fed = pairs(described["columns"], "the list of tokens fed to each layer")
        columns = {layer: count(tokens, f"the number of tokens fed to layer {layer}") for layer, tokens in fed.items()}
        if columns.keys() != batch.columns.keys() or len(set(columns.values())) > 1:
            raise misfit(f"tokens are counted for layers {list(columns)}, or not equally many in each.")
        batch.columns = columns
        batch.size = None if described["batch"] is None else count(described["batch"], "the number of rows", 1)

    def _ids(self, rows: int, columns: int) -> TextHash:
        sums = self.described.get("ids")
        if sums is None:
            return TextHash(columns, known=not columns)
        for x in items(sums, "the list of hashes of its rows", rows):
            if type(x) is not int or not -(2**63) <= x < 2**63:
                raise misfit(f"{x!r} is not the hash of a text.")
        return TextHash(columns, torch.tensor(sums)[:, None])

    def _check_shapes(self, batch: Batch, layouts: Mapping[int, Layout]) -> None:
        """Take over what a dense cache would hold, which the model tells as well."""
        shapes = pairs(self.described["shapes"], "the list of shapes", 2)
        shares = batch.binding.shares
        expected = {}
        for layer in batch.columns if batch.size is not None else ():
            layout = layouts[shares.get(layer, layer)]
            expected[layer] = [layout.numbers, layout.key_dtype.itemsize]
        if shapes != expected:
            raise misfit(
                f"a token takes {shapes} numbers and bytes of each, and with this model it takes {expected}. A cache "
                "that was made under autocast is loaded under autocast."
            )
        batch.shapes = {layer: (numbers, size) for layer, (numbers, size) in expected.items()}

    def _fill_learned(self, learned: Learned, binding: Binding) -> None:
        scaling = pairs(self.described["scaling"], "the list of scalings")
        for layer, factor in scaling.items():
            known = layer in binding.places and type(factor) in (int, float)
            if not known or not 0 < abs(factor) <= MOST_SCALING:
                raise misfit(f"the scaling of layer {layer} is {factor!r}.")
        direct = items(self.described["direct"], "the list of layers that attend to what they cache")
        for layer in direct:
            module = binding.modules.get(layer) if type(layer) is int and layer in binding.places else None
            if module is None or not gives_queries(module) or expands(module):
                raise misfit(f"layer {layer!r} does not attend to what it caches.")
        learned.scaling, learned.direct = {i: float(factor) for i, factor in scaling.items()}, set(direct)

    # ---- rows

    def _cohorts(
        self, binding: Binding, layouts: Mapping[int, Layout], rows: int | None, columns: int | None
    ) -> list[Cohort]:
        described = [
            entries(entry, "a cohort", COHORT, ["columns", "given"])
            for entry in items(self.described["cohorts"], "the list of cohorts")
        ]
        numbers = [each["rows"] for each in described]
        if numbers != [None]:
            every = [row for mine in numbers for row in items(mine, "the rows of a cohort")]
            counts = all(type(row) is int for row in every) and [] not in numbers and len(every) == rows
            if not counts or sorted(every) != list(range(len(every))):
                raise misfit(f"the rows of the cohorts, {numbers}, do not part {rows} rows.")
        cohorts = []
        for entry in described:
            mine = None if entry["rows"] is None else torch.tensor(entry["rows"])
            most = columns if rows is not None else 0
            seen = count(entry["seen"], "the number of tokens seen", 0, most)
            cohort = Cohort(mine, binding.stores(), seen, _columns(entry.get("columns"), seen, most or 0))
            if entry.get("given") is not None:
                cohort.given.restore(self._given(entry["given"], (rows or 0) if mine is None else len(mine), seen))
            pieces = [piece for store in cohort.stores for piece in store.pieces]
            states = items(entry["stores"], "the list of groups of layers", len(pieces))
            for (heads, store), state in zip(pieces, states, strict=True):
                whole = [layouts[layer] for layer in store.layers]
                get = Get(
                    self.tensors.read,
                    store.layers,
                    whole if heads is None else [replace(layout, heads=len(heads)) for layout in whole],
                    rows=(rows or 0) if mine is None else len(mine),
                    seen=seen,
                    sealed=0,
                )
                _fill_store(store, state, get, heads)
            held = {store.held for store in cohort.pieces}
            if len(held) > 1 and binding.plan.budgets is None:
                raise misfit(f"its layers hold {sorted(held)} tokens.")
            cohorts.append(cohort)
        return cohorts

    def _given(self, name: Any, rows: int, seen: int) -> Tensor:
        """The positions that the model was given for the tokens of a cohort."""
        return self.tensors.read(
            name, (rows, None, seen), [torch.int32], torch.device("cpu"), "the positions that its tokens were given"
        )


S = TypeVar("S")
COHORT = ("rows", "seen", "stores")
"""Entries of a cohort."""
NEEDED = ("stack", "model", "dtype", "batch", "columns", "shapes", "scaling", "direct", "cohorts", "others")
LATER = ("shares", "deflated", "heads", "ids")
"""Entries of a cache; files of the first versions have none of `LATER`."""
STORE = ("sealed_tokens", "fitted")
"""Entries of a store next to its tracks; files of the first versions have none of `bases`."""
MOST_SCALING = 1e6
UNEXPECTED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _state_of(layer: Any) -> Any:
    """A hybrid layer without its keys and values, which are ours."""
    from transformers.cache_utils import DynamicLayer

    state = copy.copy(layer)
    vars(state).update(vars(DynamicLayer()))
    return state


def _columns(described: Any, seen: int, most: int) -> Columns:
    """Return the columns of the `seen` tokens of a cohort, among `most` columns. Files of the first version say nothing
    of it: they knew only padding on the left."""
    if described is None:
        return Columns(((0, most - seen),) if seen else ())
    runs: list[tuple[int, int]] = []
    token = column = 0
    for run in items(described, "the runs of a cohort"):
        first, at = (count(x, "a run of a cohort") for x in items(run, "a run of a cohort", 2))
        if runs:
            column = runs[-1][1] + first - runs[-1][0]  # where the tokens before it end
        if first < token or first >= seen or at < column or (runs and at == column) or (not runs and first):
            raise misfit(f"the runs of a cohort, {described}, are not those of {seen} tokens.")
        runs.append((first, at))
        token = first + 1
    if bool(runs) != bool(seen) or (runs and runs[-1][1] + seen - runs[-1][0] > most):
        raise misfit(f"the runs of a cohort, {described}, are not those of {seen} tokens in {most} columns.")
    return Columns(tuple(runs))


def _layout(binding: Binding, layer: int, held: Any) -> Layout:
    """Return the layout of the model's cache in a layer, for one token; transformers' own cache has `held` a token."""
    keys, values, module = held.keys, held.values, binding.modules[layer]
    assert binding.model is not None
    return Layout(
        keys.shape[1],
        int(getattr(module, "num_key_value_groups", 0)),
        keys.shape[3],
        values.shape[3],
        keys.dtype,
        values.dtype,
        binding.model.config.get_text_config(decoder=True).hidden_size,
        binding.device_of(layer),
    )


def _fill_store(store: Store, state: Any, get: Get, heads: Sequence[int] | None) -> None:
    stage = store.plan.transform.stage if store.plan.transform else None
    described = entries(state, get.where("what is held"), [*STORE, *store.names], ["bases", "heads"])
    if described.get("heads") != (None if heads is None else list(heads)):
        raise UseError(
            f"the heads of layer {store.layers[0]} had other budgets than {store.plan.select!r} gives them here. Keep "
            "the calibration with the cache: the folder of calibrations that kvstack logs."
        )
    if described["fitted"] != _fitted(store):
        raise UseError(
            f"it was saved with another calibration than {stage!r} has here, or by a version that gives channels other "
            f"bits: read the text again. Keep the calibration with the cache: {type(stage).__name__}(calibration=PATH)."
        )
    sealed = count(described["sealed_tokens"], get.where("the number of sealed tokens"), 0, get.seen)
    # sealed tokens are one list, each entry with its slot
    size = store.plan.stored_together
    bases = items(described.get("bases") or [{}] * len(store.codecs), get.where("bases"), len(store.codecs))
    parts: list[dict[str, Any]] = [{"codes": [], "bases": bases[i] if bases else {}} for i in range(len(store.sealed))]
    for entry in items(described["sealed"], get.where("sealed tokens")):
        slot = entry.get("slot") if isinstance(entry, dict) else None
        if type(slot) is not int or slot % size or not 0 <= slot // size < len(parts):
            raise misfit(f"{get.where('sealed tokens')} are not at one of {len(parts)} places.")
        parts[slot // size]["codes"].append(entry)
    store.restore({**described, "sealed": parts, "kept": [described["kept"]]}, replace(get, sealed=sealed))


def load(path: str | os.PathLike[str]) -> Saved:
    """Read a file that `write` wrote.

    Raises:
        UseError: no such file, damaged, or of another version.
    """
    again, name = "Save it again.", os.fspath(path)
    metadata, tensors = read_tensors(Path(path), UseError, "cache", again)
    if metadata.get("format") != FORMAT:
        raise UseError(f"{name!r} is not a cache of this version of kvstack. {again}")
    try:
        described = entries(parsed_json(metadata.get("cache", "")), "its description", NEEDED, LATER)
        return Saved(name, described, Tensors(tensors, dict(_deflated(described.get("deflated", {}), tensors))))
    except ValueError as error:
        own = isinstance(error, KVStackError) and not isinstance(error, Misfit)  # it says what to do
        raise UseError(f"{name!r} cannot be read as a cache: {error}{'' if own else f' {again}'}") from None


def _deflated(described: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[torch.dtype, list[int]]]]:
    """Type and shape of the tensors that are deflated."""
    for name, entry in entries(described, "the list of deflated tensors", described).items():
        dtype, shape = items(entry, f"what is said of the tensor {name}", 2)
        plain = tensors.get(name)
        if plain is None or plain.dtype != torch.uint8 or plain.dim() != 1 or not isinstance(dtype, str):
            raise misfit(f"the tensor {name} is not deflated.")
        sizes = [count(n, "the length of a tensor", 1, MOST_NUMBERS) for n in items(shape, "the shape of a tensor")]
        if dtype not in TYPES or math.prod(sizes) > DEFLATED * plain.numel():
            raise misfit(f"the tensor {name} is deflated, and declares {shape} numbers of {dtype}.")
        yield name, (TYPES[dtype], sizes)


TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
DEFLATED = 1100
"""Deflate makes a byte at most of this many."""
