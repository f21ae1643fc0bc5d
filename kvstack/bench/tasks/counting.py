"""Words to count: RULER's `cwe` and `fwe` (Hsieh et al. 2024, arXiv 2404.06654, section 3)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from .recipe import NEW_TOKENS, Recipe
from .sample import Question
from .wordlist import coded_words, words

__all__ = ["CommonWords", "FrequentWords"]

ZETA = math.pi**2 / 6
"""The sum of 1 / k² over all k."""


@dataclass(frozen=True)
class CommonWords:
    """Ten words of a numbered list stand in it more often than all others; which ones? After a solved example.

    From 4,096 tokens on, common words stand 30 times in the list and the others 3 times, else 6 times and once.

    Differs from the paper: words of an own list of some 400, then pairs of them; other words in question and example.
    """

    common: int = 10

    most = 1
    one_place = False

    def write(self, recipe: Recipe, size: int) -> tuple[str, tuple[Question, ...]]:
        draw = recipe.draw()
        supply = words(draw)
        long = recipe.length >= 4096
        example, solved = self._list(draw, supply, 30 if long else 10, (10, 3) if long else (3, 1))
        text, question = self._list(draw, supply, size, (30, 3) if long else (6, 1))
        return f"{example}{solved.text} {_numbered(solved.answers)}\n\n{text}", (question,)

    def _list(
        self, draw: random.Random, supply: Iterator[str], others: int, times: tuple[int, int]
    ) -> tuple[str, Question]:
        common = tuple(islice(supply, self.common))
        listed = [*common] * times[0] + [*islice(supply, others)] * times[1]
        draw.shuffle(listed)
        intro = "Some words in the numbered list below come up more often than the others. Remember those.\n"
        ask = (
            f"\nQuestion: Which {self.common} words come up most often in the list above? "
            f"Answer: The {self.common} words that come up most often in the list are"
        )
        return intro + _numbered(listed), Question(ask, common, NEW_TOKENS["cwe"], "share")


@dataclass(frozen=True)
class FrequentWords:
    """A text of made-up words, the most frequent one of them dots; which three come up most often, apart from the dots?

    How often the word of rank k comes up follows a zeta distribution: in proportion to 1 / k².

    Differs from the paper: other words in the question; at least ten different words, however short the text.
    """

    most = 1
    one_place = False

    def write(self, recipe: Recipe, size: int) -> tuple[str, tuple[Question, ...]]:
        draw = recipe.draw()
        vocabulary = ["...", *islice(coded_words(draw, letters=6), max(9, recipe.length // 50))]
        total = (100 + size) / ZETA  # from 100 on, the third word comes up more often than the fourth
        coded = [word for rank, word in enumerate(vocabulary, 1) for _ in range(int(total / rank**2))]
        draw.shuffle(coded)
        intro = "The text below is made of coded words. Find the three most frequent ones, not counting the dots.\n"
        ask = (
            "\nQuestion: Which three coded words come up most often in the text above? Do not explain. "
            "Answer: The three coded words that come up most often are"
        )
        return intro + " ".join(coded), (Question(ask, tuple(vocabulary[1:4]), NEW_TOKENS["fwe"], "share"),)


def _numbered(listed: list[str] | tuple[str, ...]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
