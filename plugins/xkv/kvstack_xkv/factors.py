"""Token factors and bases of one group of layers, fitted to a text.

    x (T, N)   un-rotated keys of all layers of a group, side by side; their values likewise       N = G*H*D
    x ~ z b    z (T, r)  token factors: one row a token, whatever the layer. Encoders and eviction work on these
               b (r, N)  bases of this text, cut into those of each layer and head

Rows of b are singular vectors times the root mean square of their factor, so the channels of z are equally strong. An
encoder that shares a scale between channels then errs by the same share of each; had z the singular values, one step
for all would have to be as wide as the strongest channel needs it. Encoders with a scale a channel do not care.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from kvstack import KV, Latent, UseError
from kvstack.authoring import Linear, ReadsLinearly, RefitsText, fitting, saturated

from .svd import leading

if TYPE_CHECKING:
    from . import XKV

__all__ = ["Factors"]

KEYS, VALUES = "key", "value"
WEAKEST = 1e-3
"""Of the strongest channel: a later token's factors are divided by the strength, and must fit into half precision."""
MOST = "left out at most"
"""The energy that bases may leave out of a token, on the mean over a block; (B, 2), of keys and of values."""


class Factors(RefitsText, ReadsLinearly):
    """The codec of a group of layers, for any model.

    Args:
        stage: the settings.
        caches_latents: True if the model caches (latent, rotary key): latents are decomposed as keys are, and the
            rotary key that all heads share is stored as it is.
        fitted: bases of each layer, `key 0`, `value 0` and so on, (B, r, H, D), and how much they may leave out;
            empty before `fit`.
    """

    reads_room = True

    def __init__(self, stage: XKV, caches_latents: bool = False, fitted: Mapping[str, Tensor] | None = None) -> None:
        self.stage, self.caches_latents, self.fitted = stage, caches_latents, fitted or {}
        self.exact, self.rough = stage.exact, stage.rough
        self.first_block_only = stage.decode == "dense"

    # ---- fitted to a text

    def min_tokens(self, group: Sequence[KV]) -> int:
        # bases of fewer tokens fit these too well to serve others, and the two of them take more than the raw tokens
        return 2 * max(self.stage.ranks(_widths(self._roles(group))))

    def fit(self, group: Sequence[KV], decoded: int = 0) -> Self:
        roles = self._roles(group)
        ranks = self.stage.ranks(_widths(roles))
        bases: dict[str, Tensor] = {}
        variance = []
        for (role, layers), rank in zip(roles.items(), ranks, strict=True):
            x = _flat(layers)
            if not bool(torch.isfinite(x).all()):
                why = "Check the model's dtype (float16 overflows) and its input."
                raise UseError(f"{self.stage!r}: {role}s hold NaN or infinity. {why}")
            variance.append(x.var(dim=1, correction=0).sum(dim=-1))  # (B,)
            bases |= self._bases_of(role, layers, x, rank)
        fitted = self.with_fitted(bases)
        if self.stage.refit is None:
            return fitted
        # decoded tokens lie within the bases that stored them, so only the exact ones tell what bases leave out
        exact = [KV(kv.keys[:, :, decoded:], kv.values[:, :, decoded:]) for kv in group]
        most = fitted._left_out(exact) + self.stage.refit * torch.stack(variance, dim=-1)
        return self.with_fitted(bases | {MOST: torch.maximum(most, self.fitted[MOST]) if decoded else most})

    def needs_refit(self, group: Sequence[KV]) -> bool:
        if self.stage.refit is None:
            return False
        return bool((self._left_out(group) > self.fitted[MOST]).any())

    def with_fitted(self, fitted: Mapping[str, Tensor]) -> Self:
        return type(self)(self.stage, self.caches_latents, fitted)

    def check_fitted(self, group: Sequence[KV]) -> None:
        roles = self._roles(group)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
        for (role, layers), most in zip(roles.items(), self.stage.ranks(_widths(roles)), strict=True):
            first = self.fitted.get(f"{role} 0")
            rank = min(most, first.shape[1] if first is not None and first.dim() > 1 else 0)
            for i, x in enumerate(layers):
                expected[f"{role} {i}"] = (x.shape[0], rank, x.shape[1], x.shape[3]), x.dtype
        if self.stage.refit is not None:
            expected[MOST] = (len(group[0].keys), len(roles)), None
        found = {name: (tuple(x.shape), x.dtype) for name, x in self.fitted.items()}
        same = found.keys() == expected.keys() and all(
            shape == found[name][0] and dtype in (None, found[name][1]) and 0 not in shape
            for name, (shape, dtype) in expected.items()
        )
        if not same:
            raise UseError(f"the bases are {found}, not {expected}. Save the cache again.")

    def _roles(self, group: Sequence[KV]) -> dict[str, list[Tensor]]:
        """Return the tensors to decompose together: (B, H, T, D) of every layer."""
        roles = {KEYS: [kv.keys for kv in group]}
        return roles if self.caches_latents else roles | {VALUES: [kv.values for kv in group]}

    def _bases_of(self, role: str, layers: Sequence[Tensor], x: Tensor, rank: int) -> dict[str, Tensor]:
        """The leading directions of `x` (B, T, N), the `layers` side by side, cut into those of each layer."""
        axes = leading(x, min(rank, *x.shape[1:]), self.stage.svd == "full")  # (B, r, N)
        strength = (x @ axes.mT).square().mean(dim=1).sqrt()  # (B, r)
        strength = strength.clamp_min(WEAKEST * strength.amax(dim=1, keepdim=True))
        parts = (strength.unsqueeze(-1) * axes).split([y.shape[1] * y.shape[3] for y in layers], dim=-1)
        return {
            f"{role} {i}": fitting(part.clone(memory_format=torch.contiguous_format), like.dtype).unflatten(
                -1, (like.shape[1], like.shape[3])
            )
            for i, (part, like) in enumerate(zip(parts, layers, strict=True))
        }

    def _bases(self, role: str) -> Tensor:
        """The bases of all layers side by side, (B, r, N), as they are stored."""
        parts = [base.flatten(2) for name, base in self.fitted.items() if name.startswith(f"{role} ")]
        return torch.cat(parts, dim=-1)

    def _project(self, x: Tensor, role: str) -> Tensor:
        """(B, T, N) -> factors (B, T, r): least squares, since the bases are orthogonal."""
        bases = self._bases(role).to(x.dtype)
        square = bases.square().sum(-1)  # (B, r)
        return x @ bases.mT / square.clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(1)

    def _left_out(self, group: Sequence[KV]) -> Tensor:
        """(B, roles): the energy of a token that the bases leave out, on the mean over these tokens."""
        energies = []
        for role, layers in self._roles(group).items():
            x = _flat(layers)
            rest = x.sub_(self._project(x, role) @ self._bases(role).to(x.dtype))
            energies.append(rest.square_().sum(dim=-1).mean(dim=-1))
        return torch.stack(energies, dim=-1)

    # ---- there and back

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        latents = {
            f"{role} factors": Latent(fitting(self._project(_flat(layers), role), layers[0].dtype).unsqueeze(1))
            for role, layers in self._roles(group).items()
        }
        if self.caches_latents:
            # clone: a slice of one head is a view that would keep all raw tokens alive
            latents |= {f"rotary key {i}": Latent(kv.values.clone(), exact=True) for i, kv in enumerate(group)}
        return latents

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        if self.caches_latents:
            return KV(self._rebuilt(latents, KEYS, layer), latents[f"rotary key {layer}"])
        return KV(self._rebuilt(latents, KEYS, layer), self._rebuilt(latents, VALUES, layer))

    def _rebuilt(self, latents: Mapping[str, Tensor], role: str, layer: int) -> Tensor:
        """(B, H, T, D) from factors (B, 1 or H, T, r) and bases (B, r, H, D)."""
        factors, bases = latents[f"{role} factors"], self.fitted[f"{role} {layer}"]
        dtype = torch.promote_types(factors.dtype, bases.dtype)
        return saturated(torch.einsum("bhtr,brhd->bhtd", factors.to(dtype), bases.to(dtype)), dtype)

    # ---- reading without rebuilding

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        return self._rebuilt(latents, KEYS, layer)

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        # models that cache latents never come here: they expand what they read, so they read all of it
        mixed = torch.einsum("bhgt,bhtr->bhgr", weights, latents[f"{VALUES} factors"].to(weights.dtype))
        return torch.einsum("bhgr,brhd->bhgd", mixed, self.fitted[f"{VALUES} {layer}"].to(weights.dtype))

    def linear(self, kind: Literal["keys", "values"], layer: int) -> Linear | None:
        if self.caches_latents:
            return None
        role = KEYS if kind == "keys" else VALUES
        return Linear(f"{role} factors", self.fitted[f"{role} {layer}"])


def _widths(roles: Mapping[str, list[Tensor]]) -> list[int]:
    """Numbers of a token in all layers."""
    return [sum(x.shape[1] * x.shape[3] for x in layers) for layers in roles.values()]


def _flat(layers: Sequence[Tensor]) -> Tensor:
    """(B, H, T, D) of several layers side by side, (B, T, N), in float32 at least."""
    flat = torch.cat([x.transpose(1, 2).flatten(2).to(layers[0].device) for x in layers], dim=-1)
    return flat if flat.dtype == torch.float64 else flat.float()
