"""KVSharer beside a Llama that shares by hand, alone and in stacks; the search beside plain loops."""

import copy
import doctest
import math
import tomllib
from pathlib import Path

import kvstack_kvsharer
import pytest
import torch
from kvstack_kvsharer import KVSharer, Strategy, search
from kvstack_kvsharer.strategy import _averages, _distances, kinds_of, resolved
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from typer.testing import CliRunner

from kvstack import (
    BindError,
    CalibrationError,
    CommonKV,
    Evict,
    KVStack,
    KVStackWarning,
    Quant,
    Score,
    StageError,
    UseError,
)
from kvstack.testing import check_registered, check_stage, tiny_model

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
STACKS = {
    "alone": [],
    "quant": [Quant(4, group=8)],
    "evict": [Evict(0.5, layers=1)],
    "h2o": [Evict(0.5, "h2o")],
    "quant_evict": [Quant(2, group=8), Evict(0.5, layers=1)],
}
SHARES = [{3: 1}, {2: 0, 3: 0}, {1: 0, 2: 1, 3: 2}]


@pytest.fixture(autouse=True)
def _no_gradients(monkeypatch, tmp_path):
    monkeypatch.setattr("kvstack.calibration.keep.folder", lambda: tmp_path)
    with torch.no_grad():
        yield


