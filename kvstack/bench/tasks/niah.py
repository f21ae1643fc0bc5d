"""Needles in a haystack: RULER's eight variants (Hsieh et al. 2024, arXiv 2404.06654, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

from .haystack import PIECE, hide, noise, prose
from .recipe import NEW_TOKENS, Recipe
from .sample import Question
from .wordlist import numbers, uuids, word_keys

__all__ = ["Needles"]

KEYS = {"word": word_keys, "uuid": uuids}
VALUES = {"number": numbers, "uuid": uuids}
NOUN = {"number": "number", "uuid": "code"}


@dataclass(frozen=True)
class Needles:
    """Sentences that give a key its value, and a question for the values of one or more keys.

    Differs from the paper: other words in needles, questions and noise; the prose is the caller's, keeps its line
    breaks, and begins at another sentence in every sample; in a haystack of needles the last one may be cut short,
    which is how the text's length is met.
    """

    haystack: Literal["noise", "prose", "needles"] = "prose"
    """`needles`: all the text is sentences like the one asked for."""
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    """Values of each key."""
    asked: int = 1
    """Keys in one question."""

    @property
    def most(self) -> int | None:
        if self.haystack == "needles":
            return None
        return self.keys // self.asked

    @property
    def one_place(self) -> bool:
        return self.values * self.asked == 1

    def write(self, recipe: Recipe, size: int) -> tuple[str, tuple[Question, ...]]:
        draw = recipe.draw()
        keys, values = KEYS[self.key](draw), VALUES[self.value](draw)
        names = list(islice(keys, max(self.keys, recipe.questions * self.asked)))
        facts = {name: list(islice(values, self.values)) for name in names}
        needles = [(draw.random(), self._sentence(name, value)) for name in names for value in facts[name]]
        if self.one_place:
            needles[0] = (recipe.depth, needles[0][1])
        if self.haystack == "noise":
            pieces = noise(size)
        elif self.haystack == "prose":
            pieces = prose(recipe.prose, size, draw)
        else:
            pieces = list(islice(self._others(keys, values), size))
        asked = [names[i * self.asked : (i + 1) * self.asked] for i in range(recipe.questions)]
        questions = tuple(self._question({name: facts[name] for name in keys_of_one}) for keys_of_one in asked)
        noun = NOUN[self.value]
        intro = f"The text below holds secret {noun}s. Remember them: you will be asked for one or more later.\n"
        return intro + hide(pieces, needles), questions

    def _sentence(self, key: str, value: str) -> str:
        return f"{'The' if self.values == 1 else 'One'} secret {NOUN[self.value]} of {key} is {value}."

    def _others(self, keys: Iterator[str], values: Iterator[str]) -> Iterator[str]:
        """Pieces of needles that nobody asks for, without end."""
        for key, value in zip(keys, values, strict=True):
            yield from PIECE.findall(self._sentence(key, value) + " ")

    def _question(self, facts: dict[str, list[str]]) -> Question:
        *front, last = facts
        names = f"{', '.join(front)} and {last}" if front else last
        noun = NOUN[self.value]
        if self.one_place:
            text = f"\nWhat is the secret {noun} of {names} in the text above? The secret {noun} of {names} is"
        else:
            text = f"\nWhat are all the secret {noun}s of {names} in the text above? The secret {noun}s of {names} are"
        return Question(text, tuple(chain.from_iterable(facts.values())), NEW_TOKENS["niah"], "share")
