"""Costs in longer and longer texts. What is measured of time is never asserted."""

from kvstack.bench.measure.length import CHUNK
from tests.bench.commands import invoke


def test_one_text_grows_under_each_cache(bench):
    rows = bench("length", "--steps", "3", "--contexts", "200,100", stacks=("quant:4", "evict:0.2"))
    assert [(row["cache"], row["context"]) for row in rows] == [
        (cache, length) for cache in ("dense", "quant:4", "evict:0.2") for length in (100, 200)
    ]
    held = {(row["cache"], row["context"]): row["held"] for row in rows}
    assert held["dense", 100] == held["quant:4", 100] == 103
    assert held["dense", 200] == held["quant:4", 200] == 203
    assert held["evict:0.2", 200] < 203
    assert all(row["ms_typical"] <= row["ms_most"] for row in rows)
    # 2 layers, keys and values of 2 heads, 32 channels in float32
    assert all(row["nbytes"] == 2 * 2 * 2 * 32 * 4 * row["held"] for row in rows if row["cache"] == "dense")


def test_texts_longer_than_a_chunk_are_read_in_parts():
    assert f"{CHUNK + 76:,}" in invoke("length", "--steps", "1", "--contexts", CHUNK + 76, "--stacks", "quant:4")
