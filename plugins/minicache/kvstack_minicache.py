"""MiniCache: pairs of adjacent layers share the directions of their keys and values; each layer keeps its lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvstack import KV, BindError, Latent, Transform
from kvstack.authoring import (
    BoundTransform,
    LayerGroups,
    ReadsDirectly,
    cached_shapes,
    check,
    check_places,
    fitting,
    saturated,
    take_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MiniCache"]

ROLES: tuple[Literal["keys", "values"], ...] = ("keys", "values")
NORMS = "norms"
TOGETHER = 64
"""Tokens of which every head retains the same number."""
OPPOSITE = 1e-6
"""Vectors of which less than this is left between them have no direction in between."""


@dataclass(frozen=True, repr=False)
class MiniCache(Transform):
    """Merge two adjacent layers, token by token and head by head: one direction for both, a length for each.

        unit vectors a, b of the shallower and the deeper layer's key (or value), angle W between them
        stored:  e = sin((1-t)W)/sin(W) a + sin(tW)/sin(W) b,  and the lengths of both
        read:    e times the layer's own length

    Tokens whose directions differ most are retained: e is then the deeper layer's own direction, and the shallower
    layer's key (or value) is held next to it as it was, unquantized. Each head retains its own, of keys and of values,
    as many in every 64 tokens.

    Args:
        start: share of the model's layers, counted from the input, that is left alone (default 0.5): these go to the
            encoder as they would without a transform. The rest is merged in pairs; of an odd number of layers, the
            last is left alone too.
        t: the place of the merged direction: 0 is the shallower layer's, 1 the deeper one's (default 0.6).
        retain: share of the tokens that is retained (default 0.05), to the nearest 64th; above 0 at least one of 64.

    Keys are merged as they are cached. Both layers have rotated a token's key by the same angles, and an interpolation
    between two rotated vectors is the rotated interpolation, so rotary embedding makes no difference.

    Source: MiniCache, arXiv 2405.14366. Differs from the paper: a share of each head's tokens is retained, not all
    beyond a threshold on the angle; the divergent ones are, where one published variant retains the similar; new
    tokens are merged too, when they leave the window.

    Example:
        >>> from kvstack import KVStack, Quant
        >>> KVStack([MiniCache(), Quant(4)])
        KVStack([MiniCache(), Quant(bits=4)])
    """

    start: float = 0.5
    t: float = 0.6
    retain: float = 0.05

    name = "minicache"
    source = "arXiv 2405.14366"
    saves = "layers: one direction for two"
    layers = None  # two, once bound

    def __post_init__(self) -> None:
        for name, value, what in (
            ("start", self.start, "the share of the layers that is left alone"),
            ("t", self.t, "a place between two directions"),
            ("retain", self.retain, "the share of the tokens that is retained"),
        ):
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
            check(fits, self, f"{name} is {what}, from 0 to 1.", f"Use {name}={getattr(type(self), name)}.")

    @property
    def retained(self) -> int:
        """Tokens of every 64 that a head retains."""
        return max(1, round(self.retain * TOGETHER)) if self.retain else 0

    def bind(self, model: PreTrainedModel, layers: Sequence[int] | None = None) -> BoundTransform:
        full, name = LayerGroups(model, 1, layers).full, type(model).__name__
        shapes = cached_shapes(model)
        for one, other in zip(full[::2], full[1::2], strict=False):  # an odd one is left alone
            if shapes[one] != shapes[other]:
                raise BindError(
                    f"{self!r} pairs layers {one} and {other} of {name}, and they hold {shapes[one]} and "
                    f"{shapes[other]}. Leave it out for this model."
                )
        alone = 2 * math.ceil(self.start * len(full) / 2 - 1e-9)
        return BoundMiniCache(self, full[alone] if alone < len(full) else full[-1] + 1)


# ---- for a model


class BoundMiniCache(BoundTransform):
    """MiniCache for one model: pairs of layers are merged from layer `first` on."""

    def __init__(self, stage: MiniCache, first: int) -> None:
        super().__init__(stage, 2, remainder=True)
        self.first = first
        self._merged, self._alone = Merged(stage), {layers: SideBySide(stage, layers) for layers in (1, 2)}

    def for_group(self, layers: Sequence[int]) -> Pair:
        return self._merged if len(layers) == 2 and layers[0] >= self.first else self._alone[len(layers)]


class Pair(ReadsDirectly):
    """The codec of two layers, or of one that is left over."""

    reads_room = True

    def __init__(self, stage: MiniCache) -> None:
        self.granule = self.latent_multiple = TOGETHER if stage.retained else 1

    def rebuilt(self, latents: Mapping[str, Tensor], role: str, layer: int) -> Tensor:
        """Keys or values (B, H, T, D) of one layer."""
        raise NotImplementedError

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        return KV(*(self.rebuilt(latents, role, layer) for role in ROLES))

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        return self.rebuilt(latents, "keys", layer)

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        return torch.matmul(weights, self.rebuilt(latents, "values", layer).to(weights.dtype))


class SideBySide(Pair):
    """Layers that are left alone: the heads of one behind those of the other."""

    def __init__(self, stage: MiniCache, layers: int) -> None:
        super().__init__(stage)
        self.layers = layers

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        return {role: Latent(torch.cat(_together(group, role), dim=1)) for role in ROLES}

    def rebuilt(self, latents: Mapping[str, Tensor], role: str, layer: int) -> Tensor:
        return latents[role].chunk(self.layers, dim=1)[layer]


class Merged(Pair):
    """Two layers with one direction for both and a length for each."""

    def __init__(self, stage: MiniCache) -> None:
        super().__init__(stage)
        self.t, self.retained = stage.t, stage.retained

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        latents: dict[str, Latent] = {}
        norms = []
        for role in ROLES:
            shallow, deep = _together(group, role)
            (a, length), (b, other) = parted(shallow), parted(deep)
            merged, angle = slerp(a, b, self.t)
            norms += [length, other]
            if self.retained:
                within, index = self._divergent(angle)
                merged = merged.scatter(2, _wide(index, merged), take_tokens(b, index))
                latents[f"unmerged {role}"] = Latent(take_tokens(shallow, index), exact=True)
                latents[f"places of {role}"] = Latent(within.to(torch.uint8).unsqueeze(-1), exact=True)
            latents[role] = Latent(merged.to(shallow.dtype))
        lengths = torch.stack(norms, dim=-1).clamp_max(torch.finfo(torch.float32).max)
        latents[NORMS] = Latent(fitting(lengths, group[0].keys.dtype), exact=True)
        return latents

    def rebuilt(self, latents: Mapping[str, Tensor], role: str, layer: int) -> Tensor:
        data = latents[role]
        number = 2 * (role == "values") + layer
        x = saturated(data.float() * latents[NORMS][..., number : number + 1].float(), data.dtype)
        if layer or not self.retained:
            return x
        index = _in_text(latents[f"places of {role}"].squeeze(-1).long().unflatten(2, (-1, self.retained)))
        return x.scatter(2, _wide(index, x), latents[f"unmerged {role}"].to(x.dtype))

    def check_latents(self, latents: Mapping[str, Tensor]) -> None:
        for role in ROLES if self.retained else ():
            check_places(latents[f"places of {role}"][..., 0], self.retained, TOGETHER, f"retained {role}")

    def _divergent(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of widest `angle` (B, H, T), as many in every granule: their places in it and their indices,
        (B, H, n) each, ascending. Of equal ones the older."""
        order = angle.unflatten(2, (-1, TOGETHER)).argsort(dim=-1, descending=True, stable=True)
        within = order[..., : self.retained].sort(dim=-1).values
        return within.flatten(2), _in_text(within)


