"""Reading latents without rebuilding all keys: rough scores of all tokens, exact keys of those that matter.

    keys of a layer, before rotation     k = z @ axes + mean           z (T, R), channels by falling importance
    score of a token                     s = q . rotate(k, position)

Rebuilding costs R * D for every token and kv head. But the rotation may change sides, s = turn(q, -position) . k, and
is nearly the same for the tokens of a block. So a block is scored with a few vectors of R numbers, and no key is made:

    rough     u = axes @ turn(q, -middle of the block);  s ~ z . u + turn(q) . mean      leading channels only
    choose    the tokens of highest rough scores, each kv head its own
    exact     rebuild and rotate their keys, and put exact scores in their places
    weigh     all tokens take part in the softmax and in the values, (weights @ z) @ axes

Source: keys that are rebuilt for chosen tokens are xKV's (arXiv 2503.18893, section 4.3) and SALS's (arXiv 2510.24273);
here the other tokens keep their rough scores instead of none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..abilities import Linear
from ..encode.channel_codes import ChannelCodes
from ..floats import wide
from ..packed import Packed
from ..stage import Encoder
from ..types import Rotation, take_tokens
from ..workspace import Workspace
from . import compiled
from .sizes import STEP, TILE, parts

__all__ = ["Decoded", "LatentReader", "Opened", "opened", "reads_with"]

BLOCK = 16
"""Tokens that are scored with one rotation."""
SHARES = 100
"""Weights below an even share by this factor are left out of the values: together they are less than a hundredth of the
attention. In texts of thousands of tokens they are nearly half of all."""


# ---- one latent, open for the reading of one forward


class Opened(Protocol):
    """Encoded tokens of one latent."""

    tokens: int

    def products(self, vectors: Tensor, block: int) -> Tensor:
        """Products of every token's leading channels with the vectors of its block: (B, blocks, heads, r) -> (B, heads,
        T)."""

    def at(self, places: Tensor) -> Tensor:
        """All channels of the tokens at `places` (B, n): (B, n, R)."""

    def mixed(self, weights: Tensor, shares: int = 0) -> Tensor:
        """Weighted sums of all tokens: (B, heads, T) -> (B, heads, R). Weights below an even share, 1 / T, by this
        factor may be left out; 0: none."""


def reads_with(encoder: Encoder, device: torch.device) -> str:
    """What reads the latents that an encoder has packed on `device`."""
    compiles = isinstance(encoder, ChannelCodes) and device.type == "cpu" and _agrees()
    return "numba" if compiles else "torch"


def opened(encoder: Encoder, packed: Packed, decoded: Callable[[], Tensor], work: Workspace) -> Opened:
    """A latent (B, 1, T, R), read in place where there are kernels for its codes, or else decoded once."""
    device = next(iter(packed.parts.values())).device
    if isinstance(encoder, ChannelCodes) and reads_with(encoder, device) == "numba":
        return CompiledChannels(encoder, packed, work)
    return Decoded(decoded())


@functools.cache
def _agrees() -> bool:
    """Whether kernels compute what plain torch does."""
    bits = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1], dtype=torch.uint8).repeat_interleave(9)
    draw = torch.Generator().manual_seed(0)
    encoder = ChannelCodes(torch.rand(len(bits), generator=draw).sort(descending=True).values, bits)
    packed = encoder.encode(torch.randn(2, 1, 40, len(bits), generator=draw) * encoder.deviation, "latent")
    vectors, weights = torch.randn(2, 3, 4, 70, generator=draw), torch.rand(2, 4, 40, generator=draw)
    places = torch.tensor([[0, 39, 7], [8, 9, 31]])

    def pairs() -> Iterator[tuple[Tensor, ...]]:
        readers = Decoded(encoder.decode(packed, "latent")), CompiledChannels(encoder, packed, Workspace())
        yield tuple(each.products(vectors, 16) for each in readers)
        yield tuple(each.at(places) for each in readers)
        yield tuple(each.mixed(weights) for each in readers)

    return compiled.agree(pairs)


class Decoded:
    """A latent as plain numbers, (B, 1, T, R)."""

    def __init__(self, z: Tensor) -> None:
        self.z = wide(z.squeeze(1))
        self.tokens = z.shape[2]

    def products(self, vectors: Tensor, block: int) -> Tensor:
        leading = vectors.shape[3]
        z, rest = self.z[..., :leading], -self.tokens % block
        if rest:
            z = torch.nn.functional.pad(z, (0, 0, 0, rest))
        found = vectors.to(z) @ z.unflatten(1, (-1, block)).mT  # (B, blocks, heads, block)
        return found.transpose(1, 2).flatten(2)[..., : self.tokens]

    def at(self, places: Tensor) -> Tensor:
        return take_tokens(self.z.unsqueeze(1), places.unsqueeze(1))[:, 0]

    def mixed(self, weights: Tensor, shares: int = 0) -> Tensor:
        return weights.to(self.z) @ self.z


class CompiledChannels:
    """A latent in codes of channels, read in place by compiled kernels."""

    def __init__(self, encoder: ChannelCodes, packed: Packed, work: Workspace) -> None:
        self.encoder, self.work, self.tokens = encoder, work, packed.tokens
        self.codes, self.gains = (packed.parts[name].contiguous() for name in ("codes", "gains"))
        self.rows, _, self.units = self.codes.shape[:3]
        self.runs = torch.tensor(encoder.runs)

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.codes.shape[3], self.gains.shape[3]

    def products(self, vectors: Tensor, block: int) -> Tensor:
        b, blocks, heads, leading = vectors.shape
        width = -(-leading // TILE) * TILE
        scaled = vectors.new_zeros(b, blocks, heads, width)
        torch.mul(vectors, self.encoder.steps[:leading], out=scaled[..., :leading])
        pieces, out = parts(self.rows, self.units), torch.empty(b, heads, self.tokens)
        compiled.kernel("channels_dot")(
            b * pieces, pieces, scaled, self.codes, self.gains, out, self._scratch(width), self.runs, len(self.runs),
            heads, width, self.units, block // 8, blocks, *self._sizes,
        )  # fmt: skip
        return out

    def at(self, places: Tensor) -> Tensor:
        b, n = places.shape
        out = torch.empty(b, n, self.encoder.rank)
        compiled.kernel("channels_at")(
            b * n, n, places.contiguous(), self.codes, self.gains, out, self.runs, len(self.runs), self.encoder.rank,
            self.units, *self._sizes,
        )  # fmt: skip
        return out.mul_(self.encoder.steps)

    def mixed(self, weights: Tensor, shares: int = 0) -> Tensor:
        b, heads, _ = weights.shape
        rank = self.encoder.rank
        width, pieces = -(-rank // TILE) * TILE, parts(self.rows, self.units)
        out = torch.empty(b, pieces, heads, width)
        compiled.kernel("channels_mix")(
            b * pieces, pieces, weights.float().contiguous(), self.codes, self.gains, out, self._scratch(width),
            self.runs, len(self.runs), heads, width, self.units, *self._sizes, shares,
        )  # fmt: skip
        return out.sum(1)[..., :rank] * self.encoder.steps

    def _scratch(self, width: int) -> Tensor:
        size = (torch.get_num_threads(), 8 * (width + STEP))
        return self.work.get("rows", size, torch.float32, self.codes.device)


# ---- one layer


class LatentReader:
    """Answers one query from the latents of one layer.

    Args:
        keys, values: how the layer's keys and values come from latents; `keys` before rotation.
        latents: the two latents, open.
        rope: how keys are rotated; None: not at all.
        positions: of the tokens, (B or 1, 1, T) or (B or 1, axes, 1, T).
        exact, rough: tokens whose keys are rebuilt, and channels that score the others.
    """

    def __init__(
        self,
        keys: Linear,
        values: Linear,
        latents: tuple[Opened, Opened],
        rope: Rotation | None,
        positions: Tensor,
        exact: int,
        rough: int,
    ) -> None:
        self.keys, self.values, self.rope, self.positions = keys, values, rope, positions
        self.for_keys, self.for_values = latents
        self.exact, self.rough = exact, rough

    def dot(self, query: Tensor) -> Tensor:
        """A scaled `query` (B, H, G, D) times the keys: (B, H, G, T)."""
        b, h, g, _ = query.shape
        tokens = self.for_keys.tokens
        if self.rope is None:  # the rotation that is missing is exact for all tokens
            return self._rough(query, self.keys.axes.shape[1], tokens + -tokens % 8)
        if tokens <= self.exact:
            every = torch.arange(tokens, device=query.device).expand(b, h, tokens)
            return self._exact(query, every)
        scores = self._rough(query, min(self.rough, self.keys.axes.shape[1]), BLOCK)
        # of any query of a kv head, as it counts in the softmax of this query
        matters = (scores - scores.logsumexp(-1, keepdim=True)).amax(2)
        places = matters.topk(self.exact, dim=-1, sorted=False).indices  # (B, H, n)
        return scores.scatter_(3, places.unsqueeze(2).expand(b, h, g, -1), self._exact(query, places))

    def mix(self, weights: Tensor) -> Tensor:
        """`weights` (B, H, G, T) times the values: (B, H, G, D)."""
        h, g = weights.shape[1:3]
        shares = SHARES if self.for_values.tokens > self.exact else 0  # where all keys are exact, so are the values
        mixed = self.for_values.mixed(weights.flatten(1, 2), shares).unflatten(1, (h, g))  # (B, H, G, R)
        out = mixed @ self.values.axes.to(mixed.dtype).transpose(1, 2)
        if self.values.mean is None:
            return out
        return out + weights.sum(-1, keepdim=True) * self.values.mean.to(mixed.dtype).unsqueeze(1)

    def _rough(self, query: Tensor, channels: int, block: int) -> Tensor:
        h, g = query.shape[1:3]
        if self.rope is None:
            turned = query.unsqueeze(2)  # (B, H, 1, G, D)
        else:
            turned = self.rope.facing(query.flatten(1, 2), self.positions, block).unflatten(1, (h, g)).transpose(2, 3)
        blocks = turned.shape[2]
        axes = self.keys.axes[:, :channels].to(query.dtype)  # (B or 1, r, H, D)
        vectors = turned.flatten(2, 3) @ axes.permute(0, 2, 3, 1)  # (B, H, blocks * G, r)
        vectors = vectors.unflatten(2, (blocks, g)).transpose(1, 2).flatten(2, 3)  # (B, blocks, heads, r)
        scores = self.for_keys.products(vectors, block).unflatten(1, (h, g))
        if self.keys.mean is None:
            return scores
        base = (turned * self.keys.mean.to(query.dtype)[:, None, None]).sum(-1).transpose(2, 3)  # (B, H, G, blocks)
        return scores + base.repeat_interleave(block, dim=-1)[..., : scores.shape[-1]]

    def _exact(self, query: Tensor, places: Tensor) -> Tensor:
        """Scores of the tokens at `places` (B, H, n), from keys that are rebuilt: (B, H, G, n)."""
        h, n = places.shape[1:]
        z = self.for_keys.at(places.flatten(1)).unflatten(1, (h, n))
        keys = z @ self.keys.axes.to(z.dtype).transpose(1, 2)  # (B, H, n, D)
        if self.keys.mean is not None:
            keys = keys + self.keys.mean.to(z.dtype).unsqueeze(1)
        if self.rope is not None:
            keys = self.rope.rotate_at(keys, self.positions, places)
        return query @ keys.mT
