"""Sealed tokens: what is left of them once they are encoded. Two classes with one face.

    LayerCodes      one layer: its keys and its values, each packed by the stack's encoder
    GroupLatents    layers that a transform stores together: latents by name, each packed by an encoder of its own

Reading asks for the layer's place in what is stored together (`layer`, 0 first), and for keys where they belong:
`where` gives the positions of the sealed tokens that the model was given, (B or 1, H or 1, T) or (B, axes, H or 1, T),
for keys that must be rotated to them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ..abilities import FitsText, Linear, ReadsDirectly, ReadsLinearly, RefitsText
from ..checks import Get, check_numbers, entries, items, misfit
from ..encode.exact import EXACT, Exact
from ..errors import UseError
from ..floats import fitting, saturated, wide
from ..packed import Packed
from ..read.codes import KernelCodes, with_raw
from ..read.latents import ByHeads, Opened, opened, reader_of
from ..read.linear import LinearReader
from ..stage import Codec, Encoder
from ..turns import Turns
from ..types import KV, Latent, Layout, Rotation
from ..workspace import Workspace
from .plan import Plan
from .tracks import Crop, Cut, Put, Track

__all__ = ["GroupLatents", "LayerCodes", "Sealed"]

Where = Callable[[], Tensor]


class Sealed(Track):
    """Sealed tokens of the layers that are stored together.

    Attributes:
        layers: indices in the model.
        tokens: how many are sealed.
        packed: latents (or keys and values) by name.
    """

    def __init__(self, plan: Plan, layers: Sequence[int]) -> None:
        self.plan, self.layers = plan, list(layers)
        self.tokens = 0
        self.packed: dict[str, Packed] = {}

    # ---- writing

    @abstractmethod
    def append(self, block: Sequence[KV], positions: Tensor, spare: bool = False, scores: Tensor | None = None) -> None:
        """Encode `block`, one `KV` (B, H, T, D) per layer, of tokens that the model was given `positions` for, (B or 1,
        H or 1, T) or (B, axes, H or 1, T). `spare`: more such blocks will come, so room is left for them. `scores`:
        (B, 1, T), how important they are, where tokens are in classes."""

    def needs(self, raw: Sequence[KV]) -> int:
        """The number of tokens that the first block must have."""
        return 0

    def _encode(self, name: str, encoder: Encoder, data: Tensor, payer: object) -> Packed:
        try:
            return encoder.encode(data, name).compact()
        except UseError as error:
            raise UseError(f"{payer!r} on layer {self.layers[0]}: {error}") from None

    def _add(self, name: str, packed: Packed, spare: bool) -> None:
        packed = packed.stored(self.plan.device)
        if name in self.packed:
            # the tokens of one head have room behind them that no reader sees
            alone = all(part.shape[0] * part.shape[1] == 1 for part in packed.parts.values())
            packed = self.packed[name].append(packed, spare=spare and (alone or self._reads_room(name, packed)))
        self.packed[name] = packed

    @abstractmethod
    def _reads_room(self, name: str, packed: Packed) -> bool:
        """Return True if the reader of a latent copes with room behind the tokens of every head."""

    # ---- reading

    @abstractmethod
    def decode(self, layer: int, keys: Tensor, values: Tensor, where: Where) -> None:
        """Write the keys and values of one layer into (B, H, T, D) tensors."""

    @abstractmethod
    def dot(self, layer: int, query: Tensor, where: Where, work: Workspace) -> Tensor:
        """`query` (B, H, G, D) times the keys: (B, H, G, T)."""

    @abstractmethod
    def mix(self, layer: int, weights: Tensor, work: Workspace) -> Tensor:
        """`weights` (B, H, G, T) times the values: (B, H, G, D)."""

    def logits(self, layer: int, query: Tensor, raw: Tensor, where: Where, work: Workspace) -> Tensor:
        """`dot`, followed by the products with `raw` keys (B, H, n, D)."""
        return with_raw(self.dot(layer, query, where, work), query, raw)

    def output(self, layer: int, weights: Tensor, raw: Tensor, work: Workspace) -> Tensor:
        """`mix`, for weights of sealed tokens and then of `raw` ones (B, H, n, D)."""
        sealed, loose = weights.tensor_split([weights.shape[-1] - raw.shape[2]], dim=-1)
        return wide(self.mix(layer, sealed, work)) + torch.matmul(loose, wide(raw).to(loose.dtype))

    def close(self) -> None:
        """Drop what was decoded for its layers."""

    def end_forward(self) -> None:
        """The forward is over."""
        self.close()

    # ---- moving

    def _share(self, packed: Packed, tokens: int) -> int:
        """The number of `tokens` sealed tokens that a latent holds, which may hold only some."""
        return tokens * packed.tokens // self.tokens

    def whole(self, tokens: int, granule: int) -> int:
        """The number of the first `tokens` that can stay sealed without those behind them."""
        return tokens // granule * granule

    def _emptied(self) -> None:
        """Codes of no tokens go with the last of them: the next ones may be of another width."""
        self.packed = {}

    def take(self, cut: Cut) -> None:
        tokens = cut.granules.shape[-1] * cut.granule
        if tokens < self.tokens:
            share = {name: self._share(packed, cut.granule) for name, packed in self.packed.items()}
            self._hold(tokens, {name: packed.take(cut.granules, share[name]) for name, packed in self.packed.items()})

    def crop(self, crop: Crop) -> None:
        if crop.whole < self.tokens:
            first = {name: packed.first(self._share(packed, crop.whole)) for name, packed in self.packed.items()}
            self._hold(crop.whole, first)

    def _hold(self, tokens: int, packed: dict[str, Packed]) -> None:
        self.tokens, self.packed = tokens, packed
        if not tokens:
            self._emptied()

    @abstractmethod
    def _empty(self) -> Self:
        """The same without tokens."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        other = self._empty()
        other.tokens = self.tokens
        other.packed = {name: packed.mapped(change) for name, packed in self.packed.items()}
        return other

    def fork(self) -> Self:
        other = self.mapped(lambda x: x)
        other.packed = dict(self.packed)  # with the room behind them, where one of the two may write
        return other

    # ---- bytes and files

    @abstractmethod
    def payer(self, packed: Packed) -> object:
        """The stage whose bytes these are."""

    def paid_parts(self) -> Iterator[tuple[object, str, Tensor]]:
        """Name and tensor of all that is held, behind the stage that pays for it."""
        for name, packed in self.packed.items():
            for part, tensor in packed.parts.items():
                yield self.payer(packed), f"{name}: {part}", tensor

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        return ((part, tensor) for _, part, tensor in self.paid_parts())

    def knows(self, name: str, packed: Packed) -> Sequence[Tensor]:
        """The facts about its channels that the encoder of a latent knows."""
        return ()

    def state(self, put: Put) -> Any:
        codes = [
            {
                "role": name,
                "parts": {part: put(x) for part, x in packed.parts.items()},
                "tokens": packed.tokens,
                "width": packed.width,
                "exact": packed.exact,
                "dtype": _name(packed.dtype),
                "channels": [put(x) for x in self.knows(name, packed)] or None,
            }
            for name, packed in self.packed.items()
        ]
        return {"codes": codes}

    def restore(self, state: Any, get: Get) -> None:
        self.tokens = get.sealed
        what = get.where("sealed tokens")
        self._restore_fitted(state["bases"], get)
        codes = items(state["codes"], what)
        if not self.tokens:
            if codes:
                raise misfit(f"{what} are none, and some are described.")
            return
        if not self.plan.seals:
            raise misfit(f"{what} are {self.tokens}, and nothing seals them here.")
        # every part is as many times as large as that of one granule that is encoded here
        like = self._sample(get)
        granule = self.plan.granule(get.layouts[0].key_width)
        for entry in codes:
            described = entries(entry, what, CODES, ("slot",))
            name = described["role"]
            if not isinstance(name, str) or name not in like or name in self.packed:
                raise misfit(f"{what} hold {name!r} twice, or where there are only {list(like)}.")
            self.packed[name] = self._restore_packed(name, described, like[name], self._granules(name, granule), get)
        if lost := like.keys() - self.packed.keys():
            raise misfit(f"{what} lack {sorted(lost)}.")
        self._check_decoded(get)

    def _granules(self, name: str, granule: int) -> int:
        """The number of sealed granules of a latent."""
        return self.tokens // granule

    def _restore_packed(self, name: str, entry: Mapping[str, Any], like: Packed, times: int, get: Get) -> Packed:
        what = get.where(name)
        facts = {"tokens": like.tokens * times, "width": like.width, "exact": like.exact, "dtype": _name(like.dtype)}
        for fact, expected in facts.items():
            if type(entry[fact]) is not type(expected) or entry[fact] != expected:
                raise misfit(f"{what}: {fact} is {entry[fact]!r}, not {expected!r}.")
        parts = {}
        for part, key in entries(entry["parts"], what, like.parts).items():
            model = like.parts[part]
            shape = (get.rows, model.shape[1], model.shape[2] * times, *model.shape[3:])
            # encoders keep scales in float32 where a half would overflow
            wider = [torch.float32] if model.dtype == torch.float16 and not self._exact(name, like) else []
            parts[part] = get(key, f"{name}: {part}", shape, model.dtype, *wider)
        packed = replace(like, parts=parts, tokens=like.tokens * times)
        self._check_channels(name, packed, entry["channels"], get)
        return packed.stored(self.plan.device)

    def _check_channels(self, name: str, packed: Packed, channels: Any, get: Get) -> None:
        """Refuse codes of other channels than there are here."""
        mine = self.knows(name, packed)
        keys = items(channels or [], f"channels of {name}")
        known = [get(key, f"channels of {name}") for key in keys] if len(keys) == len(mine) else []
        if len(keys) != len(mine) or not all(torch.equal(x, y.to(x.device)) for x, y in zip(known, mine, strict=True)):
            raise UseError(
                f"{self.payer(packed)!r} on layer {self.layers[0]}: {name!r} was encoded for other channels than it "
                "has here. Keep the calibration with the cache."
            )

    @abstractmethod
    def _sample(self, get: Get) -> dict[str, Packed]:
        """One granule of any numbers, encoded as those of `get` were."""

    @abstractmethod
    def _exact(self, name: str, packed: Packed) -> bool:
        """Return True if a latent is stored without an encoder."""

    @abstractmethod
    def _check_decoded(self, get: Get) -> None:
        """Refuse codes that are not those of ordinary keys and values."""

    def _restore_fitted(self, state: Any, get: Get) -> None:
        entries(state, get.where("what was fitted"), ())


