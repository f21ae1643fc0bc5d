"""The evicting stage: a budget, a score, and how scores of several heads and layers become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..registry import score_names
from ..spec import make_score
from ..stage import Score, Select, check
from ..types import KV, Context

__all__ = ["Evict"]

DEFAULT = "snapkv"


@dataclass(frozen=True, repr=False, init=False)
class Evict(Select):
    """Keep the tokens that score highest, of those between the stack's sinks and window.

    Args:
        keep: the share of these tokens KEPT, a float in (0, 1], or how many, an int of 1 or more.
        score: the name of a score (`kvstack stages` lists them) or any object with `score(kv, context)`.
        layers: adjacent layers that keep the same tokens; with more than one, all heads of these layers share one
            set. Default None: as many as a transform in the stack stores together, otherwise what suits the score
            (5 for `snapkv`, 1 for the others).
        share_heads: whether all kv heads of a layer keep the same tokens (default False).
        pool: how the scores of heads and layers that share a set become one: `mean` (default) or `max`, after every
            head's scores have been brought to the same scale.

    The budget holds while decoding and at every later turn.

    Example:
        >>> from kvstack import Evict, SnapKV
        >>> Evict(0.2), Evict(1024, score=SnapKV(window=16))
        (Evict(keep=0.2), Evict(keep=1024, score=SnapKV(window=16)))
    """

    keep: float | int
    by: Score
    layers: int | None = None
    share_heads: bool = False
    how: Literal["mean", "max"] = "mean"

    name = "evict"
    source = "one paper a score"
    saves = "tokens"

    def __init__(
        self,
        keep: float | int,
        score: str | Score | Any = DEFAULT,
        *,
        layers: int | None = None,
        share_heads: bool = False,
        pool: Literal["mean", "max"] = "mean",
    ) -> None:
        # written out because the argument is called like the method that every selector has
        for name, value in (("keep", keep), ("layers", layers), ("share_heads", share_heads), ("how", pool)):
            object.__setattr__(self, name, value)
        if isinstance(score, str):
            score = make_score(score)
        object.__setattr__(self, "by", score)
        share = isinstance(keep, float) and 0 < keep <= 1
        count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
        check(
            share or count,
            self,
            "keep is what stays: a share in (0, 1] or a count of tokens, an int of 1 or more.",
            "Use keep=0.2 for a fifth of the tokens.",
        )
        counts = layers is None or (isinstance(layers, int) and not isinstance(layers, bool) and layers >= 1)
        check(counts, self, "layers counts layers.", "Use 1 or more.")
        check(pool in ("mean", "max"), self, f"{pool!r} is no way to pool.", 'Use "mean" or "max".')
        check(
            callable(getattr(score, "score", None)) and not isinstance(score, type),
            self,
            "a score is a name or an object with a method score(kv, context).",
            f"Use one of: {', '.join(score_names())}.",
        )

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        by, how = found.pop("by"), found.pop("how", None)
        keep = {"keep": found.pop("keep")}
        given = keep | ({} if by == make_score(DEFAULT) else {"score": by}) | found
        return given | ({"pool": how} if how else {})

    @property
    def usual_layers(self) -> int:
        return int(getattr(self.by, "layers", 1))

    @property
    def queries(self) -> int:
        return int(getattr(self.by, "queries", 0))

    @property
    def tracks(self) -> bool:
        return bool(getattr(self.by, "tracks", False))

    def score(self, kv: KV, context: Context) -> Tensor:
        scores: Tensor = self.by.score(kv, context)
        return scores

    def track(self, kv: KV, context: Context) -> Mapping[str, Tensor]:
        return self.by.track(kv, context)

    def pool(self, scores: Sequence[Tensor]) -> Tensor:
        heads = torch.cat(list(scores), dim=1)  # (B, heads of all layers, T)
        # scores of one head are comparable with each other, those of two heads are not: some are attention
        # weights that sum to one, some are distances
        spread = heads.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
        heads = (heads - heads.mean(-1, keepdim=True)) / spread
        return heads.amax(1, keepdim=True) if self.how == "max" else heads.mean(1, keepdim=True)
