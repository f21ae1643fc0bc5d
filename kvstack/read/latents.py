"""Reading latents without rebuilding all keys: rough scores of all tokens, exact keys of those that matter.

    keys of a layer, before rotation     k = z @ axes + mean           z (T, R), channels by falling importance
    score of a token                     s = q . rotate(k, position)

Rebuilding costs R * D for every token and kv head. But the rotation may change sides, s = turn(q, -position) . k, and
is nearly the same for the tokens of a block. So a block is scored with a few vectors of R numbers, and no key is made:

    rough     s ~ z . u + q . rotate(mean, position),  u = axes @ turn(q, -middle of the block)
              leading channels only. Pairs of channels that turn slowly share their vectors in large blocks, those that
              turn fast in small ones, and what is turned around within a small block is left to the mean
    choose    the tokens whose share of the attention counts, for each kv head
    exact     rebuild and rotate their keys, and put exact scores in their places
    weigh     all tokens take part in the softmax and in the values, (weights @ z) @ axes

Source: keys that are rebuilt for chosen tokens are xKV's (arXiv 2503.18893, section 4.3) and SALS's (arXiv 2510.24273);
here the other tokens keep their rough scores instead of none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..abilities import Linear
from ..encode.channel_codes import ChannelCodes
from ..floats import wide
from ..packed import Packed
from ..stage import Encoder
from ..types import take_tokens
from ..workspace import Workspace
from . import compiled
from .sizes import CHUNK, PAIR, SLACK, TILE, padded, parts
from .triton.launch import LARGEST, MOST

if TYPE_CHECKING:
    from ..turns import Blocks, Turns
    from .triton import channels

__all__ = ["CodesReader", "LatentReader", "Opened", "TritonReader", "opened", "reader_of", "reads_with"]

COUNTS, EVEN = 3e-4, 2
"""A token's key is rebuilt where its share of the attention is so large, or as large as that of so many tokens if all
had the same."""
SHARES = 100
"""Weights below an even share by this factor are left out of the values: together they are less than a hundredth of the
attention. In texts of thousands of tokens they are nearly half of all."""


# ---- latents, open for the layers of one forward


class Decoded:
    """A latent as plain numbers, (B, T, R)."""

    def __init__(self, z: Tensor) -> None:
        self.z = wide(z.squeeze(1))
        self.tokens = z.shape[2]


class Codes:
    """A latent in codes of channels."""

    def __init__(self, encoder: ChannelCodes, packed: Packed) -> None:
        self.encoder, self.tokens = encoder, packed.tokens
        self.codes, self.gains = (packed.parts[name].contiguous() for name in ("codes", "gains"))
        self.rows, _, self.units = self.codes.shape[:3]
        self.layout = _layout(encoder)

    @property
    def numbers(self) -> tuple[Tensor | int, ...]:
        """As kernels are given them."""
        runs = self.layout.runs
        return self.codes, self.gains, runs, len(runs), self.units, self.codes.shape[3], self.gains.shape[3]


class DeviceCodes:
    """A latent in codes of channels on a GPU: Triton's kernels read them, and where these do not serve, it is decoded
    once."""

    def __init__(self, encoder: ChannelCodes, packed: Packed) -> None:
        self.encoder, self.packed, self.tokens = encoder, packed, packed.tokens

    @cached_property
    def z(self) -> Tensor:
        return Decoded(self.encoder.decode(self.packed, "latent")).z

    @cached_property
    def latent(self) -> channels.Latent:
        """As kernels are given it."""
        from .triton import channels

        codes, gains = (self.packed.parts[name].contiguous() for name in ("codes", "gains"))
        return channels.Latent(codes, gains, channels.tables(self.encoder))


Opened = Decoded | Codes | DeviceCodes


class _Layout(NamedTuple):
    """How kernels see the channels of an encoder.

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


def reads_with(encoder: Encoder, device: torch.device) -> str:
    """What reads the latents that an encoder has packed on `device`."""
    if isinstance(encoder, ChannelCodes):
        if device.type == "cpu" and _agrees():
            return "numba"
        if device.type == "cuda" and _agrees_on(device, 3, 20, 8, mean=True):
            return "triton"
    return "torch"


