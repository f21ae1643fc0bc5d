"""Reading latents in codes of channels with compiled kernels (kernels/channels.py)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..abilities import Linear, PackedAxes
from ..encode.channel_codes import GRANULE, ChannelCodes
from ..packed import Packed
from ..workspace import Workspace
from . import compiled
from .linear import Reading
from .sizes import CHUNK, NUMBERS, ONE, PAIR, SLACK, TILE, padded, parts

if TYPE_CHECKING:
    from ..turns import Turns

__all__ = ["Codes", "CodesReader", "Joined"]

SHARES = 100
"""Weights below an even share by this factor are left out of the values: together they are less than a hundredth of the
attention. In texts of thousands of tokens they are nearly half of all."""


class Codes:
    """A latent in codes of channels."""

    def __init__(self, encoder: ChannelCodes, packed: Packed) -> None:
        packed = packed.apart_evenly()
        self.encoder, self.tokens = encoder, packed.tokens
        self.codes, self.gains = packed.parts["codes"], packed.parts["gains"]
        self.rows, _, self.units = self.codes.shape[:3]
        self.size, self.apart = self.codes.shape[3], packed.apart // GRANULE
        self.layout = _layout(encoder)
        self.rank = self.layout.places.shape[0]

    @property
    def numbers(self) -> tuple[Tensor | int, ...]:
        """As kernels are given them."""
        runs = self.layout.runs
        return self.codes, self.gains, runs, runs.shape[0], self.units, self.size, self.gains.shape[3]


class _Layout(NamedTuple):
    """The channels of an encoder, as kernels see them.

    Attributes:
        runs: (runs, 2) bits and channels of each.
        steps: (R + slack,) of the channels.
        width: of a row whose runs are padded.
        places: (R,) of the channels in it.
    """

    runs: Tensor
    steps: Tensor
    width: int
    places: Tensor


@functools.lru_cache(maxsize=256)
def _layout(encoder: ChannelCodes) -> _Layout:
    places, width = [], 0
    for _, channels in encoder.runs:
        places.append(torch.arange(width, width + channels))
        width += padded(channels)
    steps = torch.cat([encoder.steps.float(), torch.zeros(SLACK)])
    return _Layout(torch.tensor(encoder.runs), steps, width, torch.cat(places))


class Joined:
    """The leading channels of tokens in classes, as numbers (B, T, R), for rough scores.

    Args:
        classes: the codes of each class.
        places: (B, n) of each class, where its tokens are among all T.
        leading: R; those that a class does not keep are zero.
    """

    def __init__(self, classes: Sequence[Codes], places: Sequence[Tensor], leading: int, work: Workspace) -> None:
        rows, self.tokens, self.rank = classes[0].rows, sum(each.tokens for each in classes), leading
        self.units = self.apart = self.tokens // GRANULE
        self.size, self.z = 4 * GRANULE * leading, torch.zeros(rows, self.tokens, leading)
        self.layout = _plain_layout(leading)
        for codes, its in zip(classes, places, strict=True):
            size = padded(4 * GRANULE * (TILE + 1) + 4 * SLACK + codes.size, 64)
            memory = work.get("rows", (torch.get_num_threads() * size,), torch.uint8, self.z.device)
            compiled.kernel("channels.join")(
                rows * codes.units, self.z, self.tokens, leading, its.contiguous(), codes.layout.steps, *codes.numbers,
                codes.apart, memory, size,
            )  # fmt: skip

    @property
    def numbers(self) -> tuple[Tensor | int, ...]:
        """As kernels are given them: a unit is one run."""
        return self.z, self.z, self.layout.runs, 1, self.units, self.size, 0


@functools.lru_cache(maxsize=16)
def _plain_layout(rank: int) -> _Layout:
    steps, places = torch.cat([torch.ones(rank), torch.zeros(SLACK)]), torch.arange(rank)
    return _Layout(torch.tensor([[NUMBERS, rank]]), steps, padded(rank), places)


class CodesReader(Reading):
    """Answers one query from codes of channels.

    Args:
        latents: those of the keys and of the values, as codes.
        work: for scratch memory.
        among: sealed tokens that attention is over, of which these are some (None: all).
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        latents: tuple[Codes | Joined, Codes | Joined],
        turns: Turns,
        exact: int,
        rough: int,
        work: Workspace,
        among: int | None = None,
    ) -> None:
        super().__init__(keys, values, latents[0].tokens, turns, exact, rough)
        among = among or self.tokens
        # where all keys are exact, so are the values
        self.least_weight = 1 / (among * SHARES) if among > exact else 0.0
        self.for_keys, self.for_values = latents
        self.work = work
        self.room = padded(self.rough)
        self._mine: tuple[Tensor, int] | None = None

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        query, loose = query.contiguous(), compiled.side_by_side(raw)
        scores = torch.empty(*query.shape[:3], self.tokens + loose[1])
        if self.rebuilds_all:
            self.rescore_all(query, scores)
        else:
            self.score(query, scores)
        if self.rebuilds_all or not self.turns.rotates:
            scores[..., self.tokens :] = query @ loose[0].mT
            return scores
        places, counts = self.choose(query, scores, loose, [self.tokens])
        self.rescore(query, scores, places[0], counts[0])
        return scores

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        weights, (raw, *loose) = weights.contiguous(), compiled.side_by_side(raw)
        (b, h, g, held), d = weights.shape, raw.shape[3]
        codes, layout, mean = self.for_values, self.for_values.layout, self.values.mean
        pieces, rank, scratch = parts(b, codes.units), codes.rank, self._scratch(h * g)
        sums, out = torch.empty(b, pieces, h * g, layout.width), torch.empty(b, h, g, d)
        compiled.kernel("channels.mix")(
            b * pieces, pieces, weights, held, round(self.least_weight * ONE), sums, *codes.numbers, *scratch, h * g,
            layout.width, codes.apart,
        )  # fmt: skip
        compiled.kernel("channels.finish")(
            b * h, h, g, sums, pieces, layout.width, layout.places, rank, layout.steps, *_axes(self.values), d,
            0 if mean is None else mean.float().contiguous(), weights, held, self.tokens, raw, *loose, out, *scratch,
        )  # fmt: skip
        return out

    def score(self, query: Tensor, scores: Tensor) -> None:
        """Write rough scores, `scores` (B, H, G, T or more)."""
        b, h, g, d = query.shape
        scratch = self._scratch(h * g)
        codes, mean, turns, room = self.for_keys, self.keys.mean, self.turns, self.room
        kinds, pairs, angles = (turns.fast, turns.slow), turns.pairs, turns.padded
        vectors = [torch.empty(b, h, kind.count, g, room) if any(kind.counts) else 0 for kind in kinds]
        turning, constant = torch.empty(b, h * g, angles.shape[1]), torch.zeros(b, h * g)
        given: list[Tensor | int] = []
        for kind, made in zip(kinds, vectors, strict=True):
            given += [
                made, kind.count if any(kind.counts) else 0, kind.channels, *kind.counts, kind.cos, kind.sin,
                kind.cos.shape[0],
            ]  # fmt: skip
        pieces = parts(b * h, max(kind.count for kind in kinds))
        compiled.kernel("channels.face")(
            b * h * pieces, pieces, query, g, d, h, *_axes(self.keys), self.rough, room, codes.layout.steps, *scratch,
            0 if mean is None else mean.float().contiguous(), pairs.every, *pairs.counts, turning,
            constant, *given,
        )  # fmt: skip
        fast, slow = ((made, kind.count, kind.size // 8) for made, kind in zip(vectors, kinds, strict=True))
        pieces = parts(b, codes.units)
        compiled.kernel("channels.dot")(
            b * pieces, pieces, scores, scores.stride(2), *codes.numbers, *scratch, h, g, self.rough, room, *fast,
            *slow, turning, constant, angles, 0 if mean is None else angles.shape[1], angles.shape[-1], angles.shape[0],
            codes.apart,
        )  # fmt: skip

    def choose(
        self, query: Tensor, scores: Tensor, raw: tuple[Tensor, int, int], ends: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Write scores of raw keys; returns the places (runs, B, H, n) of the tokens whose keys are to be rebuilt, and
        counts of them (runs, B, H), for the runs of tokens that end at `ends`."""
        b, h, g, d = query.shape
        places = torch.empty(len(ends), b, h, self.exact, dtype=torch.long)
        counts = torch.empty(len(ends), b, h, dtype=torch.long)
        compiled.kernel("channels.choose")(
            b * h, scores, scores.stride(2), g, self.tokens, self.fewest, self.exact,
            round(math.log(self.least) * ONE), query, d, *raw, len(ends), torch.tensor(ends), places, counts,
            *self._scratch(h * g),
        )  # fmt: skip
        return places, counts

    def rescore(self, query: Tensor, scores: Tensor, places: Tensor, counts: Tensor) -> None:
        """Put exact scores of the tokens at `places` over the rough ones."""
        b, h, g, d = query.shape
        scratch = self._scratch(h * g)
        codes, rank, mean = self.for_keys, self.keys.axes.shape[1], self.keys.mean
        rows = self.turns.by_token
        compiled.kernel("channels.rescore")(
            b * h, scores, scores.stride(2), *codes.numbers, *scratch, h, g, query, d, places, counts,
            places.shape[2], rank, codes.layout.steps, *_axes(self.keys),
            0 if mean is None else mean.float().contiguous(), self.turns.pairs.every, self.turns.pairs.counts[0], rows,
            rows.shape[0], codes.apart,
        )  # fmt: skip

    def rescore_all(self, query: Tensor, scores: Tensor) -> None:
        """Write exact scores of all tokens."""
        every = torch.arange(self.tokens).expand(*query.shape[:2], -1).contiguous()
        self.rescore(query, scores, every, torch.full(query.shape[:2], self.tokens))

    def _scratch(self, heads: int) -> tuple[Tensor, int]:
        """Memory for each thread that is enough for every kernel, and its bytes."""
        if self._mine is None:
            width = max(self.keys.axes.shape[3], self.values.axes.shape[3])
            rank, codes = self.keys.axes.shape[1], (self.for_keys, self.for_values)
            numbers = (
                # face: axes on their sides, turned queries, axes of codes
                padded(width, 8) * self.room + 5 * width + self.rough * width,
                PAIR * (TILE + 9 + heads) + heads * self.room,  # dot: a tile, sums, vectors
                self.tokens,  # choose: how much each token exceeds the least share
                # rescore: latents, keys, axes, axes of codes
                5 * (rank + SLACK + padded(width)) + rank * (padded(width) + width),
                CHUNK * 8 * (TILE + heads) + 2 * CHUNK + 8,  # mix: a tile, weights
                self.for_values.rank * (heads + width),  # finish: latents, axes of codes
            )
            unit = 4 * SLACK + max(each.size for each in codes)
            size = padded(4 * max(numbers) + unit, 64)
            memory = self.work.get("rows", (torch.get_num_threads() * size,), torch.uint8, self.keys.axes.device)
            self._mine = memory, size
        return self._mine


def _axes(linear: Linear) -> tuple[Tensor | int, ...]:
    """Axes (B or 1, R, H, D) for kernels, the numbers from one channel and from one row to the next; and of axes in
    codes their fine parts and for how many channels, the scales, how many an axis has, and the units."""
    axes = linear.axes
    if isinstance(axes, PackedAxes):
        codes, fine, scale = _by_head(axes.codes), _by_head(axes.fine), axes.scale
        scale = scale if scale.stride(1) == 1 else scale.contiguous()
        return codes, codes.stride(0), 0, fine, len(fine), scale, scale.stride(0), axes.unit.contiguous()
    axes = _by_head(axes.float())
    return axes, axes.stride(1), axes.stride(0) if axes.shape[0] > 1 else 0, 0, 0, 0, 0, 0


def _by_head(axes: Tensor) -> Tensor:
    """Axes (..., R, H, D), the heads of one side by side."""
    aligned = axes.stride(-1) == 1 and axes.stride(-2) == axes.shape[-1]
    return axes if aligned else axes.contiguous()
