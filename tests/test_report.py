"""What a report says beside the bytes of its parts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstack import CommonKV, KVStack, Quant
from kvstack.report import Report
from tests import tiny


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
    assert "together less than a dense cache from 1,000 tokens on" in " ".join(str(report()).split())
    assert report(nbytes=100).break_even is None
    assert "less than" not in str(report(nbytes=100))
    assert report(model_nbytes=0).break_even == 0
    assert report().to_dict()["break_even"] == 1000


@given(st.integers(1, 64))
def test_break_even_counts_the_tokens_of_all_rows(rows):
    """Of many texts, each saves its part."""
    many = Report("a stack", 100, 100, 40 * rows, 100 * rows, [], 600, rows=rows)
    assert many.break_even == report().break_even


@pytest.mark.parametrize("rows", [1, 3])
def test_from_break_even_on_a_stack_is_smaller_with_all_that_was_fitted(rows):
    """Told at a short text, where sinks and window weigh most, and looked at in one as long, or in the same where its
    rows are more tokens already."""
    model = tiny.model()
    stack = KVStack([CommonKV(), Quant(4)], window=64, model=model)
    model(tiny.tokens(rows, 120), past_key_values=stack)
    tokens = stack.report().break_even
    assert tokens > 120, "a single row of the text has not paid yet"
    stack.reset()
    model(tiny.tokens(rows, max(120, -(-tokens // rows))), past_key_values=stack)
    assert stack.nbytes + stack.model_nbytes <= stack.dense_nbytes


@pytest.mark.parametrize("seen", [0, 1])
def test_an_empty_stack_has_none(seen):
    assert report(seen, 0, 0).break_even is None
    assert not math.isnan(report(seen, 0, 0).compression)