def tokens(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def sharer(shares):
    return KVSharer(strategy=Strategy(shares))


def stack_of(shares, others=(), **settings):
    return KVStack([sharer(shares), *others], **{"sinks": 2, "window": 8, "block": 8} | settings)


# ---- beside a model that shares by hand


class ByHand:
    """A Llama whose layers attend in plain torch, each with the keys and values of the layer it reads."""

    def __init__(self, model, shares):
        self.model, self.shares, self.held, self.seen = copy.deepcopy(model), resolved(shares), {}, 0
        for layer in self.model.model.layers:
            layer.self_attn.forward = lambda hidden_states, module=layer.self_attn, **given: self.attend(
                module, hidden_states, *given["position_embeddings"]
            )

    def __call__(self, ids):
        places = torch.arange(self.seen, self.seen + ids.shape[1])[None]
        self.seen += ids.shape[1]
        return self.model(ids, position_ids=places, use_cache=False).logits

    def attend(self, module, hidden, cos, sin):
        rows, new, _ = hidden.shape
        layer = module.layer_idx

        def heads(x):
            return x.view(rows, new, -1, module.head_dim).transpose(1, 2)

        def rotate(x):
            half = module.head_dim // 2
            return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

        query = rotate(heads(module.q_proj(hidden)))
        if layer not in self.shares:
            pair = rotate(heads(module.k_proj(hidden))), heads(module.v_proj(hidden))
            old = self.held.get(layer)
            self.held[layer] = pair if old is None else tuple(map(lambda a, b: torch.cat([a, b], 2), old, pair))
        keys, values = (x.repeat_interleave(2, 1) for x in self.held[self.shares.get(layer, layer)])
        logits = query @ keys.transpose(-1, -2) / math.sqrt(module.head_dim)
        later = torch.ones(new, keys.shape[2], dtype=torch.bool).triu(keys.shape[2] - new + 1)
        mixed = logits.masked_fill(later, -torch.inf).softmax(-1) @ values
        return module.o_proj(mixed.transpose(1, 2).reshape(rows, new, -1)), None


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompt_chunks_and_steps_equal_sharing_by_hand(shares, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    stack, expected = stack_of(shares), ByHand(model, shares)
    for chunk in tokens(2, 60).split([40, 1, 1, 1, 16, 1], dim=1):
        torch.testing.assert_close(
            model(chunk, past_key_values=stack).logits, expected(chunk), atol=1e-5, rtol=1e-5, check_stride=False
        )


def test_the_layer_shares_it_is_told():
    """The reference notices another map."""
    model = tiny_model()
    found = model(tokens(1, 20), past_key_values=stack_of({3: 1})).logits
    assert (found - ByHand(model, {3: 0})(tokens(1, 20))).abs().max() > 0.1
    assert (found - model(tokens(1, 20)).logits).abs().max() > 0.1


@pytest.mark.parametrize("stage", [KVSharer(0), sharer({})], ids=repr)
def test_sharing_nothing_is_a_dense_cache(stage):
    model, stack, dense = tiny_model(), KVStack([stage]), DynamicCache()
    for chunk in tokens(2, 100).split([96, 1, 1, 1, 1], dim=1):
        found = model(chunk, past_key_values=stack).logits
        assert torch.equal(found, model(chunk, past_key_values=dense).logits)
    assert torch.equal(stack.read(3).keys[0], dense.layers[3].keys[0])


# ---- memory and work


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_bytes_are_those_of_the_layers_left(shares, name):
    model = tiny_model()
    one, other = stack_of(shares, STACKS[name]), KVStack(STACKS[name], sinks=2, window=8, block=8)
    for chunk in tokens(2, 90).split([70, *[1] * 20], dim=1):
        model(chunk, past_key_values=one)
        model(chunk, past_key_values=other)
        hashed = 2 * 8  # of the ids of two rows, whatever the layers hold
        assert (one.nbytes - hashed) * 4 == (other.nbytes - hashed) * (4 - len(shares))
    assert one.dense_nbytes == other.dense_nbytes == 2 * 90 * 4 * 2 * 2 * 16 * 4
    assert one.nbytes == sum(part.nbytes for part in one.report().parts)


def test_no_layer_is_overwritten_while_decoding():
    """In the published code, layers behind the number of those held keep the last token alone."""
    model, stack = tiny_model(num_hidden_layers=8), stack_of({3: 1, 5: 0})
    for chunk in tokens(1, 15).split([10, 1, 1, 1, 1, 1], dim=1):
        model(chunk, past_key_values=stack)
    assert [stack.read(layer).tokens for layer in range(8)] == [15] * 8
    assert [store.layers for store in stack.batch.cohorts[0].stores] == [[0], [1], [2], [4], [6], [7]]
    assert [stack.get_seq_length(layer) for layer in range(8)] == [15] * 8


class Counting(torch.nn.Linear):
    tokens = 0

    def forward(self, x):
        self.tokens += x.shape[:-1].numel()
        return super().forward(x)


def test_a_layer_that_reads_another_computes_no_keys_and_values():
    model = tiny_model()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).__class__ = Counting

    def count(name):
        return [getattr(layer.self_attn, name).tokens for layer in model.model.layers]

    stack = stack_of({3: 1}, [Quant(4, group=8)]).bind(model)
    before = [count(name) for name in ("q_proj", "k_proj", "v_proj")]
    for chunk in tokens(2, 53).split([50, 1, 1, 1], dim=1):
        model(chunk, past_key_values=stack)
    after = [count(name) for name in ("q_proj", "k_proj", "v_proj")]
    new = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
    assert new == [[106] * 4, [106, 106, 106, 0], [106, 106, 106, 0]]
    model(tokens(1, 7), past_key_values=DynamicCache())  # another cache needs them all
    assert count("k_proj")[3] - after[1][3] == 7


def test_models_that_clamp_keys_in_place():
    """What a resting projection gives is written into."""
    model = OlmoForCausalLM(OlmoConfig(**SHAPE, clip_qkv=0.5)).eval()
    stack = stack_of({3: 1})
    found = [model(chunk, past_key_values=stack).logits for chunk in tokens(2, 23).split([20, 1, 1, 1], dim=1)]
    assert all(logits.isfinite().all() for logits in found)
    assert torch.equal(stack.read(3).keys, stack.read(1).keys)


def test_no_hook_is_left():
    model = tiny_model()
    stack = stack_of({3: 1}).bind(model)
    assert model.model.layers[3].self_attn.k_proj._forward_pre_hooks
    stack.unbind()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_fused_projections_are_computed():
    model = Phi3ForCausalLM(Phi3Config(**SHAPE, sliding_window=None)).eval()
    stack = stack_of({3: 1}, [Quant(8, group=8)])
    model(tokens(1, 60), past_key_values=stack)
    found = model(tokens(1, 1), past_key_values=stack).logits
    assert found.isfinite().all()
    assert torch.equal(stack.read(3).keys, stack.read(1).keys)


# ---- in stacks


@pytest.mark.parametrize("name", STACKS)
def test_layers_that_are_left_go_the_same_way(name):
    """Layers before the first that reads another hold what they hold without it, bit for bit."""
    model, others = tiny_model(), STACKS[name]
    one, same, other = (
        stack_of({3: 1}, others),
        stack_of({}, others),
        KVStack(others, sinks=2, window=8, block=8),
    )
    for chunk in tokens(2, 90).split([70, *[1] * 20], dim=1):
        model(chunk, past_key_values=one)
        assert torch.equal(model(chunk, past_key_values=same).logits, model(chunk, past_key_values=other).logits)
    for layer in (0, 1, 2):
        assert torch.equal(one.positions(layer), other.positions(layer))
        assert torch.equal(one.read(layer).keys, other.read(layer).keys)
        assert torch.equal(one.read(layer).values, other.read(layer).values)
    assert one.held == other.held


@pytest.mark.parametrize("name", STACKS)
def test_a_prompt_sees_exact_keys_of_the_layer_it_reads(name):
    """Layer 1 waits until layer 3 has read it before it is compressed."""
    model = tiny_model()
    found = model(tokens(1, 90), past_key_values=stack_of({3: 1}, STACKS[name])).logits
    assert torch.equal(found, model(tokens(1, 90), past_key_values=stack_of({3: 1})).logits)


def test_reading_codes_equals_decoding_them():
    model = tiny_model().double()
    fused, decoded = (stack_of({3: 1, 2: 0}, STACKS["quant_evict"], fused=fused) for fused in (True, False))
    for chunk in tokens(2, 90).split([70, *[1] * 20], dim=1):
        found = model(chunk, past_key_values=fused).logits
        torch.testing.assert_close(found, model(chunk, past_key_values=decoded).logits, atol=1e-5, rtol=1e-5)


def test_a_transform_that_loses_nothing_changes_nothing():
    """All axes of the layers that are left, which are calibrated with nothing shared."""
    model, shares = tiny_model().double(), {2: 0, 3: 0}
    stack, expected = stack_of(shares, [CommonKV(1.0, layers=2)]), ByHand(model, shares)
    for chunk in tokens(2, 90).split([70, *[1] * 20], dim=1):
        found = model(chunk, past_key_values=stack).logits
        torch.testing.assert_close(found, expected(chunk), atol=1e-2, rtol=1e-2, check_stride=False)
    assert [store.layers for store in stack.batch.cohorts[0].stores] == [[0, 1]]
    assert stack.batch.cohorts[0].stores[0].sealed_tokens > 70
    assert torch.equal(stack.read(3).keys, stack.read(0).keys)


def test_a_transform_an_encoder_and_eviction_at_once(installed, tmp_path):
    """Bytes of half the layers, and of half the numbers of these."""
    model, path = tiny_model(), tmp_path / "strategy.json"
    Strategy({2: 0, 3: 0}).save(path)
    others, settings = [CommonKV(layers=2), Quant(4), Evict(0.5)], {"sinks": 2, "window": 8, "block": 8}
    one, other = KVStack([KVSharer(strategy=path), *others], **settings), KVStack(others, **settings)
    for stack in (one, other):
        model.generate(tokens(2, 150), past_key_values=stack, max_new_tokens=20, do_sample=False)

    def sealed(stack):
        return sum(part.nbytes for part in stack.report().parts if part.part.startswith("latent"))

    # two groups of channels compete for bits otherwise than one alone
    assert sealed(one) * 2 == pytest.approx(sealed(other), rel=0.02)
    assert one.held == other.held
    one.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model)
    for _ in range(3):
        found = model(tokens(2, 1), past_key_values=again).logits
        assert torch.equal(found, model(tokens(2, 1), past_key_values=one).logits)


