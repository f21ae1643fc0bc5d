"""Texts to hide sentences in, cut into pieces of about a word so that any length can be met."""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter

from ...errors import KVStackError

__all__ = ["NOISE", "cut", "hide", "noise", "prose"]

NOISE = "The lamp is on. The tea is hot. The street is quiet. Rain is on its way. One more time, then.\n"
"""The same five short sentences, over and over."""

PIECE = re.compile(r"[^\s。-]{1,16}[\s。-]*|[\s。-]+")
"""A word with what separates it from the next; cut after 16 characters, for scripts that put no spaces."""
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+$|。\s*$")
FAR = 25
"""Pieces. Where no sentence ends this near, a needle goes between two words."""


def cut(text: str) -> list[str]:
    """The pieces of a text; joined, they are the text."""
    return PIECE.findall(text)


def noise(size: int) -> list[str]:
    return _round(cut(NOISE), 0, size)


def prose(text: str, size: int, draw: random.Random) -> list[str]:
    """`size` pieces from a sentence drawn at random onwards; a text that is too short begins again."""
    pieces, starts = _read(text)
    return _round(pieces, draw.choice(starts), size)


def hide(pieces: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The text of `pieces` with sentences put in at their depths, 0 to 1, where another sentence ends.

    Needles that meet in one place keep their order.
    """
    starts = _sentence_starts(pieces)
    places = [_nearest(starts, round(depth * len(pieces))) for depth, _ in needles]
    parts, last = [], 0
    for place, (_, text) in sorted(zip(places, needles, strict=True), key=itemgetter(0)):
        parts += [*pieces[last:place], text, " "]
        last = place
    return "".join([*parts, *pieces[last:]]).rstrip()


@lru_cache(maxsize=2)  # a sample is written some ten times, until its length fits
def _read(text: str) -> tuple[Sequence[str], Sequence[int]]:
    """Pieces of a text, and the places where its sentences begin."""
    if not text.strip():
        raise KVStackError("this task hides its needles in prose, and the prose is empty. Give a text of some pages.")
    pieces = cut(text.strip() + "\n\n")
    return pieces, _sentence_starts(pieces)


def _round(pieces: Sequence[str], start: int, size: int) -> list[str]:
    return [pieces[(start + i) % len(pieces)] for i in range(size)]


def _sentence_starts(pieces: Sequence[str]) -> list[int]:
    """The places before pieces where a sentence begins, the first one included."""
    return [0, *(i for i, piece in enumerate(pieces, 1) if SENTENCE_END.search(piece) and i < len(pieces))]


def _nearest(starts: Sequence[int], place: int) -> int:
    at = bisect(starts, place)
    best = min(starts[max(0, at - 1) : at + 1], key=lambda start: abs(start - place))
    return best if abs(best - place) <= FAR else place
