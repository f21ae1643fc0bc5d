"""Gradients are those of a dense cache in the forward they come from, or they are refused; never silently less."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvstack import CommonKV, Evict, KVStack, Quant, UseError
from tests import tiny

SETTINGS = {"sinks": 2, "window": 6, "block": 4}
STACKS = [
    [],
    [Quant(4, group=8)],
    [Evict(0.5, "keydiff")],
    [Evict(0.5, "kvzip")],
    [CommonKV(0.5, layers=2, basis="weights"), Quant(4)],
]


@pytest.fixture(autouse=True)
def _gradients(_inference):
    with torch.enable_grad():
        yield


def gradients(model, cache, ids, mask, history=None):
    """Of all weights, for a loss over `ids` behind a history that was read without gradients."""
    model.zero_grad()
    if history is not None:
        with torch.no_grad():
            model(history, past_key_values=cache)
    model(ids, attention_mask=mask, past_key_values=cache, labels=ids).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same(found, expected, close=1e-5):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], atol=close, rtol=close)


@pytest.mark.parametrize("stages", STACKS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_text_in_one_forward(attention, stages):
    model = copy.deepcopy(tiny.model("llama", attention))
    ids = tiny.tokens(2, 40)
    expected = gradients(model, DynamicCache(), ids, None)
    assert_same(gradients(model, KVStack(stages, **SETTINGS), ids, None), expected)


@pytest.mark.parametrize("stages", STACKS, ids=str)
def test_a_padded_batch(stages):
    model = copy.deepcopy(tiny.model())
    ids, mask = tiny.left_padded([40, 25])
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)

    def of(cache):
        model.zero_grad()
        places = (mask.cumsum(1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, labels=labels).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    # the first label of the padded row is told by padding, which sees nothing
    labels[1, :16] = -100
    assert_same(of(KVStack(stages, **SETTINGS)), of(DynamicCache()), 1e-4)


def test_behind_a_history_without_gradients():
    model = copy.deepcopy(tiny.model())
    history, ids = tiny.tokens(1, 30), tiny.tokens(1, 12, seed=1)
    expected = gradients(model, DynamicCache(), ids, None, history)
    assert_same(gradients(model, KVStack(**SETTINGS), ids, None, history), expected)


def test_behind_an_evicted_history_they_are_those_of_what_is_held():
    """Perturb a weight: the loss moves as the gradient says."""
    model = copy.deepcopy(tiny.model("llama", dtype=torch.float64))
    history, ids = tiny.tokens(1, 40), tiny.tokens(1, 12, seed=1)
    stack = KVStack([Evict(0.5, "keydiff"), Quant(8, group=8)], **SETTINGS)
    weight = model.model.layers[3].self_attn.k_proj.weight  # the last layer: nothing before it changes

    def loss():
        stack.reset()
        with torch.no_grad():
            weight.sub_(moved * step)
            model(history, past_key_values=stack)
            weight.add_(moved * step)
        return model(ids, past_key_values=stack).logits.logsumexp(-1).sum()

    step, moved = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double(), 0.0
    model.zero_grad()
    loss().backward()
    slope = float((weight.grad * step).sum())
    losses = []
    for moved in (1e-2, -1e-2):  # norms are in float32 in any model
        with torch.no_grad():
            weight.add_(step, alpha=moved)
            losses.append(float(loss()))
            weight.sub_(step, alpha=moved)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("stages", [[], [Quant(4, group=8)], [Evict(0.5, "keydiff")]], ids=str)
def test_through_earlier_forwards_they_are_refused(stages):
    model = copy.deepcopy(tiny.model())
    stack = KVStack(stages, **SETTINGS)
    model(tiny.tokens(1, 40), past_key_values=stack)
    loss = model(tiny.tokens(1, 5), past_key_values=stack, labels=tiny.tokens(1, 5)).loss
    with pytest.raises(UseError, match="keeps no gradients of earlier forwards"):
        loss.backward()


def test_from_packed_codes_they_are_refused():
    model = copy.deepcopy(tiny.model())
    ids = tiny.tokens(1, 40)
    for fused in (True, False):
        stack = KVStack([Quant(4, group=8)], fused=fused, **SETTINGS)
        with torch.no_grad():
            model(ids, past_key_values=stack)
        loss = model(tiny.tokens(1, 1), past_key_values=stack).logits.sum()
        if not fused:
            loss.backward()
            continue
        with pytest.raises(UseError, match=r"answered a single query from packed codes.*Use fused=False"):
            loss.backward()


@pytest.mark.parametrize("stages", STACKS, ids=str)
def test_autocast_in_one_forward_and_not_in_the_next(stages):
    model = copy.deepcopy(tiny.model())
    ids = tiny.tokens(1, 60)
    logits = []
    for cache in (DynamicCache(), KVStack(stages, **SETTINGS)):
        with torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:40], past_key_values=cache)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(ids[:, 40:41], past_key_values=cache)
            logits.append(model(ids[:, 41:42], past_key_values=cache).logits)
    assert logits[0].dtype == logits[1].dtype
    assert logits[1].isfinite().all()
    if not stages:
        assert torch.equal(*logits)


def test_a_prompt_of_an_earlier_forward_is_refused_though_new_tokens_need_none():
    """Prompt tuning of a frozen model, read in two forwards."""
    model = copy.deepcopy(tiny.model()).requires_grad_(False)
    prompt = torch.randn(1, 20, 64, requires_grad=True)
    stack = KVStack([Quant(4, group=8)], **SETTINGS)
    model(inputs_embeds=prompt, past_key_values=stack)
    logits = model(tiny.tokens(1, 6), past_key_values=stack).logits
    with pytest.raises(UseError, match="keeps no gradients of earlier forwards"):
        logits.sum().backward()


@pytest.mark.parametrize("trained", ["v_proj", "k_proj"])
def test_packed_codes_beside_a_new_token_that_needs_gradients(trained):
    model = copy.deepcopy(tiny.model("llama", "eager")).requires_grad_(False)
    getattr(model.model.layers[3].self_attn, trained).requires_grad_(True)
    stack = KVStack([Quant(4, group=8)], **SETTINGS)
    with torch.no_grad():
        model(tiny.tokens(1, 40), past_key_values=stack)
    out = model(tiny.tokens(1, 1), past_key_values=stack, output_attentions=True)
    for part in (out.logits, out.attentions[3]):
        with pytest.raises(UseError, match="from packed codes"):
            part.square().sum().backward()


@pytest.mark.parametrize("stages", [[], [Quant(4, group=8)]], ids=str)
@pytest.mark.parametrize("layer", [0, 3])
def test_queries_alone_need_gradients(layer, stages):
    """Adapters on queries: keys are scratch memory, or a buffer that grows, and the backward pass needs them."""
    model = copy.deepcopy(tiny.model("llama", num_key_value_heads=4)).requires_grad_(False)
    weight = model.model.layers[layer].self_attn.q_proj.weight.requires_grad_(True)

    def gradient(cache):
        weight.grad = None
        with torch.no_grad():
            model(tiny.tokens(1, 40), past_key_values=cache)
        losses = [model(tiny.tokens(1, 4, seed=i), past_key_values=cache).logits.square().sum() for i in range(2)]
        sum(losses).backward()
        return weight.grad

    expected, cache = gradient(DynamicCache()), KVStack(stages, fused=False, **SETTINGS)
    if layer == 0:  # keys of the layers behind it depend on its queries
        with pytest.raises(UseError, match="keeps no gradients of earlier forwards"):
            gradient(cache)
        return
    found = gradient(cache)
    assert found.isfinite().all()
    if stages == []:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_padded_prompt_read_in_inference_mode():
    model = copy.deepcopy(tiny.model())
    ids, mask = tiny.left_padded([40, 30])
    stack = KVStack([Quant(4, group=8)], **SETTINGS)
    with torch.inference_mode():
        model(ids, attention_mask=mask, past_key_values=stack)
        stack.reorder_cache(torch.tensor([1, 0]))
    mask = torch.cat([mask.flip(0), mask.new_ones(2, 5)], dim=1)
    places = (mask.cumsum(1) - 1)[:, -5:]
    out = model(tiny.tokens(2, 5), attention_mask=mask, position_ids=places, past_key_values=stack)
    out.logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


def test_what_is_held_does_not_lose_its_gradient_silently():
    model = copy.deepcopy(tiny.model())
    stack = KVStack([], **SETTINGS)
    model(tiny.tokens(1, 10), past_key_values=stack)
    with pytest.raises(UseError, match="keeps no gradients of the forwards that filled it"):
        stack.layers[0].keys.sum().backward()