def test_layers_that_are_left_must_divide():
    with pytest.raises(
        CalibrationError, match=r"3 full-attention layers that hold keys and values, .* one of \[1, 3\]"
    ):
        KVStack([sharer({3: 1}), CommonKV(layers=2)], model=tiny_model())


def left_padded(lengths):
    ids, mask = tokens(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return ids, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", STACKS)
def test_a_padded_row_generates_what_it_generates_alone(name, attention):
    # float64: products of several rows round differently than those of one
    model = tiny_model().double()
    model.set_attn_implementation(attention)
    lengths = [96, 61, 96, 5]
    ids, mask = left_padded(lengths)
    how = {"max_new_tokens": 20, "do_sample": False}
    stack = stack_of({3: 1, 2: 0}, STACKS[name])
    found = model.generate(ids, attention_mask=mask, past_key_values=stack, **how)[:, 96:]
    for row, length in enumerate(lengths):
        alone = stack_of({3: 1, 2: 0}, STACKS[name])
        own = model.generate(ids[row : row + 1, -length:], past_key_values=alone, **how)[0, length:]
        assert torch.equal(found[row], own)
        assert torch.equal(stack.positions(3, row), alone.positions(3))
        torch.testing.assert_close(stack.read(3, row).keys, alone.read(3).keys)


def test_scores_see_the_queries_of_the_layer_that_holds():
    model = tiny_model()
    seen = {}

    class Spy(Score):
        name, queries = "spy", 8

        def score(self, kv, context):
            seen.setdefault(context.layer, []).append(context.queries.clone())
            return kv.keys.norm(dim=-1)

    model(tokens(1, 90), past_key_values=stack_of({3: 1}, [Evict(0.5, Spy())]))
    shared, seen = seen, {}
    model(tokens(1, 90), past_key_values=KVStack([Evict(0.5, Spy())], sinks=2, window=8, block=8))
    assert sorted(shared) == [0, 1, 2]
    assert all(torch.equal(shared[layer][0], seen[layer][0]) for layer in shared)


@pytest.mark.parametrize("name", ["alone", "quant", "quant_evict"])
def test_rows_copies_and_crops(name):
    """All that moves tokens about leaves a stack that goes on as one that never did."""
    model = tiny_model()
    stack = stack_of({3: 1, 2: 0}, STACKS[name], model=model)
    model(tokens(2, 70), past_key_values=stack)
    twin = copy.deepcopy(stack)
    model(tokens(2, 3), past_key_values=twin)
    twin.crop(-3)
    twin.batch_repeat_interleave(2)
    twin.reorder_cache(torch.tensor([3, 2, 1, 0]))
    twin.batch_select_indices(torch.tensor([2, 0]))
    assert (twin.seen, twin.batch_size) == (70, 2)
    for _ in range(2):
        expected = model(tokens(2, 1), past_key_values=stack).logits
        torch.testing.assert_close(model(tokens(2, 1), past_key_values=twin).logits, expected, atol=1e-4, rtol=1e-4)


def test_saved_and_loaded(installed, tmp_path):
    model, strategy = tiny_model(), tmp_path / "strategy.json"
    Strategy({3: 1}).save(strategy)
    stack = KVStack([KVSharer(strategy=strategy), Quant(4, group=8), Evict(0.5)], sinks=2, window=8, model=model)
    model(tokens(2, 70), past_key_values=stack)
    stack.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model)
    for _ in range(3):
        found = model(tokens(2, 1), past_key_values=again).logits
        assert torch.equal(found, model(tokens(2, 1), past_key_values=stack).logits)
    Strategy({3: 0}).save(strategy)
    with pytest.raises(UseError, match="was saved where other layers shared keys and values than"):
        KVStack.load(tmp_path / "cache", model=model)


