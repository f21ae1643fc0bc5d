"""What a report says beside the bytes of its parts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstack.report import Report


def report(seen=100, nbytes=40, dense_nbytes=100, model_nbytes=600):
    return Report("a stack", seen, seen, nbytes, dense_nbytes, [], model_nbytes)


@given(st.integers(1, 10**6), st.integers(0, 10**9), st.integers(1, 10**9), st.integers(1, 10**10))
def test_from_break_even_on_a_stack_saves_what_was_fitted_too(seen, nbytes, saved, model_nbytes):
    made = report(seen, nbytes, nbytes + saved, model_nbytes)
    tokens = made.break_even
    assert tokens * saved >= model_nbytes * seen, "in all, at the bytes a token takes"
    assert (tokens - 1) * saved < model_nbytes * seen, "and not a token earlier"


def test_break_even_is_said_where_there_is_one():
    assert report().break_even == 1000
    assert "saved again from 1,000 tokens on" in " ".join(str(report()).split())
    assert report(nbytes=100).break_even is None
    assert "saved again" not in str(report(nbytes=100))
    assert report(model_nbytes=0).break_even == 0
    assert report().to_dict()["break_even"] == 1000


@pytest.mark.parametrize("seen", [0, 1])
def test_an_empty_stack_has_none(seen):
    assert report(seen, 0, 0).break_even is None
    assert not math.isnan(report(seen, 0, 0).compression)
