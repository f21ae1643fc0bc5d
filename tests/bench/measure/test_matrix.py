"""Combinations of stages."""

from __future__ import annotations

from kvstack.bench import results
from kvstack.bench.measure import matrix
from tests.bench.commands import invoke


def test_a_matrix_has_every_combination_and_a_front(tmp_path):
    options = ("--transform", "none", "--transform", "commonkv:0.5,layers=2", "--encode", "none", "--encode", "quant:2")
    out = invoke("matrix", "--out", tmp_path, *options, "--evict", "none", "--score", "32", "--steps", "4")
    rows, _ = results.load(tmp_path, "matrix")
    assert len([row for row in rows if row["stages"]]) == 4
    assert "front: no other combination holds fewer bytes" in out
    assert all(row["speed_typical"] > 0 for row in rows)


def test_a_combination_that_cannot_be_built_is_left_out_and_said(capsys):
    grid = matrix.combinations(["none", "commonkv:0.5,layers=2"], ["none"], ["evict:0.5,layers=3"])
    assert list(grid) == ["evict:0.5,layers=3"]
    assert "do not nest" in " ".join(capsys.readouterr().out.split())
