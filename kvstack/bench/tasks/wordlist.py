"""Plain words, and endless streams of keys and values made of them."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Iterator
from importlib import resources

__all__ = ["ADJECTIVES", "NOUNS", "coded_words", "numbers", "uuids", "word_keys", "words"]


def _listed(name: str) -> tuple[str, ...]:
    return tuple(resources.files("kvstack").joinpath("data", name).read_text(encoding="utf-8").split())


ADJECTIVES = _listed("adjectives.txt")
NOUNS = _listed("nouns.txt")


def word_keys(draw: random.Random) -> Iterator[str]:
    """`brave-otter`; with a third word once half of the pairs are used."""
    pairs = len(ADJECTIVES) * len(NOUNS)

    def key(used: int) -> str:
        third = f"{draw.choice(ADJECTIVES)}-" if used > pairs // 2 else ""
        return f"{third}{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"

    return _distinct(key)


def numbers(draw: random.Random, digits: int = 7) -> Iterator[str]:
    return _distinct(lambda _: str(draw.randrange(10 ** (digits - 1), 10**digits)))


def uuids(draw: random.Random) -> Iterator[str]:
    return _distinct(lambda _: str(uuid.UUID(int=draw.getrandbits(128), version=4)))


def coded_words(draw: random.Random, letters: int, alphabet: str = string.ascii_lowercase) -> Iterator[str]:
    return _distinct(lambda _: "".join(draw.choices(alphabet, k=letters)))


def words(draw: random.Random) -> Iterator[str]:
    """All single words in random order, then pairs of them."""
    yield from draw.sample(ADJECTIVES + NOUNS, len(ADJECTIVES) + len(NOUNS))
    yield from word_keys(draw)


def _distinct(make: Callable[[int], str]) -> Iterator[str]:
    """Yield the results of `make`, each once; it is told how many there are already."""
    seen: set[str] = set()
    while True:
        item = make(len(seen))
        if item not in seen:
            seen.add(item)
            yield item