WAYS = [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 32}]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_generate_in_other_ways(how):
    model, ids = tiny_model().double(), tokens(1, 70)
    given = {"max_new_tokens": 20, "do_sample": False} | how
    found = model.generate(ids, past_key_values=stack_of({3: 1}), **given)
    expected, alone = ids, ByHand(model, {3: 1})
    if "num_beams" not in how:
        for _ in range(20):
            new = expected[:, -1:] if alone.seen else expected
            expected = torch.cat([expected, alone(new)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(found, expected)
    stack = stack_of({3: 1}, STACKS["quant_evict"])
    assert model.generate(ids, past_key_values=stack, **given).shape == found.shape
    assert stack.read(3).tokens == stack.held


def test_a_conversation_after_reset():
    model, stack = tiny_model(), stack_of({3: 1}, STACKS["quant_evict"])
    first = model.generate(tokens(1, 70), past_key_values=stack, max_new_tokens=10, do_sample=False)
    stack.reset()
    assert stack.nbytes == 0
    assert torch.equal(model.generate(tokens(1, 70), past_key_values=stack, max_new_tokens=10, do_sample=False), first)


# ---- the search


def test_distances_are_those_of_plain_loops():
    model = tiny_model()
    texts = [tokens(2, 12), tokens(1, 7, seed=1)]  # the last is shorter: it counts where it reaches
    found = _distances(_averages(model, texts, range(4)), kinds_of(model))
    caches = [DynamicCache() for _ in range(3)]
    for cache, ids in zip(caches, [texts[0][:1], texts[0][1:], texts[1]], strict=True):
        model(ids, past_key_values=cache)
    for i in range(4):
        for j in range(i):
            total = 0.0
            for part in ("keys", "values"):
                for position in range(12):
                    there = [c for c in caches if getattr(c.layers[0], part).shape[2] > position]
                    for head in range(2):
                        a, b = (sum(getattr(c.layers[n], part)[0, head, position] for c in there) for n in (i, j))
                        total += float((a - b).norm()) / len(there) / (12 * 2) / 2
            assert found[i, j] == pytest.approx(total, rel=1e-4)


def test_most_different_pairs_come_first():
    model = tiny_model(num_hidden_layers=6)
    found = {rank: search(model, share=0.5, rank=rank, threshold=-1.0) for rank in ("different", "similar", "random")}
    gone = {rank: [pair[2] for pair in strategy.pairs] for rank, strategy in found.items()}
    assert gone["different"] == sorted(gone["different"], reverse=True)
    assert gone["similar"] == sorted(gone["similar"])
    assert min(gone["different"]) > max(gone["similar"])
    assert [len(strategy.shares) for strategy in found.values()] == [3, 3, 3]
    assert search(model, share=0.5, rank="random", threshold=-1.0) == found["random"]
    assert found["random"].shares != search(model, share=0.5, rank="random", threshold=-1.0, seed=1).shares


def test_the_guard_is_the_cosine_of_the_last_hidden_state():
    """The cosine a strategy reports is that of the model that shares by hand, on the texts that were read."""
    model, read = tiny_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    strategy = search(model, share=0.25, threshold=-1.0)
    dense = next(ids for ids in read if ids.shape[0] > 1 and ids.shape[1] == 64)

    def last(run, inner):
        found = []
        handle = inner.model.norm.register_forward_hook(lambda *given: found.append(given[-1].flatten(1)))
        run(dense)
        handle.remove()
        return found[0]

    by_hand = ByHand(model, strategy.shares)
    cosine = torch.cosine_similarity(last(by_hand, by_hand.model), last(model, model), dim=1).mean()
    assert strategy.cosine == pytest.approx(float(cosine), abs=1e-4)
    assert search(model, share=0.25, threshold=float(cosine) - 1e-3).shares == strategy.shares
    assert search(model, share=0.25, threshold=float(cosine) + 1e-3).shares != strategy.shares


def test_fewer_layers_than_asked_for_are_said(caplog):
    strategy = search(tiny_model(), share=0.5, threshold=1.0)
    assert strategy.shares == {}
    assert "only 0 of 2 layers of this LlamaForCausalLM share with a cosine above 1.0" in caplog.text


def test_chains_lead_to_a_layer_that_holds():
    assert Strategy({3: 2, 2: 1, 5: 3}).shares == {2: 1, 3: 1, 5: 1}


class Letters:
    """A tokenizer with a token for each letter."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(letter) % 90 + 3 for letter in text]])}


def test_search_reads_the_texts_it_is_given():
    model, read = tiny_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    strategy = search(model, ["a" * 100, "b" * 50, "c" * 100], tokenizer=Letters(), threshold=-1.0, tokens=64)
    assert len(strategy.shares) == 1
    # and some tokens alone, which tell how keys are rotated
    assert {shape for shape in read if shape[1] > 1} == {(1, 50), (2, 64)}


def test_a_strategy_is_searched_once_and_kept(monkeypatch, tmp_path, caplog):
    model = tiny_model()
    first = KVStack([KVSharer(threshold=-1.0)], model=model)
    assert caplog.text.count("KVSharer searches which layers of this LlamaForCausalLM can share, once.") == 1
    (file,) = tmp_path.glob("*.json")
    assert len(first.binding.shares) == 1
    assert Strategy.load(file).shares == first.binding.shares

    def never(*given, **settings):
        pytest.fail("searched again")

    monkeypatch.setattr("kvstack_kvsharer.search", never)
    for known in (model, tiny_model()):  # this process knows; another one reads the file
        assert KVStack([KVSharer(threshold=-1.0)], model=known).binding.shares == first.binding.shares


def test_a_strategy_is_kept_for_the_layers_that_are_alike(monkeypatch):
    """On another device map a kept pair may lie on two devices: another is searched, and the first is not forgotten."""
    model = tiny_model()
    first = KVStack([KVSharer(threshold=-1.0)], model=model).binding.shares
    (layer,) = first
    kinds = kinds_of(model)
    with monkeypatch.context() as patch:
        for module in ("kvstack_kvsharer", "kvstack_kvsharer.strategy"):
            patch.setattr(f"{module}.kinds_of", lambda _: kinds | {layer: "something else"})
        assert layer not in KVStack([KVSharer(threshold=-1.0)], model=model).binding.shares
    monkeypatch.setattr("kvstack_kvsharer.search", lambda *given, **settings: pytest.fail("searched again"))
    assert KVStack([KVSharer(threshold=-1.0)], model=model).binding.shares == first


def test_it_binds_itself_in_a_forward():
    model, stack = tiny_model(), KVStack([KVSharer(threshold=-1.0), Quant(4)])
    model.generate(tokens(1, 100), past_key_values=stack, max_new_tokens=5, do_sample=False)
    assert len(stack.binding.shares) == 1
    assert stack.seen == 104


# ---- files


def test_a_strategy_comes_back_from_its_file(tmp_path):
    strategy = search(tiny_model(), share=0.5, threshold=-1.0)
    strategy.save(tmp_path / "strategy.json")
    again = Strategy.load(tmp_path / "strategy.json")
    assert again == strategy
    assert (again.settings["rank"], len(again.pairs)) == ("different", 2)
    assert hash(again) == hash(strategy)


def test_a_strategy_of_another_model_is_refused(tmp_path):
    search(tiny_model(), threshold=-1.0).save(tmp_path / "strategy.json")
    other = tiny_model(initializer_range=0.1)
    with pytest.raises(CalibrationError, match="was searched for another model than this LlamaForCausalLM"):
        KVStack([KVSharer(strategy=tmp_path / "strategy.json")], model=other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist. Make it again"),
        ("{", "is damaged or not a strategy"),
        ('{"format": "another"}', "is not a strategy of this version"),
        ('{"format": "kvstack-kvsharer strategy 1"}', "is damaged or not a strategy"),
        ('{"format": "kvstack-kvsharer strategy 1", "shares": [[1, 2]]}', "layer 1 cannot read layer 2"),
    ],
)
def test_files_that_are_no_strategy(content, message, tmp_path):
    path = tmp_path / "strategy.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        Strategy.load(path)


# ---- what cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.0}, r"share=1.0 is not a part of the layers, 0 or more and below 1"),
        ({"rank": "best"}, r"'best' is not a way to rank pairs of layers. Use one of: different"),
        ({"threshold": 2}, r"threshold=2 is not a cosine"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(StageError, match=message):
        KVSharer(**settings)
    with pytest.raises(CalibrationError, match=message):
        search(tiny_model(), **settings)


def test_a_path_is_quoted_in_a_spec(installed):
    with pytest.raises(StageError, match=r"strategy is not a path\. Quote it in a spec: strategy='out/strategy'"):
        KVStack.from_spec("kvsharer:strategy=out/strategy")
    assert KVStack.from_spec("kvsharer:strategy='out/strategy'").stages == (KVSharer(strategy="out/strategy"),)


def test_a_strategy_says_it_all():
    with pytest.raises(StageError, match=r"a strategy says which layers share\. Leave the other settings out"):
        KVSharer(0.5, strategy="strategy.json")


def test_texts_need_a_tokenizer():
    with pytest.raises(CalibrationError, match=r"is not known, and texts were given. Pass tokenizer="):
        search(tiny_model(), ["one"])
    with pytest.raises(CalibrationError, match="no text to search with"):
        search(tiny_model(), [], tokenizer=Letters())


def test_a_share_of_no_layer():
    with pytest.raises(CalibrationError, match=r"share=0.1 of 4 full-attention layers .* Use share=0.25 or more"):
        KVStack([KVSharer(0.1)], model=tiny_model())


def test_one_layer_cannot_share():
    with pytest.raises(BindError, match="needs two full-attention layers that one can read the other"):
        KVStack([KVSharer(0.5)], model=tiny_model(num_hidden_layers=1))


@pytest.mark.parametrize("layers", [1, 2])
def test_the_default_of_a_model_with_few_layers(layers):
    more = "Leave it out" if layers == 1 else "Use share=0.5 or more"
    with pytest.warns(KVStackWarning, match=f"not a whole layer of the {layers} full-attention layers .* {more}"):
        stack = KVStack([KVSharer()], model=tiny_model(num_hidden_layers=layers))
    assert not stack.binding.shares


def test_layers_the_model_does_not_have():
    with pytest.raises(BindError, match=r"layer 9 should read layer 1, and the full-attention layers .* \[0, 1\]"):
        KVStack([sharer({9: 1})], model=tiny_model(num_hidden_layers=2))


def test_attention_that_does_not_show_itself(monkeypatch):
    monkeypatch.setattr("kvstack.binding.gives_queries", lambda module: False)
    with pytest.raises(BindError, match="lets layers read each other's keys and values, and the attention of Llama"):
        KVStack([sharer({3: 1})], model=tiny_model())


@pytest.mark.parametrize("stage", [sharer({3: 1}), KVSharer()], ids=repr)
def test_models_that_cache_latents(stage):
    """A layer would expand the other's latents with its own weights."""
    sizes = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": None}
    shape = SHAPE | sizes | {"num_key_value_heads": 4, "first_k_dense_replace": 4}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape)).eval()
    message = r"DeepseekV3ForCausalLM expands what it caches with each layer's own weights\. Leave KVSharer\(.*\) out"
    with pytest.raises(BindError, match=message):
        KVStack([stage], model=model)


