"""Eviction equals a dense cache whose evicted tokens are masked; every layer and head by its own mask."""

import pytest
import torch
from transformers import DynamicCache

from kvstack import Evict, KVStack, SnapKV
from tests import tiny

SCORES = [
    *("snapkv", "h2o", "tova", "keydiff", "knorm", "kvzap", "kvzip", "expected", "lookahead", "streaming", "random"),
    "triattention",
]


def masked_by_layer(model, visible):
    """Hooks that give every attention layer its own mask (1, query heads, 1, T)."""

    def hook(layer):
        def replace(module, args, kwargs):
            return args, kwargs | {"attention_mask": visible[layer]}

        return replace

    modules = [layer.self_attn for layer in model.model.layers]
    return [module.register_forward_pre_hook(hook(i), with_kwargs=True) for i, module in enumerate(modules)]


def visible_tokens(model, stack, seen):
    """For every layer, which of the `seen` tokens and one new one a query head may look at."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    masks = []
    for layer in range(model.config.num_hidden_layers):
        held = stack.positions(layer).long().expand(model.config.num_key_value_heads, -1)
        mask = torch.zeros(held.shape[0], seen + 1, dtype=torch.bool)
        mask.scatter_(1, held, True)
        mask[:, seen] = True
        masks.append(mask.repeat_interleave(groups, 0)[None, :, None])
    return masks


def next_logits(model, stack, ids, token):
    """One step after a prompt: through the stack, and through a masked dense cache."""
    seen = ids.shape[1]
    dense = DynamicCache()
    model(ids, past_key_values=dense)
    model(ids, past_key_values=stack)
    handles = masked_by_layer(model, visible_tokens(model, stack, seen))
    try:
        expected = model(token, past_key_values=dense).logits
    finally:
        for handle in handles:
            handle.remove()
    return expected, model(token, past_key_values=stack).logits


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_eviction_is_a_mask(name, score, layers):
    model = tiny.model(name)
    stack = KVStack([Evict(0.3, score, layers=layers)], sinks=3, window=10)
    expected, found = next_logits(model, stack, tiny.tokens(1, 100), tiny.tokens(1, 1, seed=9))
    assert stack.held < 60
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_heads_choose_for_themselves_where_nothing_shares():
    model = tiny.model("llama")
    stack = KVStack([Evict(0.3, SnapKV(), layers=1)], sinks=3, window=10)
    model(tiny.tokens(1, 100), past_key_values=stack)
    one, other = stack.positions(0)
    assert not torch.equal(one, other)


def test_layers_of_a_group_share_one_set():
    model = tiny.model("llama")
    stack = KVStack([Evict(0.3, SnapKV(), layers=2)], sinks=3, window=10)
    model(tiny.tokens(1, 100), past_key_values=stack)
    sets = [stack.positions(layer) for layer in range(4)]
    assert [len(s) for s in sets] == [1, 1, 1, 1]
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0], sets[2])


def test_snapkv_by_hand():
    """One head, one query: its softmax weights, nothing else."""
    from kvstack import KV, Context

    keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]])[None, None]
    query = torch.tensor([[1.0, 1.0]])[None, None]
    context = Context(layer=0, seen=4, positions=torch.arange(4)[None, None], queries=query, scaling=1.0)
    score = SnapKV(window=1, kernel=1, over="mean").score(KV(keys, keys), context)
    expected = torch.tensor([1.0, 2.0, 3.0, 0.0]).softmax(0)
    torch.testing.assert_close(score[0, 0], expected)


def test_h2o_by_hand():
    """The running sum equals the column sums of the whole attention matrix, over several forwards."""
    model = tiny.model("llama", "eager")
    ids = tiny.tokens(1, 40)
    stack = KVStack([Evict(1.0, "h2o", layers=1)], sinks=0, window=4)
    for chunk in ids.split([30, 1, 1, 8], dim=1):
        model(chunk, past_key_values=stack)
    weights = model(ids, output_attentions=True).attentions[2]  # (1, query heads, 40, 40)
    expected = weights.unflatten(1, (2, 2)).mean(2).sum(2)
    memory = stack.batch.cohorts[0].stores[2].memory[0].tensors["mass"]
    torch.testing.assert_close(memory, expected, atol=1e-5, rtol=1e-4)
