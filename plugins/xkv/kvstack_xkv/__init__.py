"""xKV: keys and values of several layers as shared token factors and bases, found anew for every text.

    x (T, N)   un-rotated keys of all layers of a group, side by side; their values likewise       N = G*H*D
    x ~ z b    z (T, r)  token factors: one row a token, whatever the layer. Encoders and eviction work on these
               b (r, N)  bases of this text, cut into those of each layer and head

Rows of b are singular vectors times the root mean square of their factor, so the channels of z are equally strong. An
encoder that shares a scale between channels then errs by the same share of each; had z the singular values, one step
for all would have to be as wide as the strongest channel needs it. Encoders with a scale a channel do not care.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from kvstack import KV, BindError, Latent, Transform, UseError
from kvstack.model.hooks import expands
from kvstack.model.layers import Grouping
from kvstack.stage import Turn, check
from kvstack.types import take_tokens

from .svd import leading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["XKV"]

KEYS, VALUES = "key", "value"
KEEP = 0.25
VALUES_SHARE = 0.6
"""Of a token's numbers, where `keep` decides: K:V = 1:1.5, the paper's ratio."""
WEAKEST = 1e-3
"""Of the strongest channel: a later token's factors are divided by the strength, and must fit into half precision."""
MOST = "left out at most"
"""The energy that bases may leave out of a token, on the mean over a block; (B, 2), of keys and of values."""
CHUNK = 8
"""Tokens that are picked together; the paper's."""


