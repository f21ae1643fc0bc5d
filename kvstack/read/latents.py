"""The reader of latents: chosen by their encoder and their device, and tried before it is used.

linear.py          a query is answered without rebuilding all keys, in plain torch
linear_numba.py    from codes of channels on a processor
linear_triton.py   from codes of channels on a GPU
classes.py         from codes of tokens in classes, on a processor
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..abilities import Linear, PackedAxes
from ..encode.bits import MOST
from ..encode.channel_codes import ChannelCodes
from ..packed import Packed
from ..stage import Encoder
from ..workspace import Workspace
from . import compiled
from .linear import Decoded, LatentReader, LinearReader
from .linear_numba import Codes, CodesReader
from .linear_triton import DeviceCodes, TritonReader

if TYPE_CHECKING:
    from ..turns import Turns

__all__ = ["ByHeads", "Opened", "opened", "reader_of", "reads_with"]


Opened = Decoded | Codes | DeviceCodes
"""A latent, open for the layers of one forward."""


def reads_with(encoder: Encoder, device: torch.device) -> str:
    """Return the name of the reader of latents that an encoder has packed on `device`."""
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
        return TritonReader(keys, values, (for_keys, for_values), turns, exact, rough, _agrees_on)
    assert isinstance(for_keys, Decoded)  # both are packed by encoders of one kind
    assert isinstance(for_values, Decoded)
    return LatentReader(keys, values, (for_keys, for_values), turns, exact, rough)


class ByHeads:
    """Answers one query of a layer whose kv heads come from several latents: one reader for each run of `heads`."""

    def __init__(self, readers: Sequence[LinearReader], heads: Sequence[int]) -> None:
        self.readers, self.heads = readers, list(heads)

    def dot(self, query: Tensor, raw: Tensor) -> Tensor:
        parts = zip(self.readers, query.split(self.heads, dim=1), raw.split(self.heads, dim=1), strict=True)
        return torch.cat([reader.dot(*part) for reader, *part in parts], dim=1)

    def mix(self, weights: Tensor, raw: Tensor) -> Tensor:
        parts = zip(self.readers, weights.split(self.heads, dim=1), raw.split(self.heads, dim=1), strict=True)
        return torch.cat([reader.mix(*part) for reader, *part in parts], dim=1)


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
    def of(cls, queries: int, width: int, turning: int, *, mean: bool, fine: int | None = None) -> _Example:
        """With heads of `width` channels, of which `turning` pairs are rotated, and axes as numbers or in codes, so
        many of them `fine`."""
        from ..turns import Pairs, Turns

        bits = torch.arange(MOST, 0, -1, dtype=torch.uint8).repeat_interleave(9)
        draw = torch.Generator().manual_seed(0)
        rows, heads, tokens, rank = 2, 2, 200, len(bits)
        encoder = ChannelCodes(torch.rand(rank, generator=draw).sort(descending=True).values, bits)
        z = torch.randn(rows, 1, tokens, rank, generator=draw) * encoder.deviation
        axes: Tensor | PackedAxes = torch.randn(1, rank, heads, width, generator=draw) / 8
        if fine is not None:
            codes, parts = (
                torch.randint(-127, 128, (n, heads, width), generator=draw).to(torch.int8) for n in (rank, fine)
            )
            sizes = torch.rand(rank, heads, generator=draw), torch.rand(heads, width, generator=draw)
            axes = PackedAxes(codes, parts, sizes[0] / 127, sizes[1])
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
    """Return True if kernels agree with plain torch."""

    def pairs() -> Iterator[tuple[Tensor, ...]]:
        for fine in (None, 0, 20):
            example = _Example.of(3, 20, 4, mean=True, fine=fine)
            linear, opened = example.linear, (example.decoded, Codes(example.encoder, example.packed))
            for turns in example.turns:
                readers = [reader_of(linear, linear, (each, each), turns, 20, 50, Workspace()) for each in opened]
                yield tuple(each.dot(example.query, example.raw) for each in readers)
                yield tuple(each.mix(example.weights, example.raw) for each in readers)

    return compiled.agree(pairs)


@functools.cache
def _agrees_on(device: torch.device, queries: int, width: int, turning: int, *, mean: bool) -> bool:
    """Return True if Triton's kernels agree on a device with plain torch on the processor. For each size of heads: it
    has kernels of its own, which may be too large for this device."""

    def pairs() -> Iterator[tuple[Tensor, ...]]:
        example = _Example.of(queries, width, turning, mean=mean)
        encoder, packed, linear, _, query, _, weights = example
        weights = weights[..., : packed.tokens]
        places = torch.arange(packed.tokens).expand(*query.shape[:2], -1)
        packed = packed.mapped(lambda part: part.to(device))
        there = Linear("latent", linear.rows().to(device), None if linear.mean is None else linear.mean.to(device))
        z, codes = example.decoded, DeviceCodes(encoder.to(device), packed)
        for turns in example.turns:
            plain = LatentReader(linear, linear, (z, z), turns, 20, 50)
            reader = TritonReader(there, there, (codes, codes), turns.to(device), 20, 50, lambda *sizes, **known: True)
            yield plain._rough(query), reader._rough(query.to(device)).cpu()
            yield plain._weigh(weights), reader._weigh(weights.to(device)).cpu()
            if turns.rotates:
                scores = torch.empty(*query.shape[:3], packed.tokens, device=device)
                reader._score(query.to(device), None, scores)
                yield plain._exact(query, places), scores.cpu()
                some = places[..., 3:50:5]
                yield plain._exact(query, some), reader._exact(query.to(device), some.to(device)).cpu()

    return compiled.agree(pairs, "triton")
