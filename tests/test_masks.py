"""The model's mask holds in every case: random masks beside a dense cache whose mask is made by plain loops."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvstack import Evict, KVStack, Quant, UseError
from tests import tiny

SETTINGS = {"sinks": 2, "window": 6, "block": 4}
STACKS = {
    "nothing": [],
    "evict": [Evict(0.5, "keydiff", layers=1)],
    "evict by budgets": [Evict(0.5, "keydiff", budgets="heads")],
    "evict by queries": [Evict(0.4, layers=2)],
    "evict a count": [Evict(9, "knorm", layers=1)],
}


def held_in(stack, layer, row, before, new):
    """By kv head, which columns a row can look at: what the stack holds of earlier forwards, and what comes now."""
    if not stack.seen:
        return [set(range(new))] * 2
    columns = {}
    for cohort in stack.batch.cohorts:
        for r in range(stack.batch_size) if cohort.rows is None else cohort.rows.tolist():
            columns[r] = cohort.columns.of(cohort.seen, torch.device("cpu")).tolist()
    held = [{columns[row][p] for p in head} for head in tiny.positions_by_head(stack, layer, row)]
    return [head | set(range(before, before + new)) for head in held]


def masks_by_loops(allowed, stack, layers, before):
    """(B, query heads, q, T) for every layer: what `allowed` (B, q, T) says, for the tokens that are held."""
    rows, new, tokens = allowed.shape
    allowed, masks = allowed.tolist(), []
    for layer in range(layers):
        mask = []
        for row in range(rows):
            held = held_in(stack, layer, row, before, new)
            mask.append([])
            for head in range(4):
                mask[row].append([])
                for query in range(new):
                    seen = [allowed[row][query][column] and column in held[head // 2] for column in range(tokens)]
                    mask[row][head].append(seen)
        masks.append(torch.tensor(mask))
    return masks


def dense_under(model, cache, ids, masks, positions):
    """Logits of a dense cache, every layer behind its own mask."""

    def hook(layer):
        return lambda module, args, kwargs: (args, kwargs | {"attention_mask": as_wanted(model, masks[layer])})

    handles = [
        layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        return model(ids, past_key_values=cache, position_ids=positions).logits
    finally:
        for handle in handles:
            handle.remove()


def as_wanted(model, mask):
    if model.config._attn_implementation == "sdpa":
        return mask
    # transformers' softmax is in float32, where the least float64 is minus infinity, and padding would become NaN
    return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(torch.float32).min)


@st.composite
def conversations(draw):
    """Rows, then for each turn: tokens, and which of them are padding in each row."""
    rows = draw(st.integers(1, 3))
    turns = draw(st.lists(st.integers(1, 14), min_size=2, max_size=4))
    return {
        "rows": rows,
        "turns": [20, *turns],
        "seed": draw(st.integers(0, 999)),
        "padded": draw(st.booleans()),
        "documents": draw(st.booleans()),
        "holes": draw(st.sampled_from([0.0, 0.3])),
    }


def allowed_in(case, draw, turn, real, documents):
    """(B, q, T) what each query of a turn may see: earlier real tokens of its document, some cached ones hidden."""
    before, new = sum(case["turns"][:turn]), case["turns"][turn]
    rows, tokens = case["rows"], before + new
    hidden = (torch.rand(rows, tokens, generator=draw) < case["holes"]).tolist()
    real, documents, allowed = real.tolist(), documents.tolist(), []
    for row in range(rows):
        allowed.append([])
        for query in range(new):
            seen = [False] * tokens
            for column in range(before + query + 1):
                same = documents[row][column] == documents[row][before + query]
                hole = hidden[row][column] and column < before
                seen[column] = real[row][column] and same and not hole
            allowed[row].append(seen)
    return torch.tensor(allowed)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=8)
@given(case=conversations())
def test_any_mask_holds(attention, name, case):
    model = tiny.model("llama", attention, torch.float64)
    draw = torch.Generator().manual_seed(case["seed"])
    rows, total = case["rows"], sum(case["turns"])
    ids = torch.randint(3, 97, (rows, total), generator=draw)
    real = torch.rand(rows, total, generator=draw) < (0.7 if case["padded"] else 1.1)
    real[:, 19] = True  # a text of padding alone has no logits
    documents = (torch.arange(total) // 11 % 2).expand(rows, -1) if case["documents"] else torch.zeros(rows, total)
    stack, dense = KVStack(STACKS[name], **SETTINGS), DynamicCache()
    for turn, new in enumerate(case["turns"]):
        before = sum(case["turns"][:turn])
        now, places = ids[:, before : before + new], torch.arange(before, before + new)[None].expand(rows, -1)
        allowed = allowed_in(case, draw, turn, real, documents)
        expected = dense_under(model, dense, now, masks_by_loops(allowed, stack, 4, before), places)
        mask = as_wanted(model, allowed[:, None])
        found = model(now, attention_mask=mask, past_key_values=stack, position_ids=places).logits
        kept = real[:, before : before + new]
        close = 1e-8 if attention == "sdpa" else 1e-5  # transformers' eager softmax is in float32
        torch.testing.assert_close(found[kept], expected[kept], atol=close, rtol=close)


@settings(max_examples=5)
@given(case=conversations())
def test_packed_codes_are_read_behind_the_same_mask(case):
    """One query at a time, from codes and from decoded tensors. Nothing is sealed meanwhile: rounding could move a
    number to another code."""
    model = tiny.model("llama", dtype=torch.float64)
    draw = torch.Generator().manual_seed(case["seed"])
    rows, ids = case["rows"], tiny.tokens(case["rows"], 60)
    logits = []
    masks = [torch.rand(rows, 1, 1, 40 + i + 1, generator=draw) < 0.7 for i in range(20)]
    for fused in (True, False):
        stack = KVStack([Quant(4, group=8), Evict(0.7, "keydiff", layers=1)], fused=fused, sinks=2, window=6, block=64)
        model(ids[:, :40], past_key_values=stack)
        found = []
        for i, mask in enumerate(masks):
            mask[..., -1] = True
            found.append(model(ids[:, 40 + i : 41 + i], attention_mask=mask, past_key_values=stack).logits)
        logits.append(torch.cat(found, 1))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_a_bias_in_the_mask_is_added():
    """An additive mask may do more than hide."""
    model = tiny.model("llama", "eager", torch.float64)
    ids, places = tiny.tokens(2, 60), torch.arange(60)
    bias = -0.1 * (places[:, None] - places[None]).abs().double()
    bias = bias.masked_fill(places[None] > places[:, None], torch.finfo(torch.float64).min)[None, None]
    expected = model(ids, attention_mask=bias).logits[:, 40:]
    for fused in (True, False):
        stack, found = KVStack([Quant(8, group=8)], fused=fused, **SETTINGS), []
        model(ids[:, :40], attention_mask=bias[..., :40, :40], past_key_values=stack)
        for i in range(40, 60):
            mask = bias[..., i : i + 1, : i + 1]
            found.append(model(ids[:, i : i + 1], attention_mask=mask, past_key_values=stack).logits)
        assert float((torch.cat(found, 1) - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("stack", [[Quant(8, group=8)], [Evict(0.5, "keydiff")]])
def test_padding_that_is_seen_later_is_refused(stack):
    """Padding is left out, so nobody can look at it any more."""
    model = tiny.model()
    ids, mask = tiny.left_padded([30, 20])
    cache = KVStack(stack, **SETTINGS)
    model(ids, attention_mask=mask, past_key_values=cache)
    for later in (None, torch.ones(2, 31, dtype=torch.long)):
        with pytest.raises(UseError, match="left out tokens that were padding when they came"):
            model(tiny.tokens(2, 1), attention_mask=later, past_key_values=cache)
        cache.reset()
        model(ids, attention_mask=mask, past_key_values=cache)


def test_a_mask_that_is_too_short_is_refused():
    model = tiny.model()
    cache = KVStack([Evict(0.5, "keydiff")], **SETTINGS)
    model(tiny.tokens(1, 40), past_key_values=cache)
    mask = torch.ones(1, 1, 2, 12, dtype=torch.bool).tril(10)
    with pytest.raises(UseError, match="the attention mask is for 12 tokens, and the model has seen 42"):
        model(tiny.tokens(1, 2), attention_mask=mask, past_key_values=cache)
    model(tiny.tokens(1, 2), past_key_values=cache)  # nothing was stored
    assert cache.seen == 42


@pytest.mark.parametrize("stages", [[Evict(1.0, "keydiff")], [Quant(8, group=8)]])
def test_a_token_that_none_sees_gets_its_answer(stages):
    """It is not held, as if it were padding, but its own query may see others."""
    model = tiny.model("llama", dtype=torch.float64)
    ids = tiny.tokens(1, 40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril(-1)
    mask[0, 0] = True
    expected = model(ids, attention_mask=mask[None, None]).logits
    found = model(ids, attention_mask=mask[None, None], past_key_values=KVStack(stages, **SETTINGS)).logits
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


def test_holes_under_flash_attention(monkeypatch):
    """Its masks are of two dimensions. The function here is a slow one that reads them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    def attention(module, query, key, value, mask, **kwargs):
        new, held = query.shape[2], key.shape[2]
        seen = torch.ones(new, held, dtype=torch.bool).tril(held - new)[None, None]
        seen = seen if mask is None else seen & mask[:, None, None, -held:].bool()
        return sdpa_attention_forward(module, query, key, value, seen, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "slow_flash_2", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "slow_flash_2", flash_attention_mask)
    model = copy.deepcopy(tiny.model("llama"))
    model.config._attn_implementation = "slow_flash_2"
    ids, mask = tiny.tokens(2, 60), torch.ones(2, 51, dtype=torch.long)
    mask[:, 20:25] = 0
    logits = []
    for fused in (True, False):
        cache = KVStack([Quant(8, group=8), Evict(0.8, "keydiff", share_heads=True)], fused=fused, **SETTINGS)
        model(ids[:, :50], past_key_values=cache)
        logits.append(model(ids[:, 50:51], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_layers_with_a_mask_each_leave_none_behind():
    model = tiny.model()
    ids, mask = tiny.left_padded([40, 20])
    cache, kept = KVStack([Quant(8, group=8)], model=model, **SETTINGS), []

    def each(module, args, kwargs):
        kept.append(len(cache.attention_listener._sight._parts))
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].clone()}

    handles = [layer.register_forward_pre_hook(each, with_kwargs=True) for layer in model.model.layers]
    model(ids, attention_mask=mask, past_key_values=cache)
    for handle in handles:
        handle.remove()
    assert max(kept) <= 2


@pytest.mark.parametrize("stages", [[], [Quant(4, group=8)], [Evict(0.5, "keydiff", layers=1)]])
def test_attention_weights_are_as_wide_as_a_dense_cache_has_them(stages):
    model = tiny.model("llama", "eager")
    ids, mask = tiny.left_padded([50, 30])
    cache = KVStack(stages, **SETTINGS)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    mask = torch.cat([mask, mask.new_ones(2, 3)], dim=1)
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -3:], "output_attentions": True}
    out = model(tiny.tokens(2, 3), past_key_values=cache, **options)
    for layer, weights in enumerate(out.attentions):
        assert weights.shape == (2, 4, 3, 53)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3))
        assert not weights[1, :, :, :20].any()
        if stages == []:
            continue
        held = held_in(cache, layer, 0, 53, 0)[0]
        assert set(weights[0, 0, -1].nonzero().flatten().tolist()) <= held | set(range(53))