@dataclass(frozen=True, repr=False)
class XKV(Transform):
    """Store the keys of a group of layers as one short row per token times bases found for this very text; their values
    likewise.

    Args:
        rank: numbers a token keeps for the keys of a group and for its values, a pair (`xkv:512/768` in a spec). A text
            stays raw until twice as many tokens as the larger rank can be sealed. What is above the channels of a group
            is cut. Default: from `keep`.
        layers: adjacent full-attention layers in a group (default 4).
        keep: share of a token's numbers that is KEPT, in (0, 1], two fifths for keys and three for values (default
            0.25). The bases are extra: a short text needs more numbers for them than for its tokens.
        decode: what becomes of later tokens. `fold` (default): they are projected on the bases, block by block. `dense`
            (the paper's): only the first block that is sealed is decomposed, the prompt or, where that is short, the
            prompt and a part of the answer. All that comes later stays raw.
        refit: with `fold`: a block of which the bases leave out this much more than they left of the tokens they were
            fitted to makes the stack fit them anew, to the decoded old tokens and the new ones: a share of the variance
            of those tokens, of keys or of values (default 0.1). None: never.
        svd: `randomized` (default) or `full`. They differ by less than 1 % of the error.
        select: how many tokens are rebuilt to answer a single query, beside those that are raw: the chunks of 8 whose
            mean keys it looks at most, for each kv head (default None: all). The mean keys are extra: an eighth of the
            keys, in the model's type.

    Models that cache latents (DeepSeek V2 and V3) have those compressed, with the rank of keys; the rotary key that all
    heads share is stored as it is.

    Source: xKV, arXiv 2503.18893. Differs from the paper: later tokens are compressed too (`decode="dense"`
    leaves them raw); the strength of a channel goes with the bases, not with the tokens; sinks, and the window at the
    prompt's end, stay raw; mean keys are those of un-rotated keys, turned to the middle of their chunk.

    Example:
        >>> from kvstack import KVStack, Quant
        >>> KVStack([XKV((512, 768)), Quant(4)])
        KVStack([XKV(rank=(512, 768)), Quant(bits=4)])
    """

    rank: tuple[int, int] | None = None
    layers: int = 4
    keep: float | None = None
    decode: Literal["fold", "dense"] = "fold"
    refit: float | None = 0.1
    svd: Literal["randomized", "full"] = "randomized"
    select: int | None = None

    _caches_latents: bool = field(init=False, repr=False, compare=False, default=False)
    _fitted: Mapping[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    name = "xkv"
    source = "arXiv 2503.18893"
    saves = "layers: factors for several"
    unrotated = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, list):  # settings travel as JSON
            object.__setattr__(self, "rank", tuple(self.rank))
        rank, keep, refit, select = self.rank, self.keep, self.refit, self.select
        pair = isinstance(rank, tuple) and len(rank) == 2 and all(_counts(r) for r in rank)
        check(rank is None or pair, self, "rank is a pair, of keys and of values.", "Use rank=(512, 768).")
        share = isinstance(keep, int | float) and not isinstance(keep, bool) and 0 < keep <= 1
        check(keep is None or share, self, "keep is the share of the numbers that stays, in (0, 1].", "Use keep=0.25.")
        check(rank is None or keep is None, self, "rank and keep both say how much stays.", "Give one of them.")
        check(_counts(self.layers), self, "layers counts layers.", "Use 1 or more.")
        check(self.decode in ("fold", "dense"), self, f"{self.decode!r} is no way to go on.", 'Use "fold".')
        above = isinstance(refit, int | float) and not isinstance(refit, bool) and refit > 0
        check(refit is None or above, self, "refit is a share of energy above 0.", "Use refit=0.1, or None for never.")
        check(self.svd in ("randomized", "full"), self, f"{self.svd!r} decomposes nothing.", 'Use "randomized".')
        check(select is None or _counts(select, CHUNK), self, "select counts tokens.", f"Use {CHUNK} or more.")

    # ---- fitted to a model, then to a text

    @property
    def once(self) -> bool:  # type: ignore[override]
        return self.decode == "dense"

    @property
    def granule(self) -> int:  # type: ignore[override]
        return CHUNK if self.select else 1

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.granule  # what is encoded has all tokens of it

    def bind(self, model: PreTrainedModel) -> Self:
        plan = Grouping(model, self.layers)
        # multi-head latent attention caches (latent, rotary key) and expands them after reading
        latents = all(expands(plan.modules[i]) for i in plan.full)
        if latents and self.select:
            raise BindError(
                f"{self!r}: {type(model).__name__} expands what it caches itself, so it always reads all of it. "
                "Leave select out."
            )
        return self._with(_caches_latents=latents, unrotated=plan.rotates and not latents)

    def first(self, group: Sequence[KV]) -> int:
        # bases of fewer tokens fit these too well to serve others, and the two of them take more than the raw tokens
        return 2 * max(self._ranks(_widths(self._roles(group))))

    def fit(self, group: Sequence[KV], decoded: int = 0) -> Self:
        roles = self._roles(group)
        ranks = self._ranks(_widths(roles))
        found: dict[str, Tensor] = {}
        spread = []
        for (role, layers), rank in zip(roles.items(), ranks, strict=True):
            x = _flat(layers)
            if not bool(torch.isfinite(x).all()):
                why = "Check the model's dtype (float16 overflows) and its input."
                raise UseError(f"{self!r}: {role}s hold NaN or infinity. {why}")
            spread.append(x.var(dim=1, correction=0).sum(dim=-1))  # (B,)
            axes = leading(x, min(rank, *x.shape[1:]), self.svd == "full")  # (B, r, N)
            strength = (x @ axes.mT).square().mean(dim=1).sqrt()  # (B, r)
            strength = strength.clamp_min(WEAKEST * strength.amax(dim=1, keepdim=True))
            parts = (strength.unsqueeze(-1) * axes).split([y.shape[1] * y.shape[3] for y in layers], dim=-1)
            for i, (part, like) in enumerate(zip(parts, layers, strict=True)):
                base = part.clone(memory_format=torch.contiguous_format).to(like.dtype)
                found[f"{role} {i}"] = base.unflatten(-1, (like.shape[1], like.shape[3]))
        fitted = self.hold(found)
        if self.refit is not None:
            # decoded tokens lie within the bases that stored them, so only the exact ones tell what bases leave out
            exact = [KV(kv.keys[:, :, decoded:], kv.values[:, :, decoded:]) for kv in group]
            most = fitted._left_out(exact) + self.refit * torch.stack(spread, dim=-1)
            found[MOST] = torch.maximum(most, self._fitted[MOST]) if decoded else most
        return fitted

    def strays(self, group: Sequence[KV]) -> bool:
        if self.refit is None:
            return False
        return bool((self._left_out(group) > self._fitted[MOST]).any())

    @property
    def fitted(self) -> Mapping[str, Tensor]:
        return self._fitted

    def hold(self, fitted: Mapping[str, Tensor]) -> Self:
        return self._with(_fitted=fitted)

    def _with(self, **changes: Any) -> Self:
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other

    def _ranks(self, numbers: Sequence[int]) -> list[int]:
        """Ranks of keys and of values, of which a token has `numbers` in the group."""
        if self.rank is not None:
            return [min(rank, n) for rank, n in zip(self.rank, numbers, strict=False)]  # latents have no values
        total = max(2, round((self.keep or KEEP) * sum(numbers)))
        if len(numbers) == 1:
            return [total]
        values = max(1, min(numbers[1], round(VALUES_SHARE * total)))  # keys get what values have no use for
        return [min(numbers[0], total - values), values]

    def _roles(self, group: Sequence[KV]) -> dict[str, list[Tensor]]:
        """What is decomposed together: (B, H, T, D) of every layer."""
        roles = {KEYS: [kv.keys for kv in group]}
        return roles if self._caches_latents else roles | {VALUES: [kv.values for kv in group]}

    def _bases(self, role: str) -> Tensor:
        """The bases of all layers side by side, (B, r, N), as they are stored."""
        parts = [base.flatten(2) for name, base in self._fitted.items() if name.startswith(f"{role} ")]
        return torch.cat(parts, dim=-1)

    def _project(self, x: Tensor, role: str) -> Tensor:
        """(B, T, N) -> factors (B, T, r): least squares, since the bases are orthogonal."""
        bases = self._bases(role).to(x.dtype)
        square = bases.square().sum(-1)  # (B, r)
        return x @ bases.mT / square.clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(1)

    def _left_out(self, group: Sequence[KV]) -> Tensor:
        """(B, roles): the energy of a token that the bases leave out, on the mean over these tokens."""
        found = []
        for role, layers in self._roles(group).items():
            x = _flat(layers)
            rest = x.sub_(self._project(x, role) @ self._bases(role).to(x.dtype))
            found.append(rest.square_().sum(dim=-1).mean(dim=-1))
        return torch.stack(found, dim=-1)

    # ---- there and back

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        found = {
            f"{role} factors": Latent(self._project(_flat(layers), role).to(layers[0].dtype).unsqueeze(1))
            for role, layers in self._roles(group).items()
        }
        if self._caches_latents:
            # clone: a slice of one head is a view that would keep all raw tokens alive
            found |= {f"rotary key {i}": Latent(kv.values.clone(), exact=True) for i, kv in enumerate(group)}
        if self.select:
            means = [kv.keys.unflatten(2, (-1, CHUNK)).mean(dim=3) for kv in group]  # (B, H, T / 8, D)
            found |= {f"mean key {i}": Latent(mean, exact=True) for i, mean in enumerate(means)}
        return found

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        if self._caches_latents:
            return KV(self._rebuilt(latents, KEYS, layer), latents[f"rotary key {layer}"])
        return KV(self._rebuilt(latents, KEYS, layer), self._rebuilt(latents, VALUES, layer))

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        return self._rebuilt(latents, KEYS, layer)

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        # models that cache latents never come here: they expand what they read, so they read all of it
        mixed = torch.einsum("bhgt,bhtr->bhgr", weights, latents[f"{VALUES} factors"].to(weights.dtype))
        return torch.einsum("bhgr,brhd->bhgd", mixed, self._fitted[f"{VALUES} {layer}"].to(weights.dtype))

    def pick(
        self, query: Tensor, latents: Mapping[str, Tensor], layer: int, turn: Turn
    ) -> tuple[Mapping[str, Tensor], Tensor] | None:
        held = latents[f"{KEYS} factors"].shape[2]
        if self.select is None or self.select >= held:
            return None
        middles = torch.arange(CHUNK // 2, held, CHUNK, device=query.device)[None, None]
        means = turn(latents[f"mean key {layer}"], middles).to(query)
        looked_at = (query @ means.mT).softmax(dim=-1).amax(dim=2)  # (B, H, chunks): by any query of the kv head
        chunks = looked_at.topk(self.select // CHUNK, dim=-1).indices.sort(dim=-1).values
        places = (chunks.unsqueeze(-1) * CHUNK + torch.arange(CHUNK, device=chunks.device)).flatten(-2)
        heads = means.shape[1]  # each of which has tokens of its own
        picked = {
            name: take_tokens(latents[name].expand(-1, heads, -1, -1), places)
            for name in (f"{KEYS} factors", f"{VALUES} factors")
        }
        return picked, places

    def _rebuilt(self, latents: Mapping[str, Tensor], role: str, layer: int) -> Tensor:
        """(B, H, T, D) from factors (B, 1 or H, T, r) and bases (B, r, H, D)."""
        return torch.einsum("bhtr,brhd->bhtd", latents[f"{role} factors"], self._fitted[f"{role} {layer}"])


def _counts(number: object, least: int = 1) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _widths(roles: Mapping[str, list[Tensor]]) -> list[int]:
    """Numbers of a token in all layers."""
    return [sum(x.shape[1] * x.shape[3] for x in layers) for layers in roles.values()]


def _flat(layers: Sequence[Tensor]) -> Tensor:
    """(B, H, T, D) of several layers side by side, (B, T, N), in float32 at least."""
    flat = torch.cat([x.transpose(1, 2).flatten(2).to(layers[0].device) for x in layers], dim=-1)
    return flat if flat.dtype == torch.float64 else flat.float()
