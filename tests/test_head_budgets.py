"""Budgets of kv heads: found by one threshold over all of them, and shared out so that the mean is what was asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstack import head_budgets
from kvstack.store.budget import GRID, Profile, alike


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0, 1))
def test_the_mean_over_heads_is_what_all_keep(seed, heads, keep):
    scores = {layer: torch.randn(heads, 200, generator=torch.Generator().manual_seed(seed + layer)) for layer in (0, 3)}
    found = head_budgets._shares(scores)
    profiles = [Profile(own.tolist()) for layer in found for own in found[layer]]
    assert sum(profile.at(keep) for profile in profiles) / len(profiles) == pytest.approx(keep, abs=1e-6)
    for profile in profiles:
        assert 0 <= profile.at(keep) <= 1
        assert list(profile.shares) == sorted(profile.shares)
    for layer in found:
        pieces = alike(found[layer], keep)
        assert sorted(head for heads_of_piece, _ in pieces for head in heads_of_piece) == list(range(heads))
        mean = sum(len(of_piece) * profile.at(keep) for of_piece, profile in pieces) / heads
        assert mean == pytest.approx(sum(Profile(own.tolist()).at(keep) for own in found[layer]) / heads, abs=1e-6)


def test_best_tokens_of_all_heads_are_counted():
    scores = {0: torch.tensor([[3.0, 2.0], [0.0, 1.0]]), 1: torch.tensor([[9.0, 8.0], [-1.0, -2.0]])}
    found, half = head_budgets._shares(scores), GRID.index(0.5)
    assert found[0][:, half].tolist() == [1, 0]
    assert found[1][:, half].tolist() == [1, 0]
