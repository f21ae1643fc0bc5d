"""Where the time of a step goes."""

import pytest

from kvstack.attend import Attention
from kvstack.bench.measure.step import PARTS
from tests.bench.commands import by_cache


def test_parts_of_a_step(bench):
    plain = Attention.update
    rows = by_cache(bench("step", "--steps", "4", stacks=("empty", "quant:4", "commonkv:0.5,layers=2+quant:2")))
    assert Attention.update is plain, "nothing stays timed"
    assert set(rows) == {"empty", "quant:4", "commonkv:0.5,layers=2+quant:2"}, "the dense cache has no such parts"
    for name, row in rows.items():
        assert sum(row["parts"].values()) == pytest.approx(row["ms"])
        assert min(row["parts"].values()) >= 0
        assert set(row["parts"]) == {"model", *PARTS}
        # every layer hands its tokens to the stack, and only sealed ones are read here
        layers = row["calls"]["storing"] / 3
        assert layers in (2, 4)
        assert row["calls"]["scores"] == row["calls"]["values"] == (0 if name == "empty" else layers)
        assert (row["parts"]["values"] > 0) == (name != "empty")
