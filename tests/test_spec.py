"""Specs: whatever text or dict is given, a stack comes back whose spec reads back equal, or one error that says why."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstack import Evict, KVStack, Quant, Score, SpecError, StageError
from kvstack.spec import LONGEST, check_types

ODD = [
    "quant:\ud800",
    "quant:" + "~" * 1000 + "2",
    "quant:" + "1/" * 1000 + "2",
    "quant:" + "1/" * LONGEST,
    "quant:{[]:1}",
    "quant:2)*(3",
    "quant:2),f(3",
    "quant:2)(4",
    "quant:2).x(4",
    "quant:2)#",
    "quant:0x" + "f" * 5000,
    "quant:2,**{'bits':4}",
    "quant:bits=2,bits=4",
    "commonkv:0.5,basis=weights,merge=mean,weights=abc",
    "evict:0.5,score=random(seed=x)",
    "evict:0.5,share_heads=no",
    "quant:2@window=x",
    "quant:2@window=True",
    "quant:2@fused=1",
    "quant:2@16",
    "quant:2@speed=3",
    "quant:2@window=8@block=8",
    {"stages": None},
    {"stages": "quant"},
    {"stages": [{"name": []}]},
    {"stages": [{"name": "quant", "bits": "2"}]},
    {"stages": [{"name": "evict", "keep": 0.5, "share_heads": "no"}]},
    {"stages": [{"name": "evict", "keep": 0.5, "score": {"name": "random", "seed": 1.5}}]},
    {"stages": [], 0: 1},
    {"stages": [], "window": 1.5},
]


@pytest.mark.parametrize("spec", ODD, ids=lambda spec: ascii(spec)[:40])
def test_odd_specs_are_refused(spec):
    with pytest.raises((SpecError, StageError)):
        KVStack.from_spec(spec)


def read_back(stack):
    again = KVStack.from_spec(stack.spec)
    assert repr(again) == repr(stack)
    assert again.to_dict() == stack.to_dict()
    assert repr(KVStack.from_spec(json.loads(json.dumps(stack.to_dict())))) == repr(stack)


def check(spec):
    try:
        stack = KVStack.from_spec(spec)
    except (SpecError, StageError):
        return
    read_back(stack)


PIECES = [
    "quant",
    "evict",
    "commonkv",
    "random",
    "snapkv",
    ":",
    "+",
    ",",
    "=",
    "(",
    ")",
    "@",
    "/",
    "'",
    "a b",
    "\n",
    "#",
]
PIECES += ["2", "4", "0.2", "-1", "1e308", "nan", "None", "True", "keep", "bits", "score", "window", "layers", "seed"]
PIECES += ["[", "]", "{", "}", "*", "**", "lambda:0", "~", "\\", "\x00", "é", "if", "f"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text(text):
    check(text)


@given(st.text(max_size=30))
def test_any_characters_behind_a_stage(text):
    check(f"quant:{text}")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
SETTINGS = st.dictionaries(
    st.sampled_from(["bits", "keep", "score", "layers", "group", "share_heads"]), LEAVES, max_size=4
)
STAGE = st.builds(lambda name, settings: {"name": name, **settings}, st.sampled_from(["quant", "evict", "x"]), SETTINGS)


@given(
    st.dictionaries(st.sampled_from(["window", "sinks", "block", "device", "fused"]), LEAVES, max_size=2),
    st.lists(STAGE | LEAVES, max_size=2),
)
def test_any_dict(settings, stages):
    check({"stages": stages, **settings})


WRITTEN = {
    "quant:bits=2@window=16": lambda: KVStack([Quant(2)], window=16),
    "evict:keep=0.2@sinks=0,fused=False": lambda: KVStack([Evict(0.2)], sinks=0, fused=False),
    "quant:bits=2@device='cpu'": lambda: KVStack([Quant(2)], device="cpu"),
    "@block=64": lambda: KVStack(block=64),
}


@pytest.mark.parametrize("spec", WRITTEN)
def test_settings_of_the_stack_are_part_of_the_spec(spec):
    stack = WRITTEN[spec]()
    assert stack.spec == spec
    read_back(stack)


def test_a_setting_of_any_type():
    """A plugin may take anything for a setting."""

    @dataclass(frozen=True, repr=False)
    class Whatever(Score):
        thing: Any = None
        name = "whatever"

    for thing in (3, "x", None, (1, 2)):
        check_types(Whatever(thing))
