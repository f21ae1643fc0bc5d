"""The common part of stages of the kind `select`: a score for each token, and one ranking from the scores of several
heads and layers. Each stage uses the ranking in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from ..heads import ALONE, Heads
from ..registry import score_names
from ..spec import make_score
from ..stage import Ranking, Score, Stage, check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DEFAULT", "Select"]

DEFAULT = "snapkv"


class Select(Stage):
    """Ranks the tokens between sinks and window. Subclasses are dataclasses that have these settings, or fix them.

    Attributes:
        score: the name of a score, or any object with `score(kv, context)`; the object once it is made.
        layers: adjacent layers that share one ranking; None: as many as a transform stores together, or else what suits
            the score.
        share_heads: True if all kv heads of a layer share one ranking.
        pool: joins the scores of heads and layers that share a ranking: `mean` or `max`.
        refit: True if tokens are made to stand in for others (default False).
        usual_score: the name of the default score.
    """

    score: Score | str
    layers: int | None
    share_heads: bool
    pool: Literal["mean", "max"]
    refit: bool = False
    usual_score: ClassVar[str] = DEFAULT

    kind = "select"

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            object.__setattr__(self, "score", make_score(self.score))
        check(self.pool in ("mean", "max"), self, f"{self.pool!r} is not a way to pool.", 'Use "mean" or "max".')
        check(
            callable(getattr(self.score, "score", None)) and not isinstance(self.score, type),
            self,
            "a score is a name or an object with a method score(kv, context).",
            f"Use one of: {', '.join(score_names())}.",
        )

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if settings["score"] == make_score(self.usual_score):
            del settings["score"]
        return settings

    # A score may be any object with a `score` method: what it does not say about itself has the default of `Score`.

    @property
    def usual_layers(self) -> int:
        """Adjacent layers that share one ranking where nobody says how many."""
        return int(getattr(self.score, "layers", Score.layers))

    @property
    def queries(self) -> int:
        """Newest queries that the score looks at; -1 for all of the running forward."""
        return int(getattr(self.score, "queries", Score.queries))

    @property
    def tracks(self) -> bool:
        """Return True if the score keeps a memory per token."""
        return bool(getattr(self.score, "tracks", Score.tracks))

    @property
    def needs_rope(self) -> bool | None:
        """Return True if the score uses `Context.rope`, or refitting does; None: the score may."""
        needs: bool | None = getattr(self.score, "needs_rope", Score.needs_rope)
        return True if self.refit else needs

    @property
    def references(self) -> bool:
        """Return True if queries of the whole forward are wanted, by the score or to refit tokens."""
        return self.refit or bool(getattr(self.score, "references", Score.references))

    @property
    def rereads(self) -> bool:
        """Return True if the model reads a text a second time for the score."""
        return bool(getattr(self.score, "rereads", Score.rereads))

    @property
    def looks_at_queries(self) -> bool:
        return self.queries != 0 or self.tracks or self.references or self.rereads

    @property
    def is_fitted(self) -> bool:
        """Return True if the score is fitted to the weights of a model."""
        return bool(getattr(self.score, "is_fitted", Score.is_fitted))

    def bind(self, model: PreTrainedModel, layers: Sequence[int]) -> Ranking:
        """Return the ranking for the tokens of `model`, see `Score.bind`."""
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