def opened(encoder: Encoder, packed: Packed, decoded: Callable[[], Tensor]) -> Opened:
    """A latent (B, 1, T, R), to be read in place where there are kernels for its codes, or else decoded once."""
    device = next(iter(packed.parts.values())).device
    kernels = reads_with(encoder, device)
    if isinstance(encoder, ChannelCodes) and kernels == "numba":
        return Codes(encoder, packed)
    if isinstance(encoder, ChannelCodes) and kernels == "triton":
        return DeviceCodes(encoder, packed)
    return Decoded(decoded())


# ---- whether kernels are right


class _Example(NamedTuple):
    """Random numbers to try kernels with; rotations are one by pairs and none."""

    encoder: ChannelCodes
    packed: Packed
    linear: Linear
    turns: tuple[Turns, Turns]
    query: Tensor
    raw: Tensor
    weights: Tensor

    @classmethod
    def of(cls, queries: int, width: int, turning: int, *, mean: bool) -> _Example:
        """With heads of `width` channels, of which `turning` pairs are rotated."""
        from ..turns import Pairs, Turns

        bits = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1], dtype=torch.uint8).repeat_interleave(9)
        draw = torch.Generator().manual_seed(0)
        rows, heads, tokens, rank = 2, 2, 200, len(bits)
        encoder = ChannelCodes(torch.rand(rank, generator=draw).sort(descending=True).values, bits)
        z = torch.randn(rows, 1, tokens, rank, generator=draw) * encoder.deviation
        axes = torch.randn(1, rank, heads, width, generator=draw) / 8
        middle = torch.randn(heads, width, generator=draw) if mean else None
        angles = torch.arange(tokens) * torch.logspace(0, -3, turning)[:, None]
        order = torch.arange(width)
        pairs = Pairs(order[: 2 * turning : 2], order[1 : 2 * turning : 2], order[2 * turning :])
        turns = Turns(pairs, angles.cos()[None], angles.sin()[None])
        query, raw = (torch.randn(rows, heads, n, width, generator=draw) for n in (queries, 7))
        weights = torch.rand(rows, heads, queries, tokens + 7, generator=draw)
        packed, linear = encoder.encode(z, "latent"), Linear("latent", axes, middle)
        return cls(encoder, packed, linear, (turns, Turns.none(tokens, width, angles.device)), query, raw, weights)

    @property
    def decoded(self) -> Decoded:
        return Decoded(self.encoder.decode(self.packed, "latent"))


@functools.cache
def _agrees() -> bool:
    """Whether kernels compute what plain torch does."""

    def pairs() -> Iterator[tuple[Tensor, ...]]:
        example = _Example.of(3, 20, 4, mean=True)
        linear, opened = example.linear, (example.decoded, Codes(example.encoder, example.packed))
        for turns in example.turns:
            readers = [reader_of(linear, linear, (each, each), turns, 20, 50, Workspace()) for each in opened]
            yield tuple(each.dot(example.query, example.raw) for each in readers)
            yield tuple(each.mix(example.weights, example.raw) for each in readers)

    return compiled.agree(pairs)


@functools.cache
def _agrees_on(device: torch.device, queries: int, width: int, turning: int, *, mean: bool) -> bool:
    """Whether Triton's kernels compute on a device what plain torch does on the processor. For each size of heads: it
    has kernels of its own, which may be too large for this device."""

    def pairs() -> Iterator[tuple[Tensor, ...]]:
        example = _Example.of(queries, width, turning, mean=mean)
        encoder, packed, linear, _, query, _, weights = example
        weights = weights[..., : packed.tokens]
        places = torch.arange(packed.tokens).expand(*query.shape[:2], -1)
        packed = packed._map(lambda part: part.to(device))
        there = Linear("latent", linear.axes.to(device), None if linear.mean is None else linear.mean.to(device))
        z, codes = example.decoded, DeviceCodes(encoder.to(device), packed)
        for turns in example.turns:
            plain = LatentReader(linear, linear, (z, z), turns, 20, 50)
            reader = TritonReader(there, there, (codes, codes), turns.to(device), 20, 50, checked=True)
            yield plain._rough(query), reader._rough(query.to(device)).cpu()
            yield plain._weigh(weights), reader._weigh(weights.to(device)).cpu()
            if turns.rotates:
                scores = torch.empty(*query.shape[:3], packed.tokens, device=device)
                reader._score(query.to(device), None, scores)
                yield plain._exact(query, places), scores.cpu()
                some = places[..., 3:50:5]
                yield plain._exact(query, some), reader._exact(query.to(device), some.to(device)).cpu()

    return compiled.agree(pairs, "triton")


