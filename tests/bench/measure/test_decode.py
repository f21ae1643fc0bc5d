"""Speeds. What is measured of time is never asserted."""

from __future__ import annotations

from tests.bench.commands import by_cache


def test_decode_counts_bytes_of_every_cache(bench):
    stacks = ("empty", "evict:0.2", "quant:2")
    rows = by_cache(bench("decode", "--steps", "8", "--burst", "4", "--rounds", "2", stacks=stacks))
    assert list(rows) == ["dense", *stacks]
    assert all(row["tokens"] == 8 and len(row["bursts_ms"]) == len(row["prefills_ms"]) == 2 for row in rows.values())
    # 2 layers x keys and values x 2 heads x 32 channels x 4 bytes, for the context, the warm-up burst and the steps
    assert rows["dense"]["nbytes"] == 2 * 2 * 2 * 32 * 4 * (512 + 4 + 8)
    assert rows["dense"]["ttft_cost"] == 0
    assert rows["dense"]["speed_typical"] == 1
    assert rows["evict:0.2"]["nbytes"] < rows["dense"]["nbytes"] / 2
    assert [row["reader"] for row in rows.values()] == ["", "", "", "numba"]
