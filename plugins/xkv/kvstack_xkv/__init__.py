"""xKV: keys and values of several layers as shared token factors and bases, which are found for every text.

XKV             the settings
factors.py      the codec: forward and inverse of one group of layers, fitted to a text
svd.py          the decomposition
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvstack import Transform
from kvstack.authoring import BoundTransform, LayerGroups, check, expands

from .factors import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["XKV"]

LAYERS = 4.5
"""Layers in a group by default: the paper's 4 where that divides their number, or rather 5 than 3."""
KEEP = 0.25
VALUES_SHARE = 0.6
"""Of a token's numbers, where `keep` decides: K:V = 1:1.5, the paper's ratio."""


@dataclass(frozen=True, repr=False)
class XKV(Transform):
    """Store the keys of a group of layers as one short row per token times bases found for this very text; their values
    likewise.

    Args:
        rank: numbers a token keeps for the keys of a group and for its values, a pair (`xkv:512/768` in a spec). A text
            stays raw until twice as many tokens as the larger rank can be sealed. What is above the channels of a group
            is cut. Default: from `keep`.
        layers: adjacent full-attention layers in a group; default a divisor of their number near 4.
        keep: share of a token's numbers that is KEPT, in (0, 1], two fifths for keys and three for values (default
            0.25). The bases are extra: a short text needs more numbers for them than for its tokens.
        decode: stores later tokens. `fold` (default): they are projected on the bases, block by block. `dense`
            (the paper's): only the first block that is sealed is decomposed, the prompt or, where that is short, the
            prompt and a part of the answer. All that comes later stays raw.
        refit: with `fold`: a block of which the bases leave out this much more than they left of the tokens they were
            fitted to makes the stack fit again, to the decoded old tokens and the new ones: a share of the variance of
            those tokens, of keys or of values (default 0.1). None: never.
        svd: `randomized` (default) or `full`. They differ by less than 1 % of the error.
        exact: to answer a single query, the keys of how many tokens are rebuilt for each kv head at most (default
            384): those whose rough scores give them a share of the attention that counts. The others keep their rough
            scores, and all values count. None: all keys are rebuilt.
        rough: leading factors that make the rough scores (default 512).

    Models that cache latents (DeepSeek V2 and V3) have those compressed, with the rank of keys; the rotary key that all
    heads share is stored as it is.

    Source: xKV, arXiv 2503.18893. Differs from the paper: later tokens are compressed too (`decode="dense"`
    leaves them raw); the strength of a channel goes with the bases, not with the tokens; sinks, and the window at the
    prompt's end, stay raw; tokens whose keys are
    not rebuilt for a query have rough scores, where the paper picks chunks of 8 by their mean keys and leaves the other
    tokens out.

    Example:
        >>> from kvstack import KVStack, Quant
        >>> KVStack([XKV((512, 768)), Quant(4)])
        KVStack([XKV(rank=(512, 768)), Quant(bits=4)])
    """

    rank: tuple[int, int] | None = None
    layers: int | None = None
    keep: float | None = None
    decode: Literal["fold", "dense"] = "fold"
    refit: float | None = 0.1
    svd: Literal["randomized", "full"] = "randomized"
    exact: int | None = 384
    rough: int = 512

    name = "xkv"
    source = "arXiv 2503.18893"
    saves = "layers: factors for several"
    unrotated = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, list):  # settings travel as JSON
            object.__setattr__(self, "rank", tuple(self.rank))
        rank, keep, refit = self.rank, self.keep, self.refit
        pair = isinstance(rank, tuple) and len(rank) == 2 and all(_counts(r) for r in rank)
        check(rank is None or pair, self, "rank is a pair, of keys and of values.", "Use rank=(512, 768).")
        share = isinstance(keep, int | float) and not isinstance(keep, bool) and 0 < keep <= 1
        check(keep is None or share, self, "keep is the share of the numbers that stays, in (0, 1].", "Use keep=0.25.")
        check(rank is None or keep is None, self, "rank and keep both say how much stays.", "Give one of them.")
        check(self.layers is None or _counts(self.layers), self, "layers counts layers.", "Use 1 or more.")
        check(self.decode in ("fold", "dense"), self, f"{self.decode!r} is not a way to go on.", 'Use "fold".')
        above = isinstance(refit, int | float) and not isinstance(refit, bool) and refit > 0
        check(refit is None or above, self, "refit is a share of energy above 0.", "Use refit=0.1, or None for never.")
        check(self.svd in ("randomized", "full"), self, f"{self.svd!r} decomposes nothing.", 'Use "randomized".')
        exact = self.exact is None or _counts(self.exact)
        check(exact, self, "exact counts tokens.", "Use exact=384, or None for all.")
        check(_counts(self.rough), self, "rough counts channels.", "Use rough=512.")

    def bind(self, model: PreTrainedModel, layers: Sequence[int] | None = None) -> BoundTransform:
        groups = LayerGroups(model, self.layers, layers, near=LAYERS)
        # multi-head latent attention caches (latent, rotary key) and expands them after reading
        latents = all(expands(groups.modules[i]) for i in groups.full)
        codec = Factors(self, caches_latents=latents)
        return BoundTransform(self, groups.size, unrotated=groups.rotates and not latents, codec=codec)

    def ranks(self, numbers: Sequence[int]) -> list[int]:
        """Ranks of keys and of values, of which a token has `numbers` in a group; of the keys alone where it has no
        values."""
        if self.rank is not None:
            return [min(rank, n) for rank, n in zip(self.rank, numbers, strict=False)]  # latents have no values
        total = max(2, round((self.keep or KEEP) * sum(numbers)))
        if len(numbers) == 1:
            return [total]
        values = max(1, min(numbers[1], round(VALUES_SHARE * total)))  # keys get what values have no use for
        return [min(numbers[0], total - values), values]


def _counts(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
