"""Several texts at once. What is measured of time is never asserted."""

import pytest
import torch

from kvstack.bench.measure import batch, subject
from kvstack.bench.measure.run import Run
from kvstack.bench.measure.variants import parse


def test_rows_for_each_cache_and_kind(bench):
    rows = bench("batch", "--rows", "1,3", "--steps", "2", "--burst", "1", "--contexts", "80", stacks=("quant:4",))
    assert [(row["rows"], row["texts"], row["cache"]) for row in rows] == [
        (many, kind, cache)
        for many, kind in ((1, "equal"), (3, "equal"), (3, "ragged"))
        for cache in ("dense", "quant:4")
    ]
    assert all(row["of_alone"] > 0 and row["speed"] > 0 for row in rows)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_lengths_of_rows(rows):
    assert batch.lengths("equal", rows, 100) == [100] * rows
    ragged = batch.lengths("ragged", rows, 100)
    assert ragged[0] == 100
    assert rows == 1 or ragged[-1] == 25
    assert len(set(ragged)) == rows


def test_a_padded_row_goes_on_as_it_does_alone():
    """What is measured is decoding, not something that looks like it."""
    with subject.opened(Run((200,), (), tiny=True, threads=1)) as opened:
        ids, (dense, stack) = opened.tokens(200), parse(["quant:8"])
        for cache in (dense, stack):
            lanes = [
                batch.Lane.of(opened.model, cache.cache(opened.model), ids, lengths)
                for lengths in ([200, 120], [200], [120])
            ]
            for lane in lanes:
                lane.prefill()
            for _ in range(3):
                assert torch.equal(lanes[0].token, torch.cat([lane.token for lane in lanes[1:]]))
                for lane in lanes:
                    lane.burst(1)
