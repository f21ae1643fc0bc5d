"""The tables of the terminal: bytes are told whole, and files of figures from before they were are still shown."""

from __future__ import annotations

import json

import pytest

from kvstack.bench.show import report
from kvstack.bench.show.units import FITTED, mib
from tests.bench.commands import invoke

STACK = "commonkv:0.5+quant:4"
COMMANDS = {
    "quality": ("--score", "16"),
    "budgets": ("--score", "16"),
    "needles": ("--task", "niah_single_2", "--samples", "1", "--mode", "aware"),
    "memory": ("--no-peak", "--decode", "1"),
    "decode": ("--no-peak", "--rounds", "1", "--steps", "1", "--burst", "1"),
    "device": ("--rounds", "1", "--steps", "1", "--burst", "1"),
    "batch": ("--rows", "2", "--steps", "1", "--burst", "1"),
    "length": ("--contexts", "256", "--steps", "1"),
    "matrix": ("--transform", "commonkv", "--encode", "quant:4", "--evict", "none", "--score", "16", "--steps", "1"),
}


def shown(command, folder):
    stacks = () if command == "matrix" else ("--stack", STACK)
    return invoke(command, "--out", folder, *stacks, *COMMANDS[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_fitted_to_the_model_has_columns_and_old_files_are_shown_without(command, tmp_path):
    told = shown(command, tmp_path)
    flat = " ".join(told.split())
    assert "less from: tokens of all texts" in flat
    old = []
    for path in tmp_path.glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            figures = record["figures"]
            if record["key"]["cache"] != "dense" and path.stem != "matrix":
                assert figures["model_nbytes"] > 0
                assert mib(figures["model_nbytes"]) in flat
                assert f"{figures['break_even']:,}" in flat
            figures.pop("model_nbytes", None)
            figures.pop("break_even", None)
            old.append((path, record))
    assert old
    for path in tmp_path.glob("*.jsonl"):
        path.write_text("".join(json.dumps(record) + "\n" for where, record in old if where == path))
    again = shown(command, tmp_path)
    assert "less from" not in again
    assert len(again.splitlines()) > 5
    if command in report.BENCHES:
        page = report.write(tmp_path).read_text()
        assert all(name in page for name in FITTED)


def test_stacks_that_fit_nothing_have_no_columns_for_it(tmp_path):
    assert "of model" not in invoke("quality", "--score", "16", "--stack", "quant:4")
