"""The tiny model and what is done with it."""

from __future__ import annotations

from kvstack.bench.measure.subject import Letters, rotated


def test_every_cache_goes_first_once():
    assert [rotated("abc", i) for i in range(4)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_letters_are_a_tokenizer():
    letters = Letters()
    assert letters.decode(letters("Hay, é.", return_tensors="pt")["input_ids"][0]) == "Hay, ?."
