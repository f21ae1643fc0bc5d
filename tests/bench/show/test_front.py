"""The Pareto front, by its definition and by hand."""

import math

from hypothesis import given
from hypothesis import strategies as st

from kvstack.bench.show.front import pareto


def on_front(points):
    """By the definition: no other point is as good in all and better in one."""

    def beats(one, other):
        return all(a <= b for a, b in zip(one, other, strict=True)) and any(
            a < b for a, b in zip(one, other, strict=True)
        )

    return [not any(beats(other, point) for other in points) for point in points]


few = st.integers(0, 6)  # many ties


@given(st.lists(st.tuples(few, few), max_size=30))
def test_front_is_what_nothing_beats(points):
    assert pareto(points) == on_front(points)


@given(st.lists(st.tuples(few, few, st.floats(allow_nan=False)), max_size=20))
def test_front_of_three_measures(points):
    assert pareto(points) == on_front(points)


def test_front_worked_out_by_hand():
    assert pareto([(1, 5), (2, 2), (3, 3), (2, 2), (4, 1), (1, 6)]) == [True, True, False, True, True, False]


def test_what_was_not_measured_is_on_no_front_and_beats_nobody():
    assert pareto([(1, math.nan), (2, 2)]) == [False, True]