CODES = ("role", "parts", "tokens", "width", "exact", "dtype", "channels")
"""The entries of a latent in a description."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _any_numbers(layout: Layout, rows: int, tokens: int) -> KV:
    """Keys, values and hidden states of `tokens` tokens, as a layer of this layout has them."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (layout.heads, layout.key_width, layout.key_dtype),
        (layout.heads, layout.value_width, layout.value_dtype),
        (1, layout.hidden, layout.key_dtype),
    )
    made = (
        torch.randn(rows, heads, tokens, width, generator=generator).to(layout.device, dtype)
        for heads, width, dtype in shapes
    )
    return KV(*made)


def _check_shape(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, what: str) -> None:
    if tuple(x.shape) != shape or dtype not in (None, x.dtype):
        raise misfit(f"{what} decode to {tuple(x.shape)} {_name(x.dtype)}, not to {shape} {dtype and _name(dtype)}.")
    check_numbers(x, what)


class LayerCodes(Sealed):
    """Sealed tokens of one layer."""

    def append(self, block: Sequence[KV], positions: Tensor, spare: bool = False, scores: Tensor | None = None) -> None:
        (kv,) = block
        encode = self.plan.encode
        assert encode is not None
        for name, data in (("keys", kv.keys), ("values", kv.values)):
            self._add(name, self._encode(name, encode, data, encode), spare)
        self.tokens += kv.tokens

    def _reads_room(self, name: str, packed: Packed) -> bool:
        return self.plan.encode is not None and self.plan.encode.reads_room

    def decode(self, layer: int, keys: Tensor, values: Tensor, where: Where) -> None:
        encode = self.plan.encode
        assert encode is not None
        for name, out in (("keys", keys), ("values", values)):
            encode.decode(self.packed[name].fetched(), name, out)

    def dot(self, layer: int, query: Tensor, where: Where, work: Workspace) -> Tensor:
        return self.plan.reader(query.device).dot(query, self.packed["keys"].fetched(), "keys", work)

    def mix(self, layer: int, weights: Tensor, work: Workspace) -> Tensor:
        return self.plan.reader(weights.device).mix(weights, self.packed["values"].fetched(), "values", work)

    def logits(self, layer: int, query: Tensor, raw: Tensor, where: Where, work: Workspace) -> Tensor:
        reader = self.plan.reader(query.device)
        if isinstance(reader, KernelCodes):
            return reader.dot(query, self.packed["keys"].fetched(), "keys", work, raw)
        return super().logits(layer, query, raw, where, work)

    def output(self, layer: int, weights: Tensor, raw: Tensor, work: Workspace) -> Tensor:
        reader = self.plan.reader(weights.device)
        if isinstance(reader, KernelCodes):
            return reader.mix(weights, self.packed["values"].fetched(), "values", work, raw)
        return super().output(layer, weights, raw, work)

    def payer(self, packed: Packed) -> object:
        return self.plan.encode

    def _empty(self) -> LayerCodes:
        return LayerCodes(self.plan, self.layers)

    def _sample(self, get: Get) -> dict[str, Packed]:
        (layout,), encode = get.layouts, self.plan.encode
        assert encode is not None
        kv = _any_numbers(layout, 1, self.plan.granule(layout.key_width))
        return {name: encode.encode(x, name) for name, x in (("keys", kv.keys), ("values", kv.values))}

    def _exact(self, name: str, packed: Packed) -> bool:
        return isinstance(self.plan.encode, Exact)

    def _check_decoded(self, get: Get) -> None:
        (layout,), encode = get.layouts, self.plan.encode
        assert encode is not None
        for name, width, dtype in (
            ("keys", layout.key_width, layout.key_dtype),
            ("values", layout.value_width, layout.value_dtype),
        ):
            shape = (get.rows, layout.heads, self.tokens, width)
            _check_shape(encode.decode(self.packed[name].fetched(), name), shape, dtype, get.where(name))


