"""From all benchmarks to one page."""

from __future__ import annotations

import json

import pytest

from kvstack.bench import results
from kvstack.bench.show import report
from kvstack.errors import KVStackError
from tests.bench.commands import invoke


def test_a_report_does_not_mix_settings(tmp_path):
    for score in ("16", "32"):
        invoke("quality", "--out", tmp_path, "--score", score, "--stack", "quant:4")
    rows, _ = results.load(tmp_path, "quality")
    assert {row["score"] for row in rows} == {32}
    assert report.write(tmp_path).exists()


def test_everything_and_its_report(tmp_path):
    """All benchmarks with two stacks, then one page with their pictures."""
    out = invoke("all", "--out", tmp_path, "--stack", "quant:4", "--stack", "quant:2+evict:0.2")
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in "".join(out.split("\n"))
    for name in ("quality", "needles", "memory", "decode", "matrix"):
        assert (tmp_path / f"{name}.jsonl").exists()
    for heading in ("Quality", "Needles", "Memory", "Speed", "Mix and match", "At equal bytes"):
        assert heading in page
    pictures = sorted(path.stem for path in tmp_path.glob("*.svg"))
    assert pictures[:4] == ["decode", "matrix", "memory", "memory-growth"]
    assert page.count("<svg") == len(pictures)


ODD = ["../../outside", "/tmp/outside", "a\0b", "x" * 300, "<b>&amp;\"'", "..", "con", "$x_{$", ""]


def test_the_report_stays_in_its_folder(tmp_path):
    """Whatever names stand in the files of figures."""
    folder = tmp_path / "deep" / "figures"
    invoke("needles", "--out", folder, "--stack", "quant:4", "--task", "niah_single_2", "--samples", "1")
    path = folder / "needles.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    renamed = [{**one, "key": {**one["key"], "task": odd, "mode": odd}} for one in records for odd in ODD]
    path.write_text("".join(json.dumps(one) + "\n" for one in renamed))
    page = report.write(folder).read_text()
    assert {file.parent for file in tmp_path.rglob("*") if file.is_file()} == {folder}
    assert len(list(folder.glob("needles-*.svg"))) == len(ODD)
    assert "<b>&amp;" not in page


def test_a_report_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(KVStackError, match="Run a benchmark first: kvstack bench all --out"):
        report.write(tmp_path)