# ---- one layer


def reader_of(
    keys: Linear,
    values: Linear,
    latents: tuple[Opened, Opened],
    turns: Turns,
    exact: int,
    rough: int,
    work: Workspace,
) -> LatentReader | CodesReader:
    """The reader of one layer, for latents as they were opened."""
    for_keys, for_values = latents
    if isinstance(for_keys, Codes) and isinstance(for_values, Codes):
        return CodesReader(keys, values, (for_keys, for_values), turns, exact, rough, work)
    if isinstance(for_keys, DeviceCodes) and isinstance(for_values, DeviceCodes):
        return TritonReader(keys, values, (for_keys, for_values), turns, exact, rough)
    assert isinstance(for_keys, Decoded)  # both are packed by encoders of one kind
    assert isinstance(for_values, Decoded)
    return LatentReader(keys, values, (for_keys, for_values), turns, exact, rough)


class _Reader:
    """What readers of one layer know.

    Args:
        keys, values: how the layer's keys and values come from latents; `keys` before rotation.
        tokens: that are sealed.
        turns: how keys of the sealed tokens are rotated.
        exact: keys that are rebuilt for each kv head, at most.
        rough: channels that score the others.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        tokens: int,
        turns: Turns,
        exact: int,
        rough: int,
    ) -> None:
        self.keys, self.values, self.turns, self.tokens = keys, values, turns, tokens
        self.exact = min(exact, tokens)
        # where nothing is rotated, scores of all channels are exact
        self.rough = min(rough, keys.axes.shape[1]) if turns.rotates else keys.axes.shape[1]

    @property
    def least(self) -> Tensor:
        """The share of the attention from which on a token's key is rebuilt."""
        return torch.tensor(min(COUNTS, EVEN / self.tokens))