def test_two_that_share_have_one_place():
    with pytest.raises(StageError, match="are both of the kind 'share'"):
        KVStack([KVSharer(), KVSharer(0.5)])


def test_layers_of_other_shapes_do_not_share():
    model = tiny_model()
    wide = copy.deepcopy(model.config)
    wide.num_key_value_heads = 4
    model.model.layers[3].self_attn = LlamaAttention(wide, 3).eval()
    with pytest.raises(BindError, match=r"layer 3 cannot read layer 1 .*: they hold 4 heads .* and 2 heads"):
        KVStack([sharer({3: 1})], model=model)
    assert 3 not in search(model, share=0.5, threshold=-1.0).shares
    assert model(tokens(1, 9), past_key_values=stack_of({2: 1})).logits.isfinite().all()


def test_layers_on_other_devices_do_not_share():
    model = tiny_model()
    kinds_of(model)
    model.model.layers[3].self_attn.to("meta")
    with pytest.raises(BindError, match=r"layer 3 cannot read layer 1 .* numbers on meta and 2 heads .* on cpu"):
        KVStack([sharer({3: 1})], model=model)


def test_only_full_attention_layers_share():
    config = Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2
    )
    model = Gemma3ForCausalLM(config).eval()
    with pytest.raises(BindError, match=r"layer 2 should read layer 0, and the full-attention layers .* \[1, 3\]"):
        KVStack([sharer({2: 0})], model=model)
    assert search(model, share=0.5, threshold=-1.0).shares == {3: 1}
    stack = stack_of({3: 1}, [Quant(4, group=8)])
    model.generate(tokens(2, 60), past_key_values=stack, max_new_tokens=10, do_sample=False)
    assert [store.layers for store in stack.batch.cohorts[0].stores] == [[1]]


