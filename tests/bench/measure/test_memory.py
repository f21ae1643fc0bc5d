"""Bytes by stage, and the peaks of the process."""

from __future__ import annotations

import pytest

from tests.bench.commands import by_cache


def test_memory_by_stage(bench):
    stacks = ("empty", "quant:4", "quant:2", "quant:2+evict:0.2")
    options = ("--no-peak", "--decode", "40", "--dtype", "bfloat16")
    rows = by_cache(bench("memory", *options, stacks=stacks))
    assert rows["dense"]["nbytes_prefill"] == 2 * 2 * 2 * 32 * 2 * 512  # bfloat16
    assert rows["dense"]["parts"] == []
    shares = [rows[label]["nbytes"] / rows[label]["dense_nbytes"] for label in ("dense", *stacks)]
    assert shares[:2] == [1, pytest.approx(1, rel=0.1)]
    assert shares[1] > shares[2] > shares[3] > shares[4]
    row = rows["quant:2+evict:0.2"]
    assert row["report"]["nbytes"] == row["nbytes"] == sum(part["nbytes"] for part in row["parts"])
    assert row["dense_nbytes"] == rows["dense"]["nbytes"]
    assert {"Quant(bits=2)", "Evict(keep=0.2)", "stack"} == {part["payer"] for part in row["parts"]}


def test_memory_peaks_come_from_a_process_of_their_own(bench):
    (row,) = bench("memory", "--decode", "1", stacks=("dense",))
    assert row["peak_prefill"] is None or row["peak_decode"] >= 0
