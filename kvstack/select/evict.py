"""The evicting stage: a budget for what a score ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..stage import Score, check
from .choosing import DEFAULT, Select

__all__ = ["Evict"]


@dataclass(frozen=True, repr=False)
class Evict(Select):
    """Keep the tokens that score highest, of those between the stack's sinks and window.

    Args:
        keep: the share of these tokens KEPT, a float in (0, 1], or how many, an int of 1 or more.
        score: the name of a score (`kvstack stages` lists them) or any object with `score(kv, context)`.
        layers: adjacent layers that keep the same tokens; with more than one, all heads of these layers share one
            set. Default None: as many as a transform in the stack stores together, otherwise what suits the score
            (5 for `snapkv`, `lookahead` and `triattention`, 1 for the others).
        share_heads: whether all kv heads of a layer keep the same tokens (default False).
        pool: how the scores of heads and layers that share a set become one: `mean` (default) or `max`, after every
            head's scores have been brought to the same scale.
        refit: whether tokens that stay are made to stand in for those that are dropped: each kv head gets a bias for
            every token (a byte), added to its attention logits, and other values for those that are not compressed yet.
            Queries of the text, as if they came behind it, say which (Attention Matching, arXiv 2602.16284). Default
            False.
        budgets: whether all keep equally many. `equal` (default): every layer and kv head keeps the same number of
            tokens. `layers`: each layer has a budget of its own, and `keep` is the mean. `heads`: each kv head of each
            layer has one. The budgets are found once for the model and the score, on a few texts (the idea of AdaKV,
            arXiv 2407.11550).
        positions: the position that attention sees for a token. `text` (default): its place in the text. `cache`: its
            place among the tokens that are held, 0 for the first (StreamingLLM, arXiv 2309.17453). No position is then
            larger than the number of tokens held, so a text may be longer than the ones that the model was trained on.

    The budget holds while decoding and at every later turn.

    Example:
        >>> from kvstack import Evict, SnapKV
        >>> Evict(0.2), Evict(1024, score=SnapKV(window=16))
        (Evict(keep=0.2), Evict(keep=1024, score=SnapKV(window=16)))
    """

    keep: float | int
    score: Score | str = DEFAULT
    layers: int | None = field(default=None, kw_only=True)
    share_heads: bool = field(default=False, kw_only=True)
    pool: Literal["mean", "max"] = field(default="mean", kw_only=True)
    refit: bool = field(default=False, kw_only=True)
    budgets: Literal["equal", "layers", "heads"] = field(default="equal", kw_only=True)
    positions: Literal["text", "cache"] = field(default="text", kw_only=True)

    name = "evict"
    source = "one paper a score"
    saves = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.keep, float) and 0 < self.keep <= 1
        count = isinstance(self.keep, int) and not isinstance(self.keep, bool) and self.keep >= 1
        check(
            share or count,
            self,
            "keep is what stays: a share in (0, 1] or a count of tokens, an int of 1 or more.",
            "Use keep=0.2 for a fifth of the tokens.",
        )
        layers = self.layers
        counts = layers is None or (isinstance(layers, int) and not isinstance(layers, bool) and layers >= 1)
        check(counts, self, "layers counts layers.", "Use 1 or more.")
        check(isinstance(self.refit, bool), self, "refit is yes or no.", "Use refit=True.")
        known = self.budgets in ("equal", "layers", "heads")
        check(known, self, f"budgets={self.budgets!r} is not known.", 'Use "equal", "layers" or "heads".')
        alone = layers in (None, 1) and not self.share_heads
        check(
            self.budgets != "heads" or alone,
            self,
            "heads that keep the same tokens cannot have budgets of their own.",
            'Leave out layers and share_heads, or use budgets="layers".',
        )
        known = self.positions in ("text", "cache")
        check(known, self, f"positions={self.positions!r} is not known.", 'Use "text" or "cache".')
        check(
            self.positions == "text" or self.budgets == "equal",
            self,
            "a new token has one place in the cache, so all layers and heads must hold equally many tokens.",
            'Use budgets="equal", or positions="text".',
        )

    @property
    def needs_rope(self) -> bool | None:
        return True if self.positions == "cache" else super().needs_rope

    @property
    def usual_layers(self) -> int:
        return 1 if self.budgets == "heads" else super().usual_layers

    @property
    def is_fitted(self) -> bool:
        return self.budgets != "equal" or super().is_fitted
