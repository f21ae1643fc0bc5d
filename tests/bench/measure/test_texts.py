"""The texts that are read, and windows of them."""

from __future__ import annotations

import pytest

from kvstack.bench import results
from kvstack.bench.measure import texts
from kvstack.errors import KVStackError
from tests.bench.commands import invoke


def test_texts_of_python_are_long_enough_for_the_windows():
    for text in texts.domains(None).values():
        assert len(text) > 8 * 8192


def test_windows_are_spread_and_repeatable():
    text = "".join(f"line {i}\n" for i in range(1000))
    pieces = texts.windows(text, 4, 500, seed=1)
    assert pieces == texts.windows(text, 4, 500, seed=1) != texts.windows(text, 4, 500, seed=2)
    assert all(piece.startswith("line ") and len(piece) > 400 for piece in pieces)
    assert [len(piece) for piece in pieces] == sorted(map(len, pieces), reverse=True)


def test_a_folder_takes_the_place_of_the_docstrings(tmp_path):
    with pytest.raises(KVStackError, match=r"holds no \.txt files"):
        texts.domains(tmp_path)
    (tmp_path / "a.txt").write_text("essay")
    assert texts.domains(tmp_path)["texts"] == texts.prose(tmp_path) == "essay"


def test_other_windows_are_other_texts(tmp_path):
    """With more windows the first one begins elsewhere: it is read anew, and not taken for what stands there."""
    options = ("quality", "--out", tmp_path, "--score", "16", "--stack", "quant:4")
    invoke(*options)
    invoke(*options, "--windows", "2")
    rows, _ = results.load(tmp_path, "quality")
    assert len(rows) == 2 * 3 * (1 + 2)
    assert len({(row["domain"], row["text"]) for row in rows}) == 3 * (1 + 2)
