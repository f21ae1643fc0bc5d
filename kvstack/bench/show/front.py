"""The front: the measured points that no other beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["pareto"]


def pareto(points: Sequence[Sequence[float]]) -> list[bool]:
    """For each point, whether no other one is at least as good in everything and better in something.

    Smaller is better in every coordinate; negate one of which more is better. Equal points stand or fall together. A
    point with a NaN is never on the front.
    """
    front: list[Sequence[float]] = []
    # in sorted order whoever beats a point comes before it, and is on the front or beaten by one that is
    for point in sorted(tuple(point) for point in points if not any(map(math.isnan, point))):
        if not any(_beats(other, point) for other in front):
            front.append(point)
    best = set(front)
    return [tuple(point) in best for point in points]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
