"""Tokens that are taken back before they are compressed (assisted decoding, prompt lookup) leave no trace."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from transformers import DynamicCache

from kvstack import CommonKV, Evict, KVStack, Quant, registry
from tests import tiny
from tests.stages import Pairs

SETTINGS = {"sinks": 2, "window": 6, "block": 8}
STACKS = {score: [Evict(0.4, score)] for score in registry.BUILT_IN["scores"]}
STACKS |= {
    "heads": [Evict(0.4, "snapkv(window=8)", layers=1)],
    "quant": [Quant(8, group=8), Evict(20, "tova")],
    "refit": [Evict(0.4, refit=True)],
    "budgets": [Evict(0.4, budgets="heads")],
    "commonkv": [CommonKV(1.0, layers=2), Quant(8), Evict(0.5)],
}


def conversation(stages, guesses, seed, fused=True):
    """Feed a prompt with guesses behind it, then a few new tokens with guesses, as assisted decoding does."""
    model = tiny.model("llama", dtype=torch.float64)
    stack = KVStack(stages, model=model, fused=fused, **SETTINGS)
    stack.activate_past_recording()
    for turn, (length, rejected) in enumerate(guesses):
        real = tiny.tokens(1, length, seed=turn)
        wrong = tiny.tokens(1, rejected, seed=seed + turn)
        model(torch.cat([real, wrong], dim=1), past_key_values=stack)
        stack.crop(-rejected)
    return stack


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
def test_how_many_guesses_there_were_steers_nothing(stages):
    """A token that is checked together with guesses counts as it does alone. (Not fused: a single query would read
    codes in float32, and several of them read decoded tokens.)"""
    rejected = [3, 0, 5, 1, 0, 12, 2, 4, 1, 7, 0, 3, 9, 2]
    one = conversation(stages, [(60, 4), *((1, n) for n in rejected), (3, 5), (1, 0)], seed=100, fused=False)
    other = conversation(stages, [(60, 0), *((1, 0) for _ in rejected), (3, 0), (1, 0)], seed=200, fused=False)
    for layer in one.compressed_layers:
        assert tiny.positions_by_head(one, layer) == tiny.positions_by_head(other, layer)
    queries = [[x for _, name, x in stack.parts() if name == "recent queries"] for stack in (one, other)]
    for mine, theirs in zip(*queries, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("score", registry.BUILT_IN["scores"])
def test_a_prompt_may_be_read_without_a_crop(score):
    """Whoever goes on has accepted what was fed: the tokens after the prompt may still be taken back."""
    positions = []
    for seed in (1, 2):
        stack = KVStack([Evict(30, score)], model=tiny.model("llama", dtype=torch.float64), **SETTINGS)
        stack.activate_past_recording()
        stack.binding.model(tiny.tokens(1, 90), past_key_values=stack)
        guesses = torch.cat([tiny.tokens(1, 9, seed=3), tiny.tokens(1, 5, seed=seed)], dim=1)
        stack.binding.model(guesses, past_key_values=stack)
        stack.crop(-5)
        positions.append(torch.cat([stack.positions(layer).flatten() for layer in stack.compressed_layers]))
    assert torch.equal(*positions)


def test_assistance_that_has_ended_delays_nothing():
    """Two forwards that nobody crops: from then on a forward is compressed when it ends."""
    stack = conversation([Evict(20, "keydiff")], [(60, 3)], seed=100)
    assert stack.batch.recording
    stack.binding.model(tiny.tokens(1, 20), past_key_values=stack)
    stack.binding.model(tiny.tokens(1, 20), past_key_values=stack)
    stack.binding.model(tiny.tokens(1, 20), past_key_values=stack)
    assert not stack.batch.recording
    assert stack.held <= 20 + 8


def held(stack):
    for layer in stack.compressed_layers:
        for head in range(2):
            yield stack.positions(layer, 0, head)
            kv = stack.read(layer, 0, head)
            yield kv.keys
            yield kv.values
    for store in stack.batch.stores:
        for track in store.tracks():
            yield from (x for name, x in track.parts() if name != "raw")  # behind raw tokens is reserve


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
@settings(max_examples=4)
@given(
    st.integers(20, 70),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(0, 12),
)
def test_rejected_guesses_steer_nothing(stages, prompt, turns, rejected):
    """Whatever was guessed, what is held of the text is the same, and so is what scores remember of it."""
    guesses = [(prompt, rejected), *turns]
    one, other = (conversation(stages, guesses, seed) for seed in (100, 200))
    assert one.seen == other.seen == sum(length for length, _ in guesses)
    for mine, theirs in zip(held(one), held(other), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("score", registry.BUILT_IN["scores"])
def test_the_text_alone_is_what_counts(score):
    """Guesses that are taken back leave the same tokens as a text without guesses."""
    model = tiny.model("llama", dtype=torch.float64)
    stack = conversation([Evict(0.4, score)], [(70, 9)], seed=100)
    plain = KVStack([Evict(0.4, score)], model=model, **SETTINGS)
    model(tiny.tokens(1, 70, seed=0), past_key_values=plain)
    for layer in plain.compressed_layers:
        assert torch.equal(stack.positions(layer), plain.positions(layer))


def test_a_deep_crop_waits_for_new_queries():
    """No query of what is left is known: nothing is evicted until there is one."""
    model = tiny.model("llama")
    stack = KVStack([Evict(0.3, "tova")], model=model, **SETTINGS)
    model(tiny.tokens(1, 60), past_key_values=stack)
    for seed in range(4):
        model(tiny.tokens(1, 1, seed=seed), past_key_values=stack)
    stack.crop(-30)
    assert all(known.newest(-1) is None for store in stack.batch.stores for known in store.queries)
    stack.batch.stores[0].settle(stack.seen, 0, [1.0] * 4, stack.batch.work)
    held = stack.held
    model(tiny.tokens(1, 20, seed=9), past_key_values=stack)
    assert stack.held <= held + 20
    assert stack.held <= 0.3 * (stack.seen - 8) + 8


DEEP = {
    "heads": [Evict(0.5, "keydiff", layers=1)],
    "shared": [Evict(0.5, "keydiff", layers=4)],
    "count": [Evict(30, "knorm", layers=1)],
    "quant": [Quant(8, group=8), Evict(0.5, "keydiff", layers=4)],
}


@pytest.mark.parametrize("stages", DEEP.values(), ids=DEEP)
@settings(max_examples=10)
@example(prompt=200, turns=[(60, [1])])
@given(
    prompt=st.integers(100, 220),
    turns=st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(1, 8), max_size=4)), min_size=1, max_size=3),
)
def test_tokens_keep_their_true_positions(stages, prompt, turns):
    """However deep a crop is, and whatever comes after it: a key that is held is that of its position."""
    model = tiny.model("llama")
    stack = KVStack(stages, model=model, sinks=4, window=16)
    text = tiny.tokens(1, prompt)
    model(text, past_key_values=stack)
    for turn, (deep, lengths) in enumerate(turns):
        remove = min(deep, text.shape[1] - 1)
        stack.crop(-remove)
        text = text[:, : text.shape[1] - remove]
        for i, length in enumerate(lengths):
            new = tiny.tokens(1, length, seed=10 * turn + i + 1)
            model(new, past_key_values=stack)
            text = torch.cat([text, new], dim=1)
        dense = DynamicCache()
        model(text, past_key_values=dense)
        positions, held = stack.positions(0).long(), stack.read(0)
        index = positions.expand(2, -1)[None, :, :, None].expand(-1, -1, -1, 16)
        # of the first layer, whose keys and values depend on nothing but the token and its position
        torch.testing.assert_close(held.keys, dense.layers[0].keys.gather(2, index), atol=0.1, rtol=0)
        torch.testing.assert_close(held.values, dense.layers[0].values.gather(2, index), atol=0.1, rtol=0)


@pytest.mark.parametrize("stages", [[Quant(8, group=8)], [Pairs()], []], ids=str)
@pytest.mark.parametrize("remove", [3, 20, 60])
def test_a_crop_makes_nothing_go_that_may_stay(stages, remove):
    """The window reaches into sealed tokens then, and is no part of the budget."""
    model = tiny.model()
    stack = KVStack([*stages, Evict(1.0, "keydiff")], sinks=2, window=16, block=8)
    model(tiny.tokens(1, 200), past_key_values=stack)
    stack.crop(-remove)
    for length in (1, 5, 40):
        model(tiny.tokens(1, length), past_key_values=stack)
        assert stack.held == stack.seen


def test_a_crop_gives_memory_back():
    model = tiny.model()
    stack = KVStack([])
    model(tiny.tokens(1, 1000), past_key_values=stack)
    stack.crop(-990)
    assert stack.nbytes < 5 * stack.dense_nbytes


def test_a_head_that_holds_nothing_after_a_deep_crop():
    """It is empty, and goes on as the others do."""
    model, stack = tiny.model(), KVStack([Evict(0.3, budgets="heads")], sinks=0, window=5)
    model(tiny.tokens(1, 288), past_key_values=stack)
    stack.crop(-287)
    counts = {len(stack.positions(0, 0, head)[0]) for head in range(2)}
    assert 0 in counts
    for head in range(2):
        kv = stack.read(0, 0, head)
        assert kv.keys.shape == (1, 1, len(stack.positions(0, 0, head)[0]), 16)
        assert kv.values.shape == kv.keys.shape
    model(tiny.tokens(1, 3), past_key_values=stack)
    assert stack.seen == 4
