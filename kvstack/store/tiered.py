"""Sealed tokens in classes of importance: each class of a latent is packed by an encoder of its own.

    tokens       t0 t1 t2 t3 t4 t5 ...     in the order of their positions, as everywhere
    classes       2  0  1  2  2  1 ...     packed in 1 to 3 bits
    class 0      t1 ...                    many channels, many bits; each class in the order of positions
    class 1      t2 t5 ...
    class 2      t0 t3 t4 ...              few channels, few bits

How many tokens of each class there are depends only on how many are sealed (`Schedule`). So all rows of a batch have
equally many, all of them whole granules of the encoders, and nothing but the classes themselves has to be held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..abilities import Linear
from ..checks import Get, misfit
from ..encode.channel_codes import ChannelCodes
from ..encode.class_codes import ClassCodes
from ..packed import Packed
from ..read.classes import ByClass, Class
from ..read.latents import Opened, reads_with
from ..read.linear import Decoded, LinearReader
from ..read.linear_numba import Codes, Joined
from ..stage import ChannelEncoder, Codec, Encoder
from ..turns import Turns
from ..types import Latent, Rotation, take_tokens
from ..workspace import Workspace
from .plan import Plan
from .sealed import GroupLatents
from .tracks import Crop, Cut

__all__ = ["Schedule", "TieredLatents"]

CLASSES = "classes"
GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, without their whole part, fill [0, 1] evenly, however many there are."""


