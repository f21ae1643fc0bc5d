"""The evicting stage: a budget, a score, and how scores of several heads and layers become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from ..heads import ALONE, Heads
from ..registry import score_names
from ..spec import make_score
from ..stage import Ranking, Score, Stage, check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Evict"]

DEFAULT = "snapkv"


@dataclass(frozen=True, repr=False)
class Evict(Stage):
    """Keep the tokens that score highest, of those between the stack's sinks and window.

    Args:
        keep: the share of these tokens KEPT, a float in (0, 1], or how many, an int of 1 or more.
        score: the name of a score (`kvstack stages` lists them) or any object with `score(kv, context)`.
        layers: adjacent layers that keep the same tokens; with more than one, all heads of these layers share one
            set. Default None: as many as a transform in the stack stores together, otherwise what suits the score
            (5 for `snapkv` and `triattention`, 1 for the others).
        share_heads: whether all kv heads of a layer keep the same tokens (default False).
        pool: how the scores of heads and layers that share a set become one: `mean` (default) or `max`, after every
            head's scores have been brought to the same scale.
        refit: whether tokens that stay are made to stand in for those that are dropped: each kv head gets a bias for
            every token (a byte), added to its attention logits, and other values for those that are not compressed yet.
            Queries of the text, as if they came behind it, say which (Attention Matching, arXiv 2602.16284). Default
            False.

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

    kind = "select"
    name = "evict"
    source = "one paper a score"
    saves = "tokens"

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            object.__setattr__(self, "score", make_score(self.score))
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
        check(self.pool in ("mean", "max"), self, f"{self.pool!r} is no way to pool.", 'Use "mean" or "max".')
        check(
            callable(getattr(self.score, "score", None)) and not isinstance(self.score, type),
            self,
            "a score is a name or an object with a method score(kv, context).",
            f"Use one of: {', '.join(score_names())}.",
        )

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if settings["score"] == make_score(DEFAULT):
            del settings["score"]
        return settings

    # A score may be any object with a `score` method: what it does not say about itself has the default of `Score`.

    @property
    def usual_layers(self) -> int:
        """Adjacent layers that share one token set where nobody says how many."""
        return int(getattr(self.score, "layers", Score.layers))

    @property
    def queries(self) -> int:
        """Newest queries that the score looks at; -1 for all of the running forward."""
        return int(getattr(self.score, "queries", Score.queries))

    @property
    def tracks(self) -> bool:
        """Whether the score keeps a memory per token."""
        return bool(getattr(self.score, "tracks", Score.tracks))

    @property
    def needs_rope(self) -> bool | None:
        """Whether the score uses `Context.rope`, or refitting does; None: the score may."""
        needs: bool | None = getattr(self.score, "needs_rope", Score.needs_rope)
        return True if self.refit else needs

    @property
    def looks_at_queries(self) -> bool:
        return self.queries != 0 or self.tracks or self.refit

    @property
    def is_fitted(self) -> bool:
        """Whether the score is fitted to the weights of a model."""
        return bool(getattr(self.score, "is_fitted", Score.is_fitted))

    def bind(self, model: PreTrainedModel, layers: Sequence[int]) -> Ranking:
        """What ranks the tokens of `model`, see `Score.bind`."""
        bind = getattr(self.score, "bind", None)
        return cast(Ranking, self.score if bind is None else bind(model, layers))

    def pooled(self, scores: Sequence[Tensor], heads: Heads = ALONE) -> Tensor:
        """One ranking (B, 1, T) for all heads of all `scores`, one (B, H, T) per layer that must agree, and for those
        that other processes hold (`heads`)."""
        each = torch.cat(list(scores), dim=1)  # (B, heads of all layers, T)
        # scores of one head are comparable with each other, those of two heads are not: some are attention
        # weights that sum to one, some are distances
        spread = each.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
        each = (each - each.mean(-1, keepdim=True)) / spread
        return heads.max(each) if self.pool == "max" else heads.mean(each)
