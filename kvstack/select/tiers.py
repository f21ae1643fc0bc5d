"""The stage that drops nothing, and lets important tokens take more bits than others."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..stage import Score, check
from .choosing import Select

__all__ = ["Tiers"]

USUAL = "lookahead"
MOST = 8
"""Classes: the class of a token takes 3 bits at most."""


@dataclass(frozen=True, repr=False)
class Tiers(Select):
    """Give the tokens that score highest more bits, of those between the stack's sinks and window. None is dropped.

    Tokens are put into classes by their score, and all classes share the bits of the transform and the encoder: one
    water level over tokens and channels. The least important tokens keep a few channels in few bits, the most important
    many. It needs a transform that knows the energy of its channels (`CommonKV`) and an encoder that can spend bits
    unevenly (`Quant` with 2, 3, 4 or 8 bits).

    Args:
        score: the name of a score (`kvstack stages` lists them) or any object with `score(kv, context)`; default
            `lookahead`, which asks for the whole text.
        shares: of the tokens in each class, the most important first; 1 in all, 2 to 8 classes (default 1/16, 1/16,
            1/8, 1/4, 1/2). A prompt is ranked as a whole. While decoding, every block is ranked when it is sealed.
        weights: the weight of an error in a token of each class, falling (default 64, 16, 4, 2, 1). Steeper ones
            suit what the text itself goes on with, and lose facts that nothing in it has asked for yet.
        pool: joins the scores of heads and layers: `mean` (default) or `max`, after every head's scores have
            been brought to the same scale.

    The bytes are those of the same stack without it, and 1 to 3 bits for each token and group of layers.

    Source: the idea of RDKV, arXiv 2605.08317, in the latent of several layers. Differs from the paper: classes are
    fixed shares of the tokens, and a class has a fixed weight; bits go to channels of a latent.

    Example:
        >>> from kvstack import CommonKV, KVStack, Quant, Tiers
        >>> KVStack([CommonKV(0.1), Quant(2), Tiers()])
        KVStack([CommonKV(keep=0.1), Quant(bits=2), Tiers()])
    """

    score: Score | str = USUAL
    shares: tuple[float, ...] = field(default=(1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2), kw_only=True)
    weights: tuple[float, ...] = field(default=(64.0, 16.0, 4.0, 2.0, 1.0), kw_only=True)
    pool: Literal["mean", "max"] = field(default="mean", kw_only=True)

    layers: ClassVar[None] = None  # type: ignore[misc]  # those that are stored together
    usual_score: ClassVar[str] = USUAL
    share_heads: ClassVar[bool] = True  # type: ignore[misc]  # one latent of a token is for all of them

    name = "tiers"
    source = "arXiv 2605.08317"
    saves = "bits of unimportant tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shares", "weights"):
            numbers = getattr(self, name)
            fits = isinstance(numbers, tuple | list) and all(_is_number(x) and 0 < x < math.inf for x in numbers)
            check(fits, self, f"{name} is a tuple of numbers above 0.", f"Leave {name} out for the default.")
            object.__setattr__(self, name, tuple(float(x) for x in numbers))
        count = len(self.shares)
        check(2 <= count <= MOST, self, f"{count} classes.", f"Use 2 to {MOST}.")
        check(
            len(self.weights) == count,
            self,
            f"{count} shares and {len(self.weights)} weights.",
            "Give one of both for each class.",
        )
        check(
            math.isclose(sum(self.shares), 1),
            self,
            f"the shares are {sum(self.shares):g} in all.",
            "Give shares that sum to 1.",
        )
        falling = all(more >= less for more, less in itertools.pairwise(self.weights))
        check(falling, self, "the most important class comes first.", "Give weights that fall.")


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
