"""Stages that tests share: small enough to be right at a glance, so that any loss is the pipeline's."""

from dataclasses import dataclass

import torch

from kvstack import KV, Latent, Share, Transform
from kvstack.authoring import BoundTransform, Codec, RefitsText


@dataclass(frozen=True, repr=False)
class Pairs(Transform):
    """Two layers as mean and half difference: lossless."""

    layers: int = 2
    unrotated: bool = True
    name = "pairs"

    def forward(self, group):
        one, other = group
        flat = [torch.cat([kv.keys, kv.values], -1).transpose(1, 2).flatten(2).unsqueeze(1) for kv in (one, other)]
        return {"mean": Latent((flat[0] + flat[1]) / 2), "half": Latent((flat[0] - flat[1]) / 2)}

    def inverse(self, latents, layer):
        sign = 1 if layer == 0 else -1
        both = (latents["mean"] + sign * latents["half"])[:, 0]  # (B, T, H * 2D)
        both = both.unflatten(-1, (2, -1)).transpose(1, 2)
        return KV(*both.chunk(2, dim=-1))


@dataclass(frozen=True, repr=False)
class Centred(Transform):
    """Two layers less the mean of their text: lossless.

    Args:
        once: whether only the first block is sealed.
        far: how far the mean of new tokens may be from the text's before it is fitted anew.
    """

    once: bool = False
    far: float = 1e9
    layers: int = 2
    unrotated: bool = True
    name = "centred"

    def codec(self):
        return CentredCodec(self)


class CentredCodec(RefitsText):
    def __init__(self, stage, fitted=None):
        self.stage, self.fitted, self.first_block_only = stage, fitted or {}, stage.once

    def fit(self, group, decoded=0):
        return self.with_fitted({f"mean {i}": x.mean(2, keepdim=True) for i, x in enumerate(both(group))})

    def needs_refit(self, group):
        means = zip(both(group), self.means, strict=True)
        far = self.stage.far
        return any(bool(((x.mean(2, keepdim=True) - mean).norm(dim=-1) > far).any()) for x, mean in means)

    def with_fitted(self, fitted):
        return type(self)(self.stage, fitted)

    @property
    def means(self):
        return [x for name, x in self.fitted.items() if name.startswith("mean")]

    def forward(self, group):
        return {str(i): Latent(x - mean) for i, (x, mean) in enumerate(zip(both(group), self.means, strict=True))}

    def inverse(self, latents, layer):
        return KV(*(latents[str(layer)] + self.means[layer]).chunk(2, dim=-1))


def both(group):
    return [torch.cat([kv.keys, kv.values], dim=-1) for kv in group]


@dataclass(frozen=True, repr=False)
class Third(Share):
    """Layer `deeper` reads layer `earlier`."""

    deeper: int = 3
    earlier: int = 1
    name = "third"

    def bind(self, model):
        return {self.deeper: self.earlier}


@dataclass(frozen=True, repr=False)
class OfCodec(Transform):
    """A transform whose groups are stored by what `make` builds, bound as it stands."""

    make: type[Codec] = Codec
    layers: int = 2
    unrotated: bool = True
    name = "ofcodec"

    def bind(self, model, layers=None):
        return BoundTransform(self, self.layers, unrotated=self.unrotated, codec=self.make())
