"""The settings of a stack that follow from its stages."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstack import CommonKV, Evict, KVStack, Quant, Tiers
from kvstack.binding import usual_window
from tests.stages import Pairs

STACKS = {
    "64 plain": lambda: [],
    "64 encoded": lambda: [Quant(2)],
    "64 evicted": lambda: [Evict(0.5)],
    "64 transformed and evicted": lambda: [CommonKV(), Quant(2), Evict(0.2)],
    "64 another transform": lambda: [Pairs()],
    "64 axes of the weights": lambda: [CommonKV(basis="weights")],
    "16 transformed": lambda: [CommonKV()],
    "16 in any order": lambda: [Quant(2), CommonKV()],
    "16 in classes": lambda: [Tiers(), CommonKV(), Quant(2)],
}


@pytest.mark.parametrize("name", STACKS)
def test_the_default_window_follows_from_the_stages(name):
    stages, expected = STACKS[name](), int(name.split()[0])
    stack = KVStack(stages)
    assert usual_window(stack.stages) == stack.window == expected
    assert KVStack(stages, window=None).window == expected
    assert "window" not in repr(stack)
    assert "@" not in stack.spec
    assert stack.to_dict()["window"] == expected  # a file says the number, whatever a later default is


WRITABLE = sorted(set(STACKS) - {"64 another transform"})  # no name stands for it in a spec


@given(st.sampled_from(WRITABLE), st.none() | st.integers(0, 99))
def test_a_window_is_told_where_it_is_not_the_default(name, window):
    stack = KVStack(STACKS[name](), window=window)
    changed = window is not None and window != int(name.split()[0])
    assert (f"window={window}" in repr(stack)) == (f"@window={window}" in stack.spec) == changed
    for described in (stack.spec, stack.to_dict(), json.loads(json.dumps(stack.to_dict()))):
        again = KVStack.from_spec(described)
        assert (repr(again), again.window, again.spec) == (repr(stack), stack.window, stack.spec)


def test_a_window_of_none_can_be_written():
    assert KVStack.from_spec("commonkv@window=None").window == 16
    assert KVStack.from_spec({"stages": [{"name": "quant", "bits": 2}], "window": None}).window == 64