class LatentReader(_Reader):
    """Answers one query from the latents of one layer, in plain torch.

    Args:
        latents: those of the keys and of the values, decoded; the same where they have one.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        latents: tuple[Decoded | DeviceCodes, Decoded | DeviceCodes],
        turns: Turns,
        exact: int,
        rough: int,
    ) -> None:
        super().__init__(keys, values, latents[0].tokens, turns, exact, rough)
        self.for_keys, self.for_values = latents

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        """A scaled `query` (B, H, G, D) times the sealed keys, and then times `raw` ones: (B, H, G, T)."""
        scores, loose = self._rough(query), query @ raw.to(query.dtype).mT
        if self.turns.rotates:
            total = torch.cat([scores, loose], dim=-1).logsumexp(-1, keepdim=True)
            shares, places = (scores - total).amax(2).topk(self.exact, dim=-1)  # (B, H, n), for any query of a kv head
            counts = shares >= self.least.log()
            if query.device.type == "cpu":  # elsewhere the host would wait for it
                most = int(counts.sum(-1).max())
                places, counts = places[..., :most], counts[..., :most]
            index = places.unsqueeze(2).expand(-1, -1, query.shape[2], -1)
            found = torch.where(counts.unsqueeze(2), self._exact(query, places), scores.gather(3, index))
            scores = scores.scatter(3, index, found)
        return torch.cat([scores, loose], dim=-1)

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        """`weights` (B, H, G, T) times the sealed values, and then `raw` ones: (B, H, G, D)."""
        weights, loose = weights.tensor_split([self.tokens], dim=-1)
        mixed = self._weigh(weights)
        out = mixed @ self.values.axes.to(mixed.dtype).transpose(1, 2)
        if self.values.mean is not None:
            out = out + weights.sum(-1, keepdim=True) * self.values.mean.to(mixed.dtype).unsqueeze(1)
        return out + loose @ raw.to(loose.dtype)

    def _weigh(self, weights: Tensor) -> Tensor:
        """`weights` (B, H, G, T) times the latents of the values: (B, H, G, R)."""
        z = self.for_values.z
        return (weights.flatten(1, 2).to(z) @ z).unflatten(1, weights.shape[1:3])

    # ---- rough scores

    def _rough(self, query: Tensor) -> Tensor:
        """(B, H, G, T)."""
        fast, slow = self.turns.fast, self.turns.slow
        # one vector for each small block
        far = self._vectors(slow, query).repeat_interleave(slow.size // fast.size, dim=2)
        scores = self._products(self._vectors(fast, query) + far[:, :, : fast.count], fast.size)
        if self.keys.mean is None:
            return scores
        turning, still = self.turns.facing(query, self.keys.mean)
        return scores + still.unsqueeze(-1) + turning @ self.turns.angles.unsqueeze(1).to(scores.dtype)

    def _products(self, vectors: Tensor, size: int) -> Tensor:
        """Leading channels of all tokens times `vectors` (B, H, blocks, G, r) of their blocks: (B, H, G, T)."""
        z = self.for_keys.z[..., : self.rough]
        z = torch.nn.functional.pad(z, (0, 0, 0, -self.tokens % size)).unflatten(1, (-1, size))
        scores = vectors @ z.unsqueeze(1).mT  # (B, H, blocks, G, size)
        return scores.transpose(2, 3).flatten(3)[..., : self.tokens]

    def _vectors(self, blocks: Blocks, query: Tensor) -> Tensor:
        """What a query, turned back for each block, makes of the leading channels: (B, H, blocks, G, r)."""
        facing = blocks.facing(query)  # (B, H, blocks, G, C)
        axes = self.keys.axes[:, : self.rough].index_select(3, blocks.channels).to(facing.dtype)  # (B or 1, r, H, C)
        return (facing.flatten(2, 3) @ axes.permute(0, 2, 3, 1)).unflatten(2, facing.shape[2:4])

    # ---- exact scores

    def _exact(self, query: Tensor, places: Tensor) -> Tensor:
        """Scores of the tokens at `places` (B, H, n), from keys that are rebuilt: (B, H, G, n)."""
        h, n = places.shape[1:]
        z = take_tokens(self.for_keys.z.unsqueeze(1), places.flatten(1).unsqueeze(1))[:, 0].unflatten(1, (h, n))
        keys = z @ self.keys.axes.to(z.dtype).transpose(1, 2)  # (B, H, n, D)
        if self.keys.mean is not None:
            keys = keys + self.keys.mean.to(z.dtype).unsqueeze(1)
        return query @ self.turns.rotate_at(keys, places).to(query.dtype).mT


class CodesReader(_Reader):
    """The same, from codes of channels, with compiled kernels.

    Args:
        latents: those of the keys and of the values, as codes.
        work: for scratch memory.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        latents: tuple[Codes, Codes],
        turns: Turns,
        exact: int,
        rough: int,
        work: Workspace,
    ) -> None:
        super().__init__(keys, values, latents[0].tokens, turns, exact, rough)
        self.for_keys, self.for_values = latents
        self.work = work
        self.room = padded(self.rough)

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        query, (raw, *loose) = query.contiguous(), compiled.side_by_side(raw)
        b, h, g, d = query.shape
        scores = torch.empty(b, h, g, self.tokens + raw.shape[2])
        scratch = self._scratch(h * g, d)
        self._score(query, scores, scratch)
        if not self.turns.rotates:
            scores[..., self.tokens :] = query @ raw.mT
            return scores
        places, counts = torch.empty(b, h, self.exact, dtype=torch.long), torch.empty(b, h, dtype=torch.long)
        compiled.kernel("channels.choose")(
            b * h, scores, scores.shape[3], g, self.tokens, self.exact, self.least, query, d, raw, *loose, places,
            counts, *scratch,
        )  # fmt: skip
        self._rescore(query, scores, places, counts, scratch)
        return scores

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        weights, (raw, *loose) = weights.contiguous(), compiled.side_by_side(raw)
        (b, h, g, held), d = weights.shape, raw.shape[3]
        codes, layout, mean = self.for_values, self.for_values.layout, self.values.mean
        pieces, rank, scratch = parts(b, codes.units), len(layout.places), self._scratch(h * g, d)
        sums, out = torch.empty(b, pieces, h * g, layout.width), torch.empty(b, h, g, d)
        # where all keys are exact, so are the values
        least = 1 / (self.tokens * SHARES) if self.tokens > self.exact else 0.0
        compiled.kernel("channels.mix")(
            b * pieces, pieces, weights, held, torch.tensor(least), sums, *codes.numbers, *scratch, h * g, layout.width
        )
        compiled.kernel("channels.finish")(
            b * h, h, g, sums, pieces, layout.width, layout.places, rank, layout.steps, *_axes(self.values), d,
            0 if mean is None else mean.float().contiguous(), weights, held, self.tokens, raw, *loose, out, *scratch,
        )  # fmt: skip
        return out

    def _score(self, query: Tensor, scores: Tensor, scratch: tuple[Tensor, int]) -> None:
        """Write rough scores."""
        b, h, g, d = query.shape
        codes, mean, turns, room = self.for_keys, self.keys.mean, self.turns, self.room
        kinds, pairs, angles = (turns.fast, turns.slow), turns.pairs, turns.padded
        vectors = [torch.empty(b, h, kind.count, g, room) if len(kind.channels) else 0 for kind in kinds]
        turning, constant = torch.empty(b, h * g, angles.shape[1]), torch.zeros(b, h * g)
        given: list[Tensor | int] = []
        for kind, made in zip(kinds, vectors, strict=True):
            given += [
                made, kind.count if len(kind.channels) else 0, kind.channels, len(kind.first), len(kind.still),
                kind.cos, kind.sin, kind.cos.shape[0],
            ]  # fmt: skip
        pieces = parts(b * h, max(kind.count for kind in kinds))
        compiled.kernel("channels.face")(
            b * h * pieces, pieces, query, g, d, h, *_axes(self.keys), self.rough, room, codes.layout.steps, *scratch,
            0 if mean is None else mean.float().contiguous(), pairs.every, len(pairs.first), len(pairs.still), turning,
            constant, *given,
        )  # fmt: skip
        fast, slow = ((made, kind.count, kind.size // 8) for made, kind in zip(vectors, kinds, strict=True))
        pieces = parts(b, codes.units)
        compiled.kernel("channels.dot")(
            b * pieces, pieces, scores, scores.shape[3], *codes.numbers, *scratch, h, g, self.rough, room, *fast, *slow,
            turning, constant, angles, 0 if mean is None else angles.shape[1], angles.shape[-1], angles.shape[0],
        )  # fmt: skip

    def _rescore(
        self, query: Tensor, scores: Tensor, places: Tensor, counts: Tensor, scratch: tuple[Tensor, int]
    ) -> None:
        """Put exact scores of the tokens at `places` over the rough ones."""
        b, h, g, d = query.shape
        codes, rank, mean = self.for_keys, self.keys.axes.shape[1], self.keys.mean
        rows, groups = self.turns.by_token, -(-self.exact // 5)
        compiled.kernel("channels.rescore")(
            b * h * groups, groups, scores, scores.shape[3], *codes.numbers, *scratch, h, g, query, d, places, counts,
            self.exact, rank, codes.layout.steps, *_axes(self.keys), 0 if mean is None else mean.float().contiguous(),
            self.turns.pairs.every, len(self.turns.pairs.first), rows, rows.shape[0],
        )  # fmt: skip

    def _scratch(self, heads: int, width: int) -> tuple[Tensor, int]:
        """Memory for each thread that is enough for every kernel, and its bytes."""
        rank, unit = (
            self.keys.axes.shape[1],
            4 * SLACK + max(x.codes.shape[3] for x in (self.for_keys, self.for_values)),
        )
        numbers = (
            padded(width, 8) * self.room + 5 * width,  # face: axes on their sides, turned queries
            PAIR * (TILE + 9 + heads) + heads * self.room,  # dot: a tile, sums, vectors
            self.tokens,  # choose: how much each token exceeds the least share
            5 * (rank + SLACK + padded(width)),  # rescore: latents and keys
            CHUNK * 8 * (TILE + heads) + 2 * CHUNK + 8,  # mix: a tile, weights
            heads * len(self.for_values.layout.places),  # finish: latents
        )
        size = padded(4 * max(numbers) + unit, 64)
        return self.work.get("rows", (torch.get_num_threads() * size,), torch.uint8, self.for_keys.codes.device), size


class TritonReader(LatentReader):
    """The same, from codes on a GPU. If all keys may be rebuilt, they are, and there are no rough scores.

    Args:
        checked: whether its kernels need not be tried before they are used.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        latents: tuple[DeviceCodes, DeviceCodes],
        turns: Turns,
        exact: int,
        rough: int,
        checked: bool = False,
    ) -> None:
        super().__init__(keys, values, latents, turns, exact, rough)
        self.key_codes, self.value_codes = latents
        self.checked = checked

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        if not (self.turns.rotates and self.exact == self.tokens and self._serves(query, query.shape[2])):
            return super().dot(query, raw)
        scores = torch.empty(*query.shape[:3], self.tokens + raw.shape[2], device=query.device)
        scores[..., self.tokens :] = query @ raw.to(query.dtype).mT
        self._score(query, None, scores)
        return scores

    def _rough(self, query: Tensor) -> Tensor:
        if self.turns.rotates or not self._serves(query, query.shape[2]):
            return super()._rough(query)
        # without a rotation, all tokens are one block
        vectors = (query @ self.keys.axes.to(query.dtype).permute(0, 2, 3, 1)).unsqueeze(2)
        scores = self._products(vectors, padded(self.tokens, 64))
        return scores if self.keys.mean is None else scores + query @ self.keys.mean.to(query.dtype).unsqueeze(-1)

    def _products(self, vectors: Tensor, size: int) -> Tensor:
        if not self._serves(vectors, vectors.shape[3]):
            return super()._products(vectors, size)
        from .triton import channels

        return channels.project(vectors, self.key_codes.latent, size)

    def _exact(self, query: Tensor, places: Tensor) -> Tensor:
        if not (self.turns.rotates and self._serves(query, query.shape[2])):
            return super()._exact(query, places)
        scores = torch.empty(*query.shape[:3], places.shape[2], device=query.device)
        self._score(query, places, scores)
        return scores

    def _weigh(self, weights: Tensor) -> Tensor:
        if not self._serves(weights, weights.shape[2]):
            return super()._weigh(weights)
        from .triton import channels

        return channels.mix(weights, self.value_codes.latent, self.values.axes.shape[1])

    def _score(self, query: Tensor, places: Tensor | None, scores: Tensor) -> None:
        """Write exact scores of the tokens at `places` (B, H, n), or of all."""
        from .triton import channels

        keys, turns = self.keys, self.turns
        every, angles = turns.pairs.every, turns.angles
        channels.scores(query, self.key_codes.latent, keys.axes, keys.mean, every, angles, places, scores)

    def _serves(self, x: Tensor, queries: int) -> bool:
        """Whether there are kernels for `x`, of so many queries of each kv head, that were seen to be right."""
        width, mean = self.keys.axes.shape[3], self.keys.mean is not None
        if x.dtype != torch.float32 or x.device != self.key_codes.latent.codes.device:
            return False
        if width > LARGEST or queries > MOST:
            return False
        return self.checked or _agrees_on(x.device, queries, width, len(self.turns.pairs.first), mean=mean)


def _axes(linear: Linear) -> tuple[Tensor, int, int]:
    """Axes (B or 1, R, H, D) for kernels, and the numbers from one channel and from one row to the next."""
    axes = linear.axes.float()
    if axes.stride(3) != 1 or axes.stride(2) != axes.shape[3]:
        axes = axes.contiguous()
    return axes, axes.stride(1), axes.stride(0) if axes.shape[0] > 1 else 0