class GroupLatents(Sealed):
    """Sealed tokens of layers that a codec stores together.

    Args:
        codec: of this group, not fitted to a text yet.
        ropes: by slot, how each layer rotates keys, None: not at all; used where the transform wants them un-rotated.
    """

    def __init__(self, plan: Plan, layers: Sequence[int], codec: Codec, ropes: Sequence[Rotation | None]) -> None:
        super().__init__(plan, layers)
        self.codec, self.ropes = codec, ropes
        self._forget()

    def _forget(self) -> None:
        """Tensors that were fetched, decoded or opened for one forward."""
        self._fetched: dict[str, Packed] = {}
        self._decoded: dict[str, Tensor] = {}
        self._opened: dict[str, Opened] = {}
        self._readers: dict[int, LinearReader] = {}

    # ---- writing

    def needs(self, raw: Sequence[KV]) -> int:
        return self.codec.min_tokens(raw) if isinstance(self.codec, FitsText) else 0

    def append(self, block: Sequence[KV], positions: Tensor, spare: bool = False, scores: Tensor | None = None) -> None:
        if self._unrotated:
            block = [replace(kv, keys=self._unrotate(i, kv.keys, positions)) for i, kv in enumerate(block)]
        new = block[0].tokens
        for name, packed in self._packed(self._fit(block), scores).items():
            self._add(name, packed, spare)
        self.tokens += new

    def _reads_room(self, name: str, packed: Packed) -> bool:
        return self.codec.reads_room if self._exact(name, packed) else self._encoder(name).reads_room

    def _packed(self, latents: Mapping[str, Latent], scores: Tensor | None) -> dict[str, Packed]:
        made = {}
        for name, latent in latents.items():
            encoder = EXACT if latent.exact else self._encoder(name)
            packed = self._encode(name, encoder, latent.data, self._payer_of(latent.exact))
            made[name] = replace(packed, exact=latent.exact)
        return made

    def _fit(self, block: Sequence[KV]) -> Mapping[str, Latent]:
        """Latents of a block, by a codec that is fitted to the text. Where it is fitted again, the decoded tokens
        before the block are encoded again with it."""
        codec = self.codec
        if isinstance(codec, FitsText) and not self.tokens:
            self.codec = codec = codec.fit(block)
        elif isinstance(codec, RefitsText) and codec.needs_refit(block):
            self._forget()  # of before tokens were evicted
            latents = self._latents()
            old = [codec.inverse(latents, i) for i in range(len(block))]
            block = [_joined(was, new) for was, new in zip(old, block, strict=True)]
            self.codec = codec = codec.fit(block, self.tokens)
            self.packed = {}
        return codec.forward(block)

    # ---- reading

    def decode(self, layer: int, keys: Tensor, values: Tensor, where: Where) -> None:
        kv = self.codec.inverse(self._latents(), layer)
        keys.copy_(saturated(self._rotated(layer, kv.keys, where), keys.dtype))
        values.copy_(saturated(kv.values, values.dtype))

    def dot(self, layer: int, query: Tensor, where: Where, work: Workspace) -> Tensor:
        latents, codec = self._latents(), self.codec
        keys = codec.keys(latents, layer) if isinstance(codec, ReadsDirectly) else codec.inverse(latents, layer).keys
        keys = self._rotated(layer, keys, where)
        return torch.matmul(query.float(), keys.transpose(-1, -2).to(query.device, torch.float32))

    def mix(self, layer: int, weights: Tensor, work: Workspace) -> Tensor:
        latents = self._latents()
        there = weights.to(_device_of(latents))  # layers of a group may live on several devices
        if isinstance(self.codec, ReadsDirectly):
            mixed = self.codec.weigh(there, latents, layer)
        else:
            mixed = torch.matmul(there, self.codec.inverse(latents, layer).values.to(there.dtype))
        return mixed.to(weights.device)

    def logits(self, layer: int, query: Tensor, raw: Tensor, where: Where, work: Workspace) -> Tensor:
        reader = self._reader(layer, query, where, work)
        if reader is None:
            return super().logits(layer, query, raw, where, work)
        return reader.dot(query, raw)

    def output(self, layer: int, weights: Tensor, raw: Tensor, work: Workspace) -> Tensor:
        reader = self._readers.get(layer)
        return super().output(layer, weights, raw, work) if reader is None else reader.mix(weights, raw)

    def _reader(self, layer: int, query: Tensor, where: Where, work: Workspace) -> LinearReader | None:
        """Reads a layer from rough scores, where its codec lets it."""
        codec, exact = self.codec, getattr(self.codec, "exact", None)
        if not isinstance(codec, ReadsLinearly) or exact is None or query.dtype != torch.float32:
            return None
        runs = codec.linears(layer)
        if not runs or any(keys.axes.device != query.device for keys, _ in runs):
            return None
        rope = self.ropes[layer] if self._unrotated else None
        turns: Turns | None = None
        if rope is None:
            turns = Turns.none(self.tokens, query.shape[-1], query.device)
        elif (positions := where().to(query.device)).shape[-2] == 1:  # or every head holds other tokens
            turns = rope.turns(positions, query.shape[-1])
        if turns is None:
            return None
        readers = [self._reader_of(*run, turns, exact, codec.rough, work) for run in runs]
        heads = [keys.axes.shape[2] for keys, _ in runs]
        self._readers[layer] = readers[0] if len(readers) == 1 else ByHeads(readers, heads)
        return self._readers[layer]

    def _reader_of(
        self, keys: Linear, values: Linear, turns: Turns, exact: int, rough: int, work: Workspace
    ) -> LinearReader:
        """Reads a run of heads."""
        return reader_of(keys, values, (self._open(keys.latent), self._open(values.latent)), turns, exact, rough, work)

    def _open(self, name: str) -> Opened:
        """A latent, once per forward for all layers."""
        if name not in self._opened:
            self._opened[name] = opened(self._encoder(name), self._here(name), lambda: self._latents()[name])
        return self._opened[name]

    def _latents(self) -> Mapping[str, Tensor]:
        """Decoded once per forward for all layers."""
        if not self._decoded:
            self._decoded = {
                name: (EXACT if packed.exact else self._encoder(name)).decode(self._here(name), name)
                for name, packed in self.packed.items()
            }
        return self._decoded

    def _here(self, name: str) -> Packed:
        """A packed latent on the device where it is read, fetched once per forward."""
        if name not in self._fetched:
            self._fetched[name] = self.packed[name].fetched()
        return self._fetched[name]

    def _rotated(self, layer: int, keys: Tensor, where: Where) -> Tensor:
        """Rebuilt keys as attention wants them."""
        rope = self.ropes[layer]
        if not self._unrotated or rope is None:
            return keys
        positions = where().to(keys.device)
        keys = keys.float() if keys.dtype == torch.float16 else keys  # turned, they may be too large for a half
        rope.remember(positions)
        return rope.rotate(keys, positions)

    def _unrotate(self, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
        rope, positions = self.ropes[layer], positions.to(keys.device)
        if rope is None:
            return keys
        if keys.dtype == torch.float16:
            return fitting(rope.unrotate(keys.float(), positions), keys.dtype)
        return rope.unrotate(keys, positions)

    def close(self) -> None:
        self._forget()

    def end_forward(self) -> None:
        super().end_forward()
        if self._unrotated:
            for rope in self.ropes:
                if rope is not None:
                    rope.forget()

    @property
    def _unrotated(self) -> bool:
        assert self.plan.transform is not None
        return self.plan.transform.unrotated

    def _encoder(self, name: str) -> Encoder:
        encoder = self.codec.encoders.get(name, self.plan.encode)
        assert encoder is not None
        return encoder

    # ---- moving

    def _hold(self, tokens: int, packed: dict[str, Packed]) -> None:
        super()._hold(tokens, packed)
        self._forget()

    def _emptied(self) -> None:
        super()._emptied()
        if isinstance(self.codec, FitsText):
            self.codec = self.codec.with_fitted({})

    def _empty(self) -> GroupLatents:
        return GroupLatents(self.plan, self.layers, self.codec, self.ropes)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> GroupLatents:
        other = super().mapped(change)
        if isinstance(self.codec, FitsText) and self.codec.fitted:
            other.codec = self.codec.with_fitted({name: change(x) for name, x in self.codec.fitted.items()})
        return other

    # ---- bytes and files

    @property
    def _payer(self) -> object:
        assert self.plan.transform is not None
        return self.plan.transform.stage

    def payer(self, packed: Packed) -> object:
        return self._payer_of(packed.exact)

    def _payer_of(self, exact: bool) -> object:
        # without an encoder of the user's, what the transform made is stored
        return self.plan.encode if self.plan.own_encoder and not exact else self._payer

    @property
    def fitted(self) -> Mapping[str, Tensor]:
        """Tensors that were fitted to the text."""
        return self.codec.fitted if isinstance(self.codec, FitsText) else {}

    def paid_parts(self) -> Iterator[tuple[object, str, Tensor]]:
        yield from super().paid_parts()
        for x in self.fitted.values():
            yield self._payer, "bases", x

    def knows(self, name: str, packed: Packed) -> Sequence[Tensor]:
        return () if packed.exact else self._encoder(name).tensors

    def state(self, put: Put) -> Any:
        return super().state(put) | {"bases": {name: put(x) for name, x in self.fitted.items()}}

    def _restore_fitted(self, state: Any, get: Get) -> None:
        what = get.where("what was fitted to the text")
        names = entries(state, what, state if isinstance(self.codec, FitsText) else ())
        if not isinstance(self.codec, FitsText):
            return
        if bool(names) != bool(self.tokens):
            raise misfit(f"{what} are {len(names)} tensors for {self.tokens} tokens.")
        if names:
            fitted = {name: get(key, f"{name!r}, fitted to the text,") for name, key in names.items()}
            if any(x.shape[:1] != (get.rows,) for x in fitted.values()):
                raise misfit(f"{what} is not of {get.rows} rows.")
            self.codec = self.codec.with_fitted(fitted)
            self.codec.check_fitted([_any_numbers(layout, get.rows, 1) for layout in get.layouts])

    def _sample(self, get: Get) -> dict[str, Packed]:
        return self._packed(self._latents_of_sample(get), None)

    def _latents_of_sample(self, get: Get) -> Mapping[str, Latent]:
        """Those of one granule of any numbers."""
        granule = self.plan.granule(get.layouts[0].key_width)
        return self.codec.forward([_any_numbers(layout, get.rows, granule) for layout in get.layouts])

    def _exact(self, name: str, packed: Packed) -> bool:
        return packed.exact or isinstance(self._encoder(name), Exact)

    def _check_decoded(self, get: Get) -> None:
        latents = self._latents()
        for name, x in latents.items():
            check_numbers(x, get.where(name))
        self.codec.check_latents(latents)
        for place, layout in enumerate(get.layouts):
            kv = self.codec.inverse(latents, place)
            for what, x, width in (("keys", kv.keys, layout.key_width), ("values", kv.values, layout.value_width)):
                _check_shape(x, (get.rows, layout.heads, self.tokens, width), None, get.part(place, 1).where(what))
        self._forget()


def _device_of(latents: Mapping[str, Tensor]) -> torch.device:
    return next(iter(latents.values())).device


def _joined(old: KV, new: KV) -> KV:
    """Decoded tokens, followed by new ones; they are where the new ones are."""
    keys = torch.cat([old.keys.to(new.keys), new.keys], dim=2)
    return KV(keys, torch.cat([old.values.to(new.values), new.values], dim=2))
