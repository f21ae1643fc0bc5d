"""Variable tracking: RULER's `vt` (Hsieh et al. 2024, arXiv 2404.06654, section 3)."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import islice, pairwise

from .haystack import hide, noise
from .recipe import NEW_TOKENS, Recipe
from .sample import Question
from .wordlist import coded_words, numbers

__all__ = ["Tracking"]

EXAMPLE = 80
"""Pieces of noise in the example."""


@dataclass(frozen=True)
class Tracking:
    """A variable gets a number, a second one the first one's value, and so on; which variables hold the number?

    The text begins with a solved example.

    Differs from the paper: other words in noise, question and example; assignments end with a full stop.
    """

    hops: int = 4

    most = 1
    one_place = False

    def write(self, recipe: Recipe, size: int) -> tuple[str, tuple[Question, ...]]:
        draw = recipe.draw()
        values = numbers(draw, digits=5)
        example, solved = self._chain(draw, next(values), letters=3, size=EXAMPLE)
        text, question = self._chain(draw, next(values), letters=5, size=size)
        return f"{example}{solved.text} {', '.join(solved.answers)}\n\n{text}", (question,)

    def _chain(self, draw: random.Random, value: str, letters: int, size: int) -> tuple[str, Question]:
        names = tuple(islice(coded_words(draw, letters, string.ascii_uppercase), self.hops + 1))
        chain = [f"VAR {names[0]} = {value}."]
        chain += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
        depths = sorted(draw.random() for _ in chain)
        intro = "The text below assigns values to variables, in steps. Keep track of them.\n"
        ask = (
            f"\nQuestion: Which variables in the text above hold the value {value}? "
            f"Answer: The {len(names)} variables that hold the value {value} are"
        )
        text = hide(noise(size), list(zip(depths, chain, strict=True)))
        return intro + text, Question(ask, names, NEW_TOKENS["vt"], "share")