def _together(group: Sequence[KV], role: str) -> list[Tensor]:
    """Keys or values (B, H, T, D) of all layers, on the device of the first."""
    found = [getattr(kv, role) for kv in group]
    return [x.to(found[0].device) for x in found]


def _in_text(within: Tensor) -> Tensor:
    """Places in granules (B, H, granules, n) -> indices of tokens (B, H, granules * n)."""
    first = TOGETHER * torch.arange(within.shape[2], device=within.device)
    return (within + first[:, None]).flatten(2)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """`index` (B, H, n) for all channels of `x` (B, H, T, D)."""
    return index.unsqueeze(-1).expand(*index.shape, x.shape[-1])


def parted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (..., D) and lengths (...) of `x`, float32; a zero vector has no direction and stays zero."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)  # squares of very large or small numbers would not fit
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1), (largest * length).squeeze(-1)


def slerp(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Spherical interpolation of unit vectors (..., D): the unit vector a share `t` of the way from `a` to `b`, and
    the angle (...) between them.

    Where one of them is zero it is the other. Between opposite vectors lies no direction: it is the nearer one then.
    """
    a, b = torch.where(_none(a), b, a), torch.where(_none(b), a, b)
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))  # exact near 0, where acos is not
    share, rest = (part * torch.sinc(part / math.pi * angle).unsqueeze(-1) for part in (t, 1 - t))
    between = rest * a + share * b  # sin(tW)/W: a common factor goes with the length
    length = between.norm(dim=-1, keepdim=True)
    unit = between / length.clamp_min(OPPOSITE)
    return torch.where(length > OPPOSITE, unit, b if t >= 0.5 else a), angle


def _none(x: Tensor) -> Tensor:
    """(..., 1): vectors that are zero."""
    return (x == 0).all(dim=-1, keepdim=True)
