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

from ..abilities import FitsText, Picked, ReadsDirectly, RefitsText
from ..encode.exact import EXACT
from ..errors import UseError
from ..packed import Packed
from ..stage import Codec, Encoder
from ..types import KV, Rotation
from ..workspace import Workspace
from .plan import Plan
from .tracks import Crop, Cut, Get, Put, Track, rows_of

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
    def append(self, block: Sequence[KV], positions: Tensor) -> None:
        """Encode `block`, one `KV` (B, H, T, D) per layer, of tokens that the model was
        given `positions` for, (B or 1, H or 1, T) or (B, axes, H or 1, T)."""

    def needs(self, raw: Sequence[KV]) -> int:
        """How many tokens the first block must have."""
        return 0

    def _encode(self, name: str, encoder: Encoder, data: Tensor, payer: object) -> Packed:
        try:
            return encoder.encode(data, name)
        except UseError as error:
            raise UseError(f"{payer!r} on layer {self.layers[0]}: {error}") from None

    def _add(self, name: str, packed: Packed) -> None:
        self.packed[name] = self.packed[name].append(packed) if name in self.packed else packed

    # ---- reading

    @abstractmethod
    def decode(self, layer: int, keys: Tensor, values: Tensor, where: Where) -> None:
        """Write the keys and values of one layer into (B, H, T, D) tensors."""

    def pick(self, layer: int, query: Tensor, where: Where) -> Picked | None:
        """What a scaled query (B, H, G, D) is answered from, where that is not all of the sealed tokens."""
        return None

    @abstractmethod
    def dot(self, layer: int, query: Tensor, picked: Picked | None, where: Where, work: Workspace) -> Tensor:
        """`query` (B, H, G, D) times the keys: (B, H, G, T), or the picked ones."""

    @abstractmethod
    def mix(self, layer: int, weights: Tensor, picked: Picked | None, work: Workspace) -> Tensor:
        """`weights` (B, H, G, T), or those of the picked ones, times the values: (B, H, G, D)."""

    def end_forward(self) -> None:
        """Drop what was decoded for all layers."""

    # ---- moving

    def _share(self, packed: Packed, tokens: int) -> int:
        """How many of `tokens` sealed tokens a latent holds that may hold only some."""
        return tokens * packed.tokens // self.tokens

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

    def rows(self, index: Tensor) -> Self:
        other = self._empty()
        other.tokens = self.tokens
        other.packed = {name: packed.rows(index) for name, packed in self.packed.items()}
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
        """What the encoder of a latent knows of its channels."""
        return ()

    def state(self, put: Put) -> Any:
        codes = [
            {
                "role": name,
                "parts": {part: put(x) for part, x in packed.parts.items()},
                "tokens": packed.tokens,
                "width": packed.width,
                "exact": packed.exact,
                "dtype": str(packed.dtype).removeprefix("torch."),
                "channels": [put(x) for x in self.knows(name, packed)] or None,
            }
            for name, packed in self.packed.items()
        ]
        return {"codes": codes}

    def restore(self, state: Any, get: Get) -> None:
        for entry in state["codes"]:
            packed = Packed(
                {name: x for name, key in entry["parts"].items() if (x := get(key)) is not None},
                tokens=entry["tokens"],
                width=entry["width"],
                exact=entry["exact"],
                dtype=getattr(torch, entry["dtype"]),
            )
            known = [get(key) for key in entry["channels"] or ()]
            mine = self.knows(entry["role"], packed)
            same = len(known) == len(mine) and all(
                one is not None and torch.equal(one, other) for one, other in zip(known, mine, strict=True)
            )
            if not same:
                raise UseError(
                    f"{self.payer(packed)!r} on layer {self.layers[0]}: {entry['role']!r} was encoded for other "
                    "channels than it has here. Keep the calibration with the cache."
                )
            self.packed[entry["role"]] = packed


class LayerCodes(Sealed):
    """Sealed tokens of one layer."""

    def append(self, block: Sequence[KV], positions: Tensor) -> None:
        (kv,) = block
        encode = self.plan.encode
        assert encode is not None
        for name, data in (("keys", kv.keys), ("values", kv.values)):
            self._add(name, self._encode(name, encode, data, encode))
        self.tokens += kv.tokens

    def decode(self, layer: int, keys: Tensor, values: Tensor, where: Where) -> None:
        encode = self.plan.encode
        assert encode is not None
        encode.decode(self.packed["keys"], "keys", keys)
        encode.decode(self.packed["values"], "values", values)

    def dot(self, layer: int, query: Tensor, picked: Picked | None, where: Where, work: Workspace) -> Tensor:
        assert self.plan.encode is not None
        return self.plan.encode.dot(query, self.packed["keys"], "keys", work)

    def mix(self, layer: int, weights: Tensor, picked: Picked | None, work: Workspace) -> Tensor:
        assert self.plan.encode is not None
        return self.plan.encode.mix(weights, self.packed["values"], "values", work)

    def payer(self, packed: Packed) -> object:
        return self.plan.encode

    def _empty(self) -> LayerCodes:
        return LayerCodes(self.plan, self.layers)


