"""Figures on disk: what is taken up again and what is not."""

from __future__ import annotations

import json

import pytest

from kvstack.bench import results
from kvstack.bench.measure import quality
from kvstack.bench.results import Results
from kvstack.errors import KVStackError
from tests.bench.commands import invoke


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    options = ("quality", "--out", tmp_path, "--score", "16")
    first = invoke(*options, "--stack", "quant:4")
    lines = (tmp_path / "quality.jsonl").read_text()
    read = quality.read
    asked = []
    monkeypatch.setattr(
        quality, "read", lambda tiny, cache, *rest: asked.append(cache.label) or read(tiny, cache, *rest)
    )
    assert invoke(*options, "--stack", "quant:4") == first
    assert asked == []
    invoke(*options, "--stack", "quant:4", "--stack", "quant:2")
    assert asked == ["dense", "quant:2"] * 3  # the dense cache is what a new one is compared with
    assert (tmp_path / "quality.jsonl").read_text().startswith(lines)


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    where = {"model": "m", "commit": "a"}
    Results("quality", tmp_path, where).add({"kl": 1.0}, cache="x")
    path = tmp_path / "quality.jsonl"
    path.write_text(path.read_text() + '{"bench": "qual')
    again = Results("quality", tmp_path, where)
    assert again.get(cache="x") == {"kl": 1.0}
    again.add({"kl": 2.0}, cache="y")
    assert [record["figures"]["kl"] for record in results.read(path)] == [1.0, 2.0]


def test_figures_of_other_code_or_settings_are_not_taken(tmp_path):
    Results("quality", tmp_path, {"code": "1", "commit": "a"}).add({"kl": 1.0}, cache="x")
    assert Results("quality", tmp_path, {"code": "1", "commit": "b"}).get(cache="x") == {"kl": 1.0}
    assert Results("quality", tmp_path, {"code": "2", "commit": "a"}).get(cache="x") is None
    rows, where = results.load(tmp_path, "quality")
    assert rows == [{"cache": "x", "kl": 1.0}]
    assert where["code"] == "1"


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "quality.jsonl").write_text('{"cache": "x"}\n')
    with pytest.raises(KVStackError, match=r"line 1 is not a benchmark record\. Name another folder"):
        Results("quality", tmp_path, {})


def test_figures_are_plain_json(bench, tmp_path):
    bench("quality", "--score", "16", stacks=("empty",))
    record = json.loads((tmp_path / "quality.jsonl").read_text().splitlines()[0])
    assert set(record) == {"bench", "key", "figures", "environment"}


def test_figures_of_other_plugins_are_not_mixed(tmp_path):
    """Those of the newest code of each cache, whatever is known of the others."""
    figures = Results("quality", tmp_path, {"code": "1"})
    for plugins, window, cache in [(None, 0, "quant:2"), ("xkv 1", 0, "xkv"), ("xkv 1", 1, "xkv"), ("xkv 2", 0, "xkv")]:
        figures.add({"kl": 1.0}, window=window, cache=cache, plugins=plugins)
    rows = results.load(tmp_path, "quality").rows
    assert [(row["cache"], row["window"], row["plugins"]) for row in rows] == [
        ("quant:2", 0, None),
        ("xkv", 0, "xkv 2"),
    ]
