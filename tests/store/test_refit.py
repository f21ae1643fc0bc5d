"""Refitting: what stays stands in for what was dropped, and whoever computes attention gives the same answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvstack import KV, BindError, Evict, KVStack, Quant, SnapKV, UseError
from kvstack.store.refit import STEP, refitted
from tests import tiny
from tests.matrix.architectures import attentions, build

SMALL = {"sinks": 2, "window": 8, "block": 8}


# ---- the arithmetic


def example(draw, tokens=30, queries=12, rows=2, heads=2, groups=3, width=8):
    kv = KV(*(torch.randn(rows, heads, tokens, width, generator=draw) for _ in range(2)))
    return kv, torch.randn(rows, heads * groups, queries, width, generator=draw)


def sums(kv, queries, values, bias, tokens, every):
    """Mass and answer (B, H*G, Q, 1 + D) that `tokens` give to queries, of the attention to `every` token."""
    groups = queries.shape[1] // kv.keys.shape[1]
    keys, values, bias = (x.repeat_interleave(groups, 1) for x in (kv.keys, values, bias))
    logits = queries @ keys.mT
    whole = logits.logsumexp(-1, keepdim=True)
    weights = (logits + bias.unsqueeze(2) - whole).exp()
    mine = weights.gather(-1, tokens.repeat_interleave(groups, 1).unsqueeze(2).expand(-1, -1, queries.shape[2], -1))
    chosen = values.gather(2, tokens.repeat_interleave(groups, 1)[..., None].expand(-1, -1, -1, values.shape[-1]))
    return torch.cat([mine.sum(-1, keepdim=True), mine @ chosen], dim=-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 25), st.integers(0, 25), st.integers(1, 40))
def test_what_stays_says_more_of_the_whole(seed, n, raw, queries):
    """Of the queries asked, answers are nearer to those of all tokens than without other values and biases."""
    draw, middle = torch.Generator().manual_seed(seed), slice(2, 27)
    raw = min(raw, n)
    kv, asked = example(draw, queries=queries)
    stay = torch.rand(2, 2, 25, generator=draw).topk(n).indices.sort().values
    fit = refitted(kv, None, asked, stay, raw, middle, 1.0)
    assert fit.bias.shape == (2, 2, n)
    assert fit.values.shape == (2, 2, raw, 8)

    tokens, none = stay + 2, torch.zeros(2, 2, 30)
    bias = none.scatter(2, tokens, fit.bias.float() * STEP)
    values = kv.values.clone()
    if raw:
        at = tokens[..., n - raw :, None].expand(-1, -1, -1, 8)
        values.scatter_(2, at, fit.values)
    whole = sums(kv, asked, kv.values, none, torch.arange(2, 27).expand(2, 2, -1), None)
    biased = sums(kv, asked, kv.values, bias, tokens, None)
    found = sums(kv, asked, values, bias, tokens, None)
    plain = sums(kv, asked, kv.values, none, tokens, None)

    def error(x, which):
        return (x - whole)[..., which].square().sum((1, 2, 3))

    mass, answer = slice(0, 1), slice(1, None)
    assert bool((error(biased, mass) <= error(plain, mass) * 1.05 + 1e-6).all())
    assert bool((error(found, answer) <= error(biased, answer) * 1.001 + 1e-9).all())


def test_a_token_stands_in_for_its_copies():
    """Three copies of every token, one of which stays: it gets the bias log 3, and keeps its value."""
    draw = torch.Generator().manual_seed(0)
    kv, asked = example(draw, tokens=10, queries=40)
    triple = KV(kv.keys.repeat(1, 1, 3, 1), kv.values.repeat(1, 1, 3, 1))
    fit = refitted(triple, None, asked, torch.arange(10)[None, None], 10, slice(0, 30), 1.0)
    assert bool(((fit.bias.float() * STEP).exp() / 3 - 1).abs().mean() < 0.05)
    torch.testing.assert_close(fit.values, kv.values, atol=0.15, rtol=0)


def test_nothing_dropped_changes_nothing():
    kv, asked = example(torch.Generator().manual_seed(0))
    fit = refitted(kv, None, asked, torch.arange(20)[None, None], 20, slice(4, 24), 1.0)
    assert not fit.bias.any()
    torch.testing.assert_close(fit.values, kv.values[:, :, 4:24])


def test_what_stood_in_before_counts():
    """The bias that a token has already is part of the text that the others must stand in for."""
    draw = torch.Generator().manual_seed(0)
    kv, asked = example(draw, tokens=10, queries=40)
    bias = torch.zeros(2, 2, 10)
    bias[:, :, 3] = 2.0
    again = refitted(kv, bias, asked, torch.arange(10)[None, None], 10, slice(0, 10), 1.0)
    assert again.bias[:, :, 3].unique().tolist() == [2.0 / STEP]
    torch.testing.assert_close(again.values, kv.values)


# ---- in a stack


def filled(model, stack, length=90, rows=1):
    model(tiny.tokens(rows, length), past_key_values=stack)
    return stack


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("share", [False, True])
def test_attention_is_that_of_a_dense_cache_with_these_values_and_biases(attention, new, share):
    model = tiny.model("llama", attention)
    stack = KVStack([Evict(0.3, SnapKV(), layers=1, share_heads=share, refit=True)], model=model, **SMALL)
    seen, ids = 90, tiny.tokens(1, new, seed=9)
    dense = DynamicCache()
    model(tiny.tokens(1, seen), past_key_values=dense)
    filled(model, stack)
    heads, groups = model.config.num_key_value_heads, 1
    groups = model.config.num_attention_heads // heads
    masks = []
    for i, layer in enumerate(dense.layers):
        held, bias = stack.read(i), stack.batch.cohorts[0].stores[i].bias(0)
        places = stack.positions(i).long().expand(heads, -1)
        layer.values.scatter_(2, places[None, ..., None].expand_as(held.values), held.values)
        mask = torch.full((heads, seen), torch.finfo(torch.float32).min).scatter(1, places, bias[0])
        behind = torch.full((new, new), torch.finfo(torch.float32).min).triu(1)
        wide = mask.repeat_interleave(groups, 0)[None, :, None].expand(-1, -1, new, -1)
        masks.append(torch.cat([wide, behind.expand(1, heads * groups, -1, -1)], dim=-1))
    assert any(bool(stack.batch.cohorts[0].stores[i].bias(0).any()) for i in range(len(masks)))

    def replace(layer):
        return lambda module, args, kwargs: (args, kwargs | {"attention_mask": masks[layer]})

    modules = [layer.self_attn for layer in model.model.layers]
    handles = [m.register_forward_pre_hook(replace(i), with_kwargs=True) for i, m in enumerate(modules)]
    expected = model(ids, past_key_values=dense).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(ids, past_key_values=stack).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_packed_codes_are_read_with_biases(name):
    """Answered from packed codes or from decoded tokens: the same."""
    model, answers = tiny.model(name), []
    for fused in (True, False):
        stack = KVStack([Quant(8, group=8), Evict(0.4, refit=True)], model=model, fused=fused, **SMALL)
        filled(model, stack, rows=2)
        answers.append([model(tiny.tokens(2, 1, seed=i), past_key_values=stack).logits for i in range(7)])
    torch.testing.assert_close(*answers, atol=1e-3, rtol=1e-3)


def test_a_crop_leaves_no_trace_of_what_was_taken_back():
    model = tiny.model("llama")
    plain = filled(model, KVStack([Evict(0.4, refit=True)], model=model, **SMALL))
    cropped = KVStack([Evict(0.4, refit=True)], model=model, **SMALL)
    cropped.activate_past_recording()
    model(torch.cat([tiny.tokens(1, 90), tiny.tokens(1, 7, seed=3)], 1), past_key_values=cropped)
    cropped.crop(-7)
    for layer in range(4):
        assert torch.equal(plain.positions(layer), cropped.positions(layer))
        torch.testing.assert_close(plain.read(layer).values, cropped.read(layer).values)


def test_with_every_token_there_none_has_a_bias():
    model = tiny.model("llama")
    stack = filled(model, KVStack([Evict(0.4, "streaming", refit=True)], model=model, **SMALL))
    assert all(store.bias(0) is not None for store in stack.batch.stores)
    stack.crop(-(stack.seen - 2))  # only the sinks are left
    assert all(store.bias(0) is None for store in stack.batch.stores)


def test_biases_are_counted():
    model = tiny.model("llama")
    stack = filled(model, KVStack([Evict(0.4, refit=True)], model=model, **SMALL))
    (part,) = [part for part in stack.report().parts if part.part == "biases"]
    heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    assert part.nbytes == heads * layers * (stack.held - 2 - 8)
    assert not [part for part in stack.report().parts if part.part == "reference queries"]


def test_latent_attention_is_refused():
    with pytest.raises(BindError, match="caches latents"):
        KVStack([Evict(0.4, refit=True)], model=tiny.model("deepseek_v3"))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_attention_that_is_more_than_a_softmax_is_refused(name):
    with pytest.raises(BindError, match="more than a softmax"):
        KVStack([Evict(0.4, refit=True)], model=build(name, attentions(name)[0]))


@pytest.mark.parametrize("name", ["diffllama", "jetmoe"])
def test_attention_that_makes_other_keys_is_refused(name):
    model = build(name, attentions(name)[0])
    with pytest.raises(UseError, match="refit=False"):
        filled(model, KVStack([Evict(0.4, refit=True)], model=model, **SMALL))


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "mimo_v2_flash", "afmoe"])
def test_goes_on_alike_token_by_token_and_all_at_once(name):
    model = tiny.model(name) if name in tiny.ARCHITECTURES else build(name, attentions(name)[0])
    ids, answers = tiny.tokens(1, 6, seed=5), []
    for size in (1, 2, 6):
        stack = filled(model, KVStack([Evict(0.4, refit=True)], model=model, **SMALL))
        answers.append(torch.cat([model(x, past_key_values=stack).logits for x in ids.split(size, dim=1)], dim=1))
    torch.testing.assert_close(answers[0], answers[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(answers[0], answers[2], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("score", ["h2o", "knorm", "snapkv"])
def test_a_crop_beyond_the_running_forward_waits_for_queries(score):
    """No query of the text is known then: what is over the budget goes with the next forward."""
    model = tiny.model("llama")
    stack = KVStack([Evict(0.3, score, refit=True)], model=model, **SMALL)
    stack.activate_past_recording()
    filled(model, stack, 150)
    stack.crop(-2)
    filled(model, stack, 10)
    stack.crop(-70)
    assert bool(torch.isfinite(filled(model, stack, 10).read(0).values).all())


def test_values_too_large_for_a_half_are_its_largest_ones(monkeypatch):
    """Attention takes no values of another type than its queries."""

    def far(*args):
        fit = refitted(*args)
        return fit._replace(values=fit.values.sign() * 7e4)

    monkeypatch.setattr("kvstack.store.store.refitted", far)
    model = tiny.with_large("values", torch.float16)
    stack = KVStack([Evict(0.2, "knorm", refit=True)], model=model, **SMALL)
    filled(model, stack, 150)
    for layer in stack.compressed_layers:
        values = stack.read(layer).values
        assert values.dtype == torch.float16
        assert float(values.abs().max()) == torch.finfo(torch.float16).max
    assert model(tiny.tokens(1, 3), past_key_values=stack).logits.dtype == torch.float16


@pytest.mark.parametrize(
    "change", [lambda steps: None, lambda steps: steps.repeat(1, 1, 3), lambda steps: steps[:, :, 1:]]
)
def test_biases_of_a_file_are_those_of_its_tokens(change, tmp_path):
    model = tiny.model("llama")
    stack = filled(model, KVStack([Evict(0.4, refit=True)], model=model, **SMALL))
    for store in stack.batch.stores:
        for bias in store.biases:
            bias.steps = change(bias.steps)
    stack.save(tmp_path / "cache")
    with pytest.raises(UseError, match="biases"):
        KVStack.load(tmp_path / "cache", model=model)


@pytest.mark.parametrize("width", [256, 248])
def test_heads_that_flash_attention_cannot_widen_are_refused(monkeypatch, width):
    """Before anything is evicted: a bias is eight channels more, and flash attention takes 256."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    def attention(module, query, key, value, mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "slow_flash_2", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "slow_flash_2", flash_attention_mask)
    model = tiny.model("llama", num_hidden_layers=1, head_dim=width)
    model.config._attn_implementation = "slow_flash_2"
    stack = KVStack([Evict(0.4, "knorm", refit=True)], model=model, **SMALL)
    if width == 248:
        assert filled(model, stack).held < 150
    else:
        with pytest.raises(UseError, match=r"heads of 256 channels.*refit=False"):
            filled(model, stack)


def test_a_file_in_which_nothing_was_dropped_has_no_biases(tmp_path):
    model = tiny.model("llama")
    stack = filled(model, KVStack([Evict(0.4, "streaming", refit=True)], model=model, **SMALL), 8)
    stack.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model)
    filled(model, again)
    again.crop(-(again.seen - 2))  # every token that was seen is there again
    again.save(tmp_path / "cache")
    assert KVStack.load(tmp_path / "cache", model=model).held == 2