# ---- its name


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """What installing writes beside the package, made from its pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["kvstack.stages"].items()]
    info = tmp_path / "site" / "kvstack_kvsharer-0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text("\n".join(["[kvstack.stages]", *lines]))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    monkeypatch.syspath_prepend(str(info.parent))


def test_it_is_found_by_its_name(installed):
    stack = KVStack.from_spec("kvsharer:0.25+quant:4")
    assert stack.stages == (KVSharer(0.25), Quant(4))
    check_registered(KVSharer(0.5, threshold=0.8))
    check_registered(KVSharer(strategy="strategy.json"))


def test_it_is_in_the_catalogue(installed):
    from kvstack.cli.commands import app

    assert "kvsharer" in CliRunner().invoke(app, ["stages"]).output


@pytest.mark.parametrize("stage", [KVSharer(threshold=-1.0), KVSharer(0), sharer({3: 1, 2: 0})], ids=repr)
def test_contract(stage):
    check_stage(stage)


def test_docstring_examples():
    assert doctest.testmod(kvstack_kvsharer) == (0, 3)


def test_layers_that_rotate_share_with_their_like():
    """SmolLM3 rotates no key in every fourth layer."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layer_interval=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    kinds = kinds_of(SmolLM3ForCausalLM(config).eval())
    assert kinds[0] == kinds[2]
    assert kinds[1] == kinds[3]
    assert kinds[0] != kinds[1]
