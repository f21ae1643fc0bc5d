"""KVzip: the largest attention that a token gets while the model repeats the text, against a dense cache that is given
the text twice; and a second reading that leaves nothing behind."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvstack import KV, CommonKV, Context, Evict, KVStack, KVzip, Quant, SnapKV, Tiers, UseError, rereading
from kvstack.batch import Batch
from tests import tiny

SETTINGS = {"sinks": 2, "window": 8, "block": 8}


def kvzip(keep=0.4, **settings):
    return KVStack([Evict(keep, "kvzip")], **(SETTINGS | settings))


def received(stack, layer):
    """(B, H, T) what a stack of one cohort remembers."""
    (cohort,) = stack.batch.cohorts
    return cohort.stores[layer].memory[0].tensors["received"].float()


def largest(model, ids, first=0):
    """(layers, B, H, T): the largest attention of each token of a dense cache from the tokens `first` and later, which
    are read again in chunks."""
    cache, found = DynamicCache(config=model.config), None
    model(ids, past_key_values=cache)
    for start in range(first, ids.shape[1], rereading.CHUNK):
        again = ids[:, max(first, start - rereading.LEAD) : start + rereading.CHUNK]
        looked = model(again, past_key_values=copy.deepcopy(cache), output_attentions=True).attentions
        most = torch.stack([x[..., : ids.shape[1]].unflatten(1, (2, 2)).amax((2, 3)) for x in looked])
        found = most if found is None else torch.maximum(found, most)
    return found


@pytest.mark.parametrize("chunk", [2048, 24, 7])
def test_it_is_the_largest_attention_of_a_second_reading(chunk, monkeypatch):
    monkeypatch.setattr(rereading, "CHUNK", chunk)
    monkeypatch.setattr(rereading, "LEAST", 1)
    model, ids, stack = tiny.model("llama", "eager"), tiny.tokens(2, 61), kvzip(1.0)
    model(ids, past_key_values=stack)
    expected = largest(model, ids)
    for layer in range(4):
        torch.testing.assert_close(received(stack, layer), expected[layer], atol=1e-3, rtol=1e-3)


def test_a_later_turn_is_read_again_and_the_maximum_stays():
    """Chunks of a prompt that is read in several forwards are later turns, too."""
    model, ids, stack = tiny.model("llama", "eager"), tiny.tokens(1, 90), kvzip(1.0)
    for part in ids.split([50, 1, 1, 38], dim=1):
        model(part, past_key_values=stack)
    first = torch.nn.functional.pad(largest(model, ids[:, :50]), (0, 40))
    expected = torch.maximum(first, largest(model, ids, 52))
    for layer in range(4):
        torch.testing.assert_close(received(stack, layer), expected[layer], atol=1e-3, rtol=1e-3)


def test_every_head_keeps_what_scores_highest():
    model, ids, stack = tiny.model("llama", "eager"), tiny.tokens(1, 100), kvzip(0.3)
    model(ids, past_key_values=stack)
    expected = largest(model, ids)
    looked = model(ids, output_attentions=True).attentions
    for layer in range(4):
        newest = looked[layer][:, :, -8:].unflatten(1, (2, 2)).amax((2, 3))
        scores = torch.maximum(expected[layer], newest)[0, :, 2:92]
        kept = scores.half().sort(dim=-1, stable=True, descending=True).indices[:, : stack.held - 10] + 2
        for head in range(2):
            assert set(kept[head].tolist()) == set(stack.positions(layer)[head, 2:-8].tolist())


def test_decoded_tokens_are_ranked_by_the_newest_queries():
    keys, queries = tiny.numbers(0, 1, 2, 12, 4), tiny.numbers(1, 1, 2, 3, 4)
    memory = {"received": torch.nn.functional.pad(torch.full((1, 2, 9), 0.25).half(), (0, 3))}
    context = Context(0, 12, torch.arange(12)[None, None], queries=queries, scaling=0.5, memory=memory)
    found = KVzip().score(KV(keys, keys), context)
    for head in range(2):
        for token in range(12):
            most = 0.25 if token < 9 else 0.0
            for number in range(3):
                dots = 0.5 * (keys[0, head] @ queries[0, head, number])
                if token <= 9 + number:
                    most = max(most, float(dots[: 10 + number].softmax(0)[token]))
            assert abs(float(found[0, head, token]) - most) < 1e-3


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@settings(max_examples=10)
@given(
    lengths=LENGTHS,
    turns=st.lists(st.tuples(LENGTHS, st.booleans()), max_size=3),
    chunk=st.sampled_from([4, 16, 2048]),
    name=st.sampled_from(["llama", "gemma3", "qwen3_next"]),
    stages=st.sampled_from([[], [Quant(8, group=8)]]),
)
def test_a_second_reading_leaves_nothing_behind(lengths, turns, chunk, name, stages):
    """All that is held, but for what the score remembers, is what a score that reads once holds; so are the logits."""
    model = tiny.model(name)
    one = KVStack([Evict(1.0, KVzip()), *stages], model=model, **SETTINGS)
    other = KVStack([Evict(1.0, SnapKV(window=8), layers=1), *stages], model=model, **SETTINGS)
    rows, mask = len(lengths), torch.zeros(len(lengths), 0, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rereading, "CHUNK", chunk)
        patch.setattr(rereading, "LEAST", 1)
        for number, (each, left) in enumerate([(lengths, True), *turns]):
            ids, new = tiny.left_padded([each[row % len(each)] for row in range(rows)], seed=number)
            if not left:
                ids, new = ids.flip(1), new.flip(1)
            mask = torch.cat([mask, new], dim=1)
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            given = {"attention_mask": mask, "position_ids": places}
            logits = [model(ids, past_key_values=stack, **given).logits for stack in (one, other)]
            assert torch.equal(logits[0][new.bool()], logits[1][new.bool()])
    mine, theirs = ([(what, x) for _, what, x in stack.parts() if what != "received"] for stack in (one, other))
    assert [what for what, _ in mine] == [what for what, _ in theirs]
    for (what, x), (_, y) in zip(mine, theirs, strict=True):
        assert what == "raw" or torch.equal(x, y)  # behind raw tokens is reserve
    for layer in one.compressed_layers:
        for row in range(rows):
            assert torch.equal(one.positions(layer, row), other.positions(layer, row))
            assert torch.equal(one.read(layer, row).keys, other.read(layer, row).keys)
            assert torch.equal(one.read(layer, row).values, other.read(layer, row).values)
    remembered = sum(x.nbytes for _, what, x in one.parts() if what == "received")
    assert one.nbytes - remembered <= other.nbytes
    assert (one.seen, one.held, one.batch.text, one.batch.running) == (other.seen, other.held, None, False)


def test_generation_is_not_touched():
    """Random numbers, what hooks of the decoder are told, and recorded outputs are those of one reading."""
    model, ids, heard = copy.deepcopy(tiny.model("llama", "eager", attention_dropout=0.1)), tiny.tokens(1, 60), []
    model.model.register_forward_hook(lambda module, args, output: heard.append(output.last_hidden_state.shape))
    for training in (False, True):
        model.train(training)
        found = []
        for stack in (kvzip(1.0), KVStack([Evict(1.0, "h2o")], **SETTINGS)):
            torch.manual_seed(3)
            out = model(ids, past_key_values=stack, output_hidden_states=True, output_attentions=True)
            found.append([out.logits, *out.hidden_states, *out.attentions, torch.get_rng_state()])
        assert len(found[0]) == len(found[1])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert heard == [(1, 60, 64)] * 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["attention", "taken back", "settling"])
@pytest.mark.parametrize("bound", [True, False])
def test_a_second_reading_that_is_stopped(place, error, bound, monkeypatch):
    """The stack refuses to go on, other caches of the model are as before, and `reset` makes it good."""
    model, ids, calls = copy.deepcopy(tiny.model()), tiny.tokens(1, 80), []
    expected = model(ids, past_key_values=DynamicCache()).logits
    stack = kvzip(model=model if bound else None)

    def stop(*args):
        calls.append(1)
        if place != "attention" or len(calls) == 2:
            raise error

    with monkeypatch.context() as patch:
        handle = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(
            stop if place == "attention" else lambda *_: None
        )
        if place != "attention":
            patch.setattr(Batch, "take_back" if place == "taken back" else "_settle_all", stop)
        if place == "settling":
            patch.setattr(Batch, "catch_up", lambda *_: None)
        with pytest.raises(error):
            model(ids, past_key_values=stack)
        handle.remove()
    assert torch.equal(model(ids, past_key_values=DynamicCache()).logits, expected)
    for go_on in (
        lambda: model(tiny.tokens(1, 1), past_key_values=stack),
        lambda: stack.crop(-1),
        lambda: copy.deepcopy(stack),
    ):
        with pytest.raises(UseError, match=r"the last forward of this cache did not end.* Call reset\(\)"):
            go_on()
    stack.reset()
    fresh = kvzip(model=model)
    for cache in (stack, fresh):
        model(ids, past_key_values=cache)
    for layer in range(4):
        assert torch.equal(stack.positions(layer), fresh.positions(layer))


def test_embeddings_are_repeated_as_well():
    model, ids = tiny.model(), tiny.tokens(2, 70)
    one, other = kvzip(), kvzip()
    model(ids, past_key_values=one)
    model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=other)
    for layer in range(4):
        assert torch.equal(one.positions(layer), other.positions(layer))


def test_layers_that_are_called_one_by_one_are_refused():
    model, stack = tiny.model(), kvzip(model=tiny.model())
    model(tiny.tokens(1, 20), past_key_values=stack)
    hidden, places = model.model.embed_tokens(tiny.tokens(1, 5)), torch.arange(20, 25)[None]
    tables = model.model.rotary_emb(hidden, places)
    before = [x.clone() for x in stack.tensors()]
    with pytest.raises(UseError, match=r'KVzip\(\).* reads a text a second time, and does not know.* score="kvzap"'):
        model.model.layers[0](hidden, past_key_values=stack, position_embeddings=tables, position_ids=places)
    assert all(torch.equal(x, y) for x, y in zip(before, stack.tensors(), strict=True))
    model(tiny.tokens(1, 5), past_key_values=stack)
    assert stack.seen == 25


def test_learned_positions_end_with_their_table():
    """The text is repeated at the last positions there are."""
    model, stack = tiny.model("opt", max_position_embeddings=100), kvzip()
    model(tiny.tokens(1, 97), past_key_values=stack)
    model(tiny.tokens(1, 1), past_key_values=stack)
    assert (stack.seen, stack.held < 60) == (98, True)


def test_tables_that_depend_on_the_length_stay():
    scaled = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    torch.manual_seed(0)
    config = LlamaConfig(**(tiny.SHAPE | scaled | {"max_position_embeddings": 64}))
    model, ids, stack = LlamaForCausalLM(config).eval(), tiny.tokens(1, 60), kvzip()
    before = model.model.rotary_emb.inv_freq.clone()
    model(ids, past_key_values=stack)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert stack.held < 40


def test_positions_go_on_behind_the_text():
    """Wherever the text was placed, its repetition stands behind it."""
    model, ids = tiny.model(dtype=torch.float64), tiny.tokens(1, 60)
    stacks = [kvzip() for _ in range(2)]
    for stack, first in zip(stacks, (0, 500), strict=True):
        model(ids, past_key_values=stack, position_ids=torch.arange(first, first + 60)[None])
    for layer in range(4):
        assert torch.equal(*(stack.positions(layer) for stack in stacks))


def test_assisted_decoding_reads_the_accepted_prompt_again():
    """Guesses behind the prompt are not repeated, and later ones count as decoded tokens."""
    model, ids = tiny.model(dtype=torch.float64), tiny.tokens(1, 70)
    stack, plain = kvzip(model=model), kvzip(model=model)
    stack.activate_past_recording()
    model(torch.cat([ids, tiny.tokens(1, 9, seed=5)], dim=1), past_key_values=stack)
    assert any(what == "tokens to read again" for _, what, _ in stack.parts())
    twin = copy.deepcopy(stack)
    for cache in (stack, twin):
        cache.crop(-9)
    model(ids, past_key_values=plain)
    for layer in range(4):
        assert torch.equal(stack.positions(layer), plain.positions(layer))
        assert torch.equal(stack.positions(layer), twin.positions(layer))
    assert not any(what == "tokens to read again" for _, what, _ in stack.parts())
    readings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "end_reading", lambda *_: readings.append(1))
        model(tiny.tokens(1, 4, seed=6), past_key_values=stack)
        stack.crop(-2)
    assert not readings


@pytest.mark.parametrize("mode", tiny.MODES)
def test_tiers(mode):
    model, ids = tiny.model(), tiny.tokens(1, 30).repeat(1, 5)
    stack = KVStack([CommonKV(1.0, layers=2), Quant(8), Tiers("kvzip")], **SETTINGS)
    model.generate(ids, past_key_values=stack, max_new_tokens=20, **tiny.MODES[mode])
    assert stack.held == stack.seen
    assert any("class" in what for _, what, _ in stack.parts())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    model, stack = tiny.model(dtype=dtype), kvzip()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(tiny.tokens(2, 90), past_key_values=stack).logits
    assert bool(logits.isfinite().all())
    assert stack.held < 60


def test_what_it_remembers_takes_two_bytes_a_token_and_head():
    model, stack = tiny.model(), kvzip()
    model(tiny.tokens(3, 90), past_key_values=stack)
    parts = [x for _, what, x in stack.parts() if what == "received"]
    assert len(parts) == 4
    assert all(x.nbytes == 2 * 3 * 2 * stack.held for x in parts)