class Schedule:
    """Return the class of each granule of tokens: in any run of granules the classes have nearly their shares.

    Args:
        shares: of the classes, 1 in all.
        granule: tokens that are packed together.
    """

    def __init__(self, shares: Sequence[float], granule: int) -> None:
        self.granule, self.classes = granule, len(shares)
        self._bounds = list(itertools.accumulate(shares))[:-1]

    def counts(self, first: int, last: int) -> list[int]:
        """Tokens of each class among those from number `first` to before `last`, both whole granules."""
        return [int(n) for n in torch.bincount(self._of(first, last), minlength=self.classes) * self.granule]

    def fit(self, classes: Tensor) -> Tensor:
        """Return True if the first tokens of all rows could be sealed alone: (T / granule + 1,) for 0, 1, ... granules
        of `classes` (B, T)."""
        t = classes.shape[1]
        there = torch.nn.functional.one_hot(self._of(0, t), self.classes).cumsum(0) * self.granule
        here = torch.nn.functional.one_hot(classes.long().cpu(), self.classes).cumsum(1)
        fits = (here[:, self.granule - 1 :: self.granule] == there).all(-1).all(0)
        return torch.cat([torch.ones(1, dtype=torch.bool), fits])

    def _of(self, first: int, last: int) -> Tensor:
        """The class of each granule."""
        granules = torch.arange(first // self.granule, last // self.granule, dtype=torch.float64)
        bounds = torch.tensor(self._bounds, dtype=torch.float64)
        return torch.bucketize((granules * GOLDEN).frac(), bounds, right=True)


class TieredLatents(GroupLatents):
    """Sealed tokens of layers that a codec stores together, class by class."""

    def __init__(self, plan: Plan, layers: Sequence[int], codec: Codec, ropes: Sequence[Rotation | None]) -> None:
        super().__init__(plan, layers, codec, ropes)
        assert plan.tiers is not None
        classes = range(len(plan.tiers.shares))
        self._each = {name: [f"{name}, class {number}" for number in classes] for name in codec.encoders}
        self._places = {part: (name, n) for name, parts in self._each.items() for n, part in enumerate(parts)}
        granules = (self._encoder(part).granule(1) for part in (CLASSES, *self._places))
        self.schedule = Schedule(plan.tiers.shares, math.lcm(*granules))

    def _forget(self) -> None:
        super()._forget()
        self._by_class: Sequence[Tensor] | None = None
        self._codes: dict[str, Codes] = {}
        self._leading: dict[tuple[str, int], Joined] = {}
        self._turned: tuple[Turns, Sequence[Turns]] | None = None

    def _encoder(self, name: str) -> Encoder:
        if name == CLASSES:
            return ClassCodes(len(next(iter(self._each.values()))))
        latent, number = self._places[name]
        return self.codec.lower[latent][number - 1] if number else self.codec.encoders[latent]

    # ---- writing

    def _packed(self, latents: Mapping[str, Latent], scores: Tensor | None) -> dict[str, Packed]:
        assert scores is not None
        counts = self.schedule.counts(self.tokens, self.tokens + scores.shape[-1])
        # layers of a group may live on several devices
        classes = self._classes(scores[:, 0].to(_device_of(latents)), counts)
        index = _by_class(classes, counts)
        data = {CLASSES: classes[:, None, :, None]}
        for name, latent in latents.items():
            parts = (take_tokens(latent.data, each.unsqueeze(1)) for each in index)
            data |= {part: x for part, x in zip(self._each[name], parts, strict=True) if x.shape[2]}
        return {name: self._encoded(name, x) for name, x in data.items()}

    def _encoded(self, name: str, x: Tensor) -> Packed:
        """A class of a latent, or the classes: of a latent those channels that the class keeps."""
        encoder = self._encoder(name)
        x = x if name == CLASSES else x[..., : _rank(encoder)]
        return self._encode(name, encoder, x, self._payer_of(exact=False))

    def _classes(self, scores: Tensor, counts: Sequence[int]) -> Tensor:
        """(B, T) uint8 classes of tokens with `scores` (B, T). Of equal tokens the newer one is the more important."""
        rising = torch.arange(len(counts), dtype=torch.uint8).repeat_interleave(torch.tensor(counts)).flip(0)
        order = scores.sort(dim=-1, stable=True).indices
        return torch.zeros_like(scores, dtype=torch.uint8).scatter_(1, order, rising.to(scores.device).expand_as(order))

    # ---- reading

    def _latents(self) -> Mapping[str, Tensor]:
        if not self._decoded:
            classes = self._classes_held()
            index = _by_class(classes, self.schedule.counts(0, self.tokens))
            self._decoded = {name: self._joined_classes(name, index) for name in self._each}
        return self._decoded

    def _classes_held(self) -> Tensor:
        """(B, T) uint8."""
        return self._encoder(CLASSES).decode(self._here(CLASSES), CLASSES)[:, 0, :, 0]

    def _joined_classes(self, name: str, index: Sequence[Tensor]) -> Tensor:
        """A latent (B, 1, T, R) in the order of positions; channels that a class does not keep are zero."""
        whole: Tensor | None = None
        for part, each in zip(self._each[name], index, strict=True):
            if part not in self.packed:
                continue
            x = self._encoder(part).decode(self._here(part), part)[:, 0]  # (B, n, R of the class)
            if whole is None:
                whole = x.new_zeros(len(x), self.tokens, _rank(self.codec.encoders[name]))
            whole[..., : x.shape[-1]].scatter_(1, each[..., None].expand(x.shape), x)
        assert whole is not None
        return whole.unsqueeze(1)

    def _open(self, name: str) -> Opened:
        return Decoded(self._latents()[name])

    def _reader_of(
        self, keys: Linear, values: Linear, turns: Turns, exact: int, rough: int, work: Workspace
    ) -> LinearReader:
        """Reads each class in place, where there are kernels for its codes. Otherwise classes are joined."""
        for_keys, for_values = self._codes_of(keys.latent), self._codes_of(values.latent)
        if for_keys is None or for_values is None:
            return super()._reader_of(keys, values, turns, exact, rough, work)
        places, by_class = self._tokens_by_class(), []
        for number, latents in enumerate(zip(for_keys, for_values, strict=True)):
            mine = keys.first(latents[0].rank), values.first(latents[1].rank)
            by_class.append(Class(*mine, latents, places[number], self._turns_by_class(turns)[number]))
        rank = keys.axes.shape[1]
        joined = self._joined(keys.latent, min(rough, rank) if turns.rotates else rank, for_keys, work)
        return ByClass(keys.first(joined.rank), joined, turns, by_class, exact, work)

    def _codes_of(self, name: str) -> Sequence[Codes] | None:
        """Each class of a latent that holds any tokens, once per forward for all layers; None where one must be
        decoded."""
        found = []
        for part in self._each[name]:
            if part not in self.packed:
                continue
            if part not in self._codes:
                encoder, packed = self._encoder(part), self._here(part)
                device = packed.parts["codes"].device
                if not (isinstance(encoder, ChannelCodes) and reads_with(encoder, device) == "numba"):
                    return None
                self._codes[part] = Codes(encoder, packed)
            found.append(self._codes[part])
        return found

    def _joined(self, name: str, leading: int, classes: Sequence[Codes], work: Workspace) -> Joined:
        """The leading channels of a latent of all tokens, once per forward for all layers."""
        if (name, leading) not in self._leading:
            self._leading[name, leading] = Joined(classes, self._tokens_by_class(), leading, work)
        return self._leading[name, leading]

    def _turns_by_class(self, turns: Turns) -> Sequence[Turns]:
        """Those of the tokens of each class that holds any, once per forward for all layers that rotate alike."""
        if self._turned is None or self._turned[0] is not turns:
            self._turned = turns, [turns.take(places) for places in self._tokens_by_class()]
        return self._turned[1]

    def _tokens_by_class(self) -> Sequence[Tensor]:
        """For each class that holds any tokens, their places (B, n), once per forward."""
        if self._by_class is None:
            every = _by_class(self._classes_held(), self.schedule.counts(0, self.tokens))
            self._by_class = [places for places in every if places.shape[1]]
        return self._by_class

    # ---- moving

    def whole(self, tokens: int, granule: int) -> int:
        """Classes are whole granules only where a block of tokens ends: one ends after a prompt."""
        if tokens >= self.tokens:
            return self.tokens
        fits = self.schedule.fit(self._classes_held())[: tokens // self.schedule.granule + 1]
        return int(fits.nonzero().max()) * self.schedule.granule

    def take(self, cut: Cut) -> None:
        raise AssertionError("nothing is dropped from what is in classes")

    def crop(self, crop: Crop) -> None:
        if crop.whole >= self.tokens:
            return
        counts = self.schedule.counts(0, crop.whole)
        first = {
            CLASSES: crop.whole,
            **{part: n for parts in self._each.values() for part, n in zip(parts, counts, strict=True)},
        }
        self._hold(crop.whole, {name: packed.first(first[name]) for name, packed in self.packed.items() if first[name]})

    def _empty(self) -> TieredLatents:
        return TieredLatents(self.plan, self.layers, self.codec, self.ropes)

    # ---- bytes and files

    def payer(self, packed: Packed) -> object:
        return self.plan.tiers if CLASSES in packed.parts else super().payer(packed)

    def _sample(self, get: Get) -> dict[str, Packed]:
        latents = super()._latents_of_sample(get)
        counts = self.schedule.counts(0, self.tokens)
        data = {
            part: latents[name].data
            for name, parts in self._each.items()
            for part, n in zip(parts, counts, strict=True)
            if n
        }
        some = next(iter(latents.values())).data
        data[CLASSES] = torch.zeros_like(some[..., :1], dtype=torch.uint8)
        return {name: self._encoded(name, x) for name, x in data.items()}

    def _granules(self, name: str, granule: int) -> int:
        if name == CLASSES:
            return super()._granules(name, granule)
        return self.schedule.counts(0, self.tokens)[self._places[name][1]] // granule

    def _check_decoded(self, get: Get) -> None:
        classes = self._classes_held()
        if int(classes.max()) >= self.schedule.classes or not bool(self.schedule.fit(classes)[-1]):
            raise misfit(f"{get.where('classes of tokens')} are not as many of each as {self.tokens} tokens have.")
        super()._check_decoded(get)


def _device_of(latents: Mapping[str, Latent]) -> torch.device:
    return next(iter(latents.values())).data.device


def _rank(encoder: Encoder) -> int:
    """Channels that are kept."""
    assert isinstance(encoder, ChannelEncoder)
    return encoder.rank


def _by_class(classes: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """For each class the indices (B, n) of its tokens among `classes` (B, T), ascending."""
    return classes.long().argsort(dim=1, stable=True).split(list(counts), dim=1)