class GroupLatents(Sealed):
    """Sealed tokens of layers that a codec stores together.

    Args:
        codec: of this group, not fitted to a text yet.
        ropes: by slot, how each layer rotates keys, None: not at all; used where the transform wants them un-rotated.
    """

    def __init__(self, plan: Plan, layers: Sequence[int], codec: Codec, ropes: Sequence[Rotation | None]) -> None:
        super().__init__(plan, layers)
        self.codec, self.ropes = codec, ropes
        self._decoded: dict[str, Tensor] = {}

    # ---- writing

    def needs(self, raw: Sequence[KV]) -> int:
        return self.codec.min_tokens(raw) if isinstance(self.codec, FitsText) else 0

    def append(self, block: Sequence[KV], positions: Tensor) -> None:
        if self._unrotated:
            block = [
                kv if rope is None else replace(kv, keys=rope.unrotate(kv.keys, positions.to(kv.keys.device)))
                for kv, rope in zip(block, self.ropes, strict=True)
            ]
        new = block[0].tokens
        for name, latent in self._fit(block).items():
            encoder = EXACT if latent.exact else self._encoder(name)
            packed = self._encode(name, encoder, latent.data, self._payer_of(latent.exact))
            self._add(name, replace(packed, exact=latent.exact))
        self.tokens += new

    def _fit(self, block: Sequence[KV]) -> Mapping[str, Any]:
        """Latents of a block, by a codec that is fitted to the text. Where it is fitted anew, the decoded tokens before
        the block are encoded again with it."""
        codec = self.codec
        if isinstance(codec, FitsText) and not self.tokens:
            self.codec = codec = codec.fit(block)
        elif isinstance(codec, RefitsText) and codec.needs_refit(block):
            self._decoded = {}  # of before tokens were evicted
            latents = self._latents()
            old = [codec.inverse(latents, i) for i in range(len(block))]
            block = [_joined(was, new) for was, new in zip(old, block, strict=True)]
            self.codec = codec = codec.fit(block, self.tokens)
            self.packed = {}
        return codec.forward(block)

    # ---- reading

    def decode(self, layer: int, keys: Tensor, values: Tensor, where: Where) -> None:
        kv = self.codec.inverse(self._latents(), layer)
        keys.copy_(self._rotated(layer, kv.keys, where))
        values.copy_(kv.values)

    def pick(self, layer: int, query: Tensor, where: Where) -> Picked | None:
        if not isinstance(self.codec, ReadsDirectly):
            return None
        latents = self._latents()
        query = query.to(_device_of(latents))
        return self.codec.pick(query, latents, layer, lambda keys, at: self._rotated(layer, keys, where, at))

    def dot(self, layer: int, query: Tensor, picked: Picked | None, where: Where, work: Workspace) -> Tensor:
        latents, places = picked or (self._latents(), None)
        codec = self.codec
        keys = codec.keys(latents, layer) if isinstance(codec, ReadsDirectly) else codec.inverse(latents, layer).keys
        keys = self._rotated(layer, keys, where, places)
        return torch.matmul(query.float(), keys.transpose(-1, -2).to(query.device, torch.float32))

    def mix(self, layer: int, weights: Tensor, picked: Picked | None, work: Workspace) -> Tensor:
        latents = picked[0] if picked else self._latents()
        there = weights.to(_device_of(latents))  # layers of a group may live on several devices
        if isinstance(self.codec, ReadsDirectly):
            mixed = self.codec.weigh(there, latents, layer)
        else:
            mixed = torch.matmul(there, self.codec.inverse(latents, layer).values.to(there.dtype))
        return mixed.to(weights.device)

    def _latents(self) -> Mapping[str, Tensor]:
        """Decoded once per forward for all layers."""
        if not self._decoded:
            self._decoded = {
                name: (EXACT if packed.exact else self._encoder(name)).decode(packed, name)
                for name, packed in self.packed.items()
            }
        return self._decoded

    def _rotated(self, layer: int, keys: Tensor, where: Where, places: Tensor | None = None) -> Tensor:
        """Rebuilt keys as attention wants them: of all sealed tokens, or of those at `places`."""
        rope = self.ropes[layer]
        if not self._unrotated or rope is None:
            return keys
        positions = where().to(keys.device)
        if places is not None:
            places = places.to(keys.device)
            places = places if positions.dim() == 3 else places.unsqueeze(1)  # the same for all axes
            return rope.rotate(keys, positions.take_along_dim(places, dim=-1))
        rope.remember(positions)
        return rope.rotate(keys, positions)

    def end_forward(self) -> None:
        self._decoded = {}
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
        self._decoded = {}

    def _emptied(self) -> None:
        super()._emptied()
        if isinstance(self.codec, FitsText):
            self.codec = self.codec.with_fitted({})

    def _empty(self) -> GroupLatents:
        return GroupLatents(self.plan, self.layers, self.codec, self.ropes)

    def rows(self, index: Tensor) -> GroupLatents:
        other = super().rows(index)
        if isinstance(self.codec, FitsText) and self.codec.fitted:
            other.codec = self.codec.with_fitted({name: rows_of(x, index) for name, x in self.codec.fitted.items()})
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
        """What was fitted to the text."""
        return self.codec.fitted if isinstance(self.codec, FitsText) else {}

    def paid_parts(self) -> Iterator[tuple[object, str, Tensor]]:
        yield from super().paid_parts()
        for x in self.fitted.values():
            yield self._payer, "bases", x

    def knows(self, name: str, packed: Packed) -> Sequence[Tensor]:
        return () if packed.exact else self._encoder(name).tensors

    def state(self, put: Put) -> Any:
        return super().state(put) | {"bases": {name: put(x) for name, x in self.fitted.items()}}

    def restore(self, state: Any, get: Get) -> None:
        super().restore(state, get)
        fitted = {name: x for name, key in state["bases"].items() if (x := get(key)) is not None}
        if fitted and isinstance(self.codec, FitsText):
            self.codec = self.codec.with_fitted(fitted)


def _device_of(latents: Mapping[str, Tensor]) -> torch.device:
    return next(iter(latents.values())).device


def _joined(old: KV, new: KV) -> KV:
    """Decoded tokens, followed by new ones; they are where the new ones are."""
    keys = torch.cat([old.keys.to(new.keys), new.keys], dim=2)
    return KV(keys, torch.cat([old.values.to(new.values), new.values], dim=2))
