"""How many tokens stay, and which, for whatever sizes hypothesis thinks of."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack.store.budget import allowance, choose, how_many
from tests import tiny

# ---- budgets

COUNTS = {
    "middle": st.integers(0, 500),
    "keep": st.one_of(st.floats(0.01, 1.0), st.integers(1, 400)),
    "granule": st.sampled_from([1, 8, 32]),
    "block": st.sampled_from([1, 8, 32]),
}


@given(**COUNTS, fresh=st.integers(0, 500))
def test_never_more_than_the_budget(middle, keep, granule, block, fresh):
    budget = allowance(keep, middle + 12, 4, 8)
    gone = how_many(middle, min(fresh, middle), budget, granule, block)
    assert 0 <= gone <= middle
    assert middle - gone <= max(budget, 0)
    if middle <= budget:
        assert gone == 0


@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    granules=st.integers(0, 6),
    singles=st.integers(0, 40),
    granule=st.sampled_from([1, 4, 8]),
    data=st.data(),
)
def test_what_stays_is_ascending_and_of_one_length(rows, heads, granules, singles, granule, data):
    packed = granules * granule
    # the numbers that how_many can ask for: up to all raw tokens, or whole granules
    most = (packed + singles) // granule * granule
    drop = data.draw(st.one_of(st.integers(0, singles), st.integers(0, most // granule).map(lambda n: n * granule)))
    scores = tiny.numbers(1, rows, heads, packed + singles)
    cut = choose(scores, packed, granule, drop)
    left = cut.granules.shape[-1] * granule + cut.raw.shape[-1]
    assert left == packed + singles - drop
    for index in (cut.granules, cut.raw):
        assert bool((index.diff(dim=-1) > 0).all())


@given(singles=st.integers(1, 60), drop=st.integers(0, 60), seed=st.integers(0, 50))
def test_the_best_stay(singles, drop, seed):
    drop = min(drop, singles)
    scores = tiny.numbers(seed, 1, 1, singles)
    cut = choose(scores, 0, 1, drop)
    expected = scores[0, 0].topk(singles - drop).indices.sort().values
    assert torch.equal(cut.raw[0, 0], expected)
