"""Heads that are split among processes: scores, rankings and mixes are those of all heads together. Threads stand for
the processes here; tests/parallel has real ones."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstack import KV, Context, Evict, registry
from kvstack.heads import ALONE, Heads
from kvstack.store.budget import choose
from kvstack.testing import tiny_model


@dataclass
class Meeting:
    """Where threads lay down what each of them has, and take up what all have."""

    size: int
    laid: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=20)

    def exchange(self, rank, thing):
        self.laid[rank] = thing
        self.barrier.wait()
        everything = [self.laid[i] for i in range(self.size)]
        self.barrier.wait()
        return everything


class Threads(Heads):
    """Heads whose other processes are threads; `group` is their `Meeting`."""

    def _reduced(self, x, how):
        every = torch.stack(self.group.exchange(self.rank, x))
        return every.sum(0) if how == "SUM" else every.amax(0)


def together(size, act):
    """What `act(rank, heads)` gives in each of `size` threads."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(act, rank, Threads(rank, size, group=meeting)) for rank in range(size)]
        return [job.result() for job in jobs]


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def part(x, rank, size):
    """The heads of `x` (B, H, ...) that process `rank` holds."""
    return x.chunk(size, dim=1)[rank]


SIZES = st.sampled_from([1, 2, 4])
few = settings(max_examples=20)  # each starts threads


@pytest.mark.parametrize("name", registry.BUILT_IN["scores"])
@few
@given(size=SIZES, seed=st.integers(0, 99))
def test_a_head_scores_as_it_does_among_all_heads(name, size, seed):
    evict = Evict(0.5, name)
    ranking = evict.bind(tiny_model(hidden_size=128, num_attention_heads=8, num_key_value_heads=4), range(4))
    kv = KV(numbers(2, 4, 40, 16, seed=seed), numbers(2, 4, 40, 16, seed=seed + 1))
    queries = numbers(2, 8, 40 if evict.queries < 0 else min(40, evict.queries), 16, seed=seed + 2)
    context = Context(3, 40, torch.arange(40)[None, None], queries if evict.looks_at_queries else None, 0.25)
    spread = numbers(2, 8, 5, 16, seed=seed + 3)

    def score(rank, heads):
        own = None if context.queries is None else part(queries, rank, heads.size)
        mine, here = (
            KV(part(kv.keys, rank, heads.size), part(kv.values, rank, heads.size)),
            replace(context, queries=own),
        )
        references = (part(spread, rank, heads.size), torch.arange(0, 40, 8)) if evict.references else None
        here = replace(here, heads=heads, references=references)
        if evict.tracks or evict.rereads:
            here = replace(here, memory=ranking.track(mine, here))
        return ranking.score(mine, here)

    torch.testing.assert_close(torch.cat(together(size, score), dim=1), score(0, ALONE))


@pytest.mark.parametrize("pool", ["mean", "max"])
@few
@given(size=SIZES, layers=st.integers(1, 3), seed=st.integers(0, 99))
def test_one_ranking_for_all_heads(pool, size, layers, seed):
    evict = Evict(0.5, pool=pool)
    scores = [numbers(2, 4, 30, seed=seed + layer) * 10**layer for layer in range(layers)]
    alone = evict.pooled(scores)
    for ranking in together(size, lambda rank, heads: evict.pooled([part(x, rank, size) for x in scores], heads)):
        torch.testing.assert_close(ranking, alone)


@few
@given(
    size=SIZES, granules=st.integers(0, 5), raw=st.integers(0, 9), granule=st.integers(1, 4), data=st.data(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_one_mix_of_granules_and_single_tokens(size, granules, raw, granule, data, seed):
    packed = granules * granule
    scores = numbers(2, 4, packed + raw, seed=seed)
    drop = data.draw(st.sampled_from([g * granule + r for g in range(granules + 1) for r in range(raw + 1)]))
    alone = choose(scores, packed, granule, drop)
    cuts = together(size, lambda rank, heads: choose(part(scores, rank, size), packed, granule, drop, heads))
    assert torch.equal(torch.cat([cut.granules for cut in cuts], dim=1), alone.granules)
    assert torch.equal(torch.cat([cut.raw for cut in cuts], dim=1), alone.raw)


def test_first_head():
    heads = Heads(1, 2, frozenset({3}))
    assert heads.places(0, 4) == [4, 5, 6, 7]
    assert heads.places(3, 4) == ALONE.places(0, 4) == [0, 1, 2, 3]
    assert replace(ALONE, chosen=(1, 5)).places(0, 2) == [1, 5]


def test_alone_says_what_it_is_told():
    x = numbers(1, 3, 5, seed=0)
    assert ALONE.gathered(x) == [x]
    assert ALONE.sum(x) is x
    assert torch.equal(ALONE.mean(x), x.mean(1, keepdim=True))
    assert torch.equal(ALONE.max(x), x.amax(1, keepdim=True))
