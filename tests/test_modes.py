"""Every mode of `generate` with stacks that compress, and the ways models differ."""

import copy

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from kvstack import CommonKV, Evict, KVStack, Quant, UseError
from tests import tiny
from tests.stages import Pairs

STACKS = {
    "quant": [Quant(4, group=8)],
    "evict": [Evict(0.4)],
    "refit": [Evict(0.4, refit=True), Quant(8, group=8)],
    "budgets": [Evict(0.4, budgets="heads"), Quant(8, group=8)],
    "kvzip": [Evict(0.4, "kvzip"), Quant(8, group=8)],
    "places": [Evict(0.4, positions="cache"), Quant(8, group=8)],
    "both": [Evict(24, "h2o"), Quant(3, group=8)],
    "three": [Pairs(), Evict(0.5), Quant(8, group=8)],
    "commonkv": [CommonKV(0.5, layers=2), Evict(0.5), Quant(2)],
}
SETTINGS = {"sinks": 2, "window": 8, "block": 8}


def small(name):
    return KVStack(STACKS[name], **SETTINGS)


@pytest.mark.parametrize("mode", tiny.MODES)
@pytest.mark.parametrize("stack", STACKS)
def test_runs_and_compresses(stack, mode):
    model = tiny.model("llama")
    cache = small(stack)
    ids = tiny.tokens(1, 30).repeat(1, 3)
    model.generate(ids, past_key_values=cache, max_new_tokens=20, **tiny.MODES[mode])
    assert cache.seen >= 90 + 15
    if mode != "prompt_lookup":  # what the last forward brought is compressed when it has been verified
        assert cache.compression > (0.2 if stack != "three" else 0.1)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_architectures(name):
    model = tiny.model(name)
    cache = small("both")
    model.generate(tiny.tokens(2, 90), past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert cache.held <= 24 + 10
    assert cache.seen == 109


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_assisted_decoding_compresses_only_what_is_verified(attention):
    """A draft model that is often wrong: the stack must hold the text that was accepted, in order."""
    model, draft = tiny.model("llama", attention), tiny.model("llama", attention, num_hidden_layers=1)
    cache = small("evict")
    ids = tiny.tokens(1, 60)
    out = model.generate(ids, past_key_values=cache, assistant_model=draft, max_new_tokens=30, do_sample=False)
    assert cache.seen <= out.shape[1]
    for layer in range(4):
        assert int(cache.positions(layer).max()) == cache.seen - 1
    # what the first forward saw was exact, so its verified tokens are those of the dense cache
    dense = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(out[:, :61], dense[:, :61])


def test_two_turns():
    """Full ids, or new ids with a mask of the full length: the same tokens."""
    model = tiny.model("llama")
    first, second = tiny.tokens(1, 70), tiny.tokens(1, 20, seed=1)
    found = []
    for full in (True, False):
        cache = small("both")
        answer = model.generate(first, past_key_values=cache, max_new_tokens=8, do_sample=False)
        text = torch.cat([answer, second], dim=1)
        ids = text if full else text[:, cache.seen :]
        mask = torch.ones_like(text)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
        found.append(out[:, -8:])
        assert cache.held <= 24 + 10
        assert cache.seen == 70 + 8 + 20 + 7
    assert torch.equal(*found)


def test_reset_begins_anew():
    model = tiny.model("llama")
    cache = small("both")
    expected = model.generate(tiny.tokens(1, 70), past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert cache.nbytes > 0
    cache.reset()
    assert (cache.seen, cache.held, cache.nbytes) == (0, 0, 0)
    again = model.generate(tiny.tokens(1, 70), past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(again, expected)


def test_a_stack_of_another_batch_after_reset():
    model = tiny.model("llama")
    cache = small("both")
    for rows in (1, 3):
        cache.reset()
        model(tiny.tokens(rows, 50), past_key_values=cache)
        assert cache.batch_size == rows


def test_one_prompt_many_continuations():
    """A prompt is read once, then its rows are repeated."""
    model = tiny.model("llama")
    cache = small("quant")
    model(tiny.tokens(1, 60), past_key_values=cache)
    alone = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    new = tiny.tokens(3, 1, seed=2)
    found = model(new, past_key_values=cache).logits
    torch.testing.assert_close(found[:1], model(new[:1], past_key_values=alone).logits, atol=1e-4, rtol=1e-4)


def test_attention_weights_can_be_asked_for():
    model = tiny.model("llama", "eager")
    cache = small("quant")
    model(tiny.tokens(1, 60), past_key_values=cache)
    out = model(tiny.tokens(1, 1), past_key_values=cache, output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(1, 4, 1, 61)] * 4


def test_inference_mode_and_back():
    model = tiny.model("llama")
    cache = small("both")
    with torch.inference_mode():
        model(tiny.tokens(1, 60), past_key_values=cache)
    model(tiny.tokens(1, 1), past_key_values=cache)
    with torch.enable_grad():
        logits = model(tiny.tokens(1, 1), past_key_values=cache).logits
    assert logits.requires_grad
    assert not any(x.requires_grad for *_, x in cache.parts())


def deepseek():
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
    shape |= {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
    shape |= {"first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**shape)).eval()


def test_a_model_that_caches_latents():
    """DeepSeek's attention rebuilds its keys from what it caches: codes cannot be read directly, but decoded."""
    model = deepseek()
    ids = tiny.tokens(1, 80)
    dense = model(ids).logits[:, -1]
    cache = KVStack([Quant(8, group=8), Evict(1.0, "keydiff")], **SETTINGS)
    model(ids[:, :-1], past_key_values=cache)
    found = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert cache.compression > 0.29
    assert float((found - dense).norm() / dense.norm()) < 0.05
    # scores look at the keys that are made of the latents
    cache = KVStack([Evict(0.5)], **SETTINGS)
    model(ids, past_key_values=cache)
    assert cache.held < 60
    assert model(tiny.tokens(1, 1), past_key_values=cache).logits.isfinite().all()


def test_a_model_without_the_interface():
    """GPT-J calls its own attention: scores without queries, and everything else, work all the same."""
    from transformers import GPTJConfig, GPTJForCausalLM

    shape = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 256}
    model = GPTJForCausalLM(GPTJConfig(**shape)).eval()
    ids = tiny.tokens(1, 80)
    dense = model(ids).logits[:, -1]
    cache = KVStack([Quant(8, group=8)], **SETTINGS)
    model(ids[:, :-1], past_key_values=cache)
    found = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert float((found - dense).norm() / dense.norm()) < 0.02
    ids, mask = tiny.left_padded([40, 20])
    options = {"attention_mask": mask, "max_new_tokens": 20, "output_logits": True, "return_dict_in_generate": True}
    options |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dense = torch.stack(model.generate(ids, past_key_values=DynamicCache(), **options).logits)
    cache = KVStack([Quant(8, group=8)], **SETTINGS)
    found = torch.stack(model.generate(ids, past_key_values=cache, **options).logits)
    assert float((found - dense).norm() / dense.norm()) < 0.02


def test_a_stack_without_a_model_may_share_tokens_between_layers():
    """Layers come one by one, and are handled together from the first forward on."""
    draw = torch.Generator().manual_seed(0)
    stack = KVStack([Evict(0.5, "keydiff", layers=2)], sinks=2, window=4)
    for _ in range(3):
        for layer in range(3):
            keys, values = (torch.randn(1, 2, 40, 16, generator=draw) for _ in range(2))
            stack.update(keys, values, layer)
    stack.get_mask_sizes(1, 0)
    assert [store.layers for store in stack.batch.stores] == [[0, 1], [2]]
    assert stack.held <= 0.5 * (120 - 6) + 6
    assert torch.equal(stack.positions(0), stack.positions(1))


def test_fused_can_be_switched():
    model = tiny.model()
    stack = KVStack([Quant(4)], model=model)
    model(tiny.tokens(1, 200), past_key_values=stack)
    logits = []
    for fused in (True, False):
        stack.fused = fused
        assert stack.attention_listener.fused is fused
        logits.append(model(tiny.tokens(1, 1), past_key_values=stack).logits)
        stack.crop(-1)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def test_what_a_caller_gave_is_its_own():
    stack, keys = KVStack([]), torch.ones(1, 2, 3, 4)
    stack.update(keys, keys, 0)
    keys.zero_()
    assert stack.read(0).keys.sum() == 24


@pytest.mark.parametrize("stages", [[], [Quant(4)]], ids=repr)
@pytest.mark.parametrize("bound", [True, False])
def test_gradient_checkpointing(stages, bound):
    """transformers leaves the cache out: the next forward would know nothing of the text."""
    model = copy.deepcopy(tiny.model("llama"))
    model.train()
    model.model.layers[1].gradient_checkpointing = True  # transformers can turn it on for some layers
    off = getattr(type(model), "activation_checkpointing_disable", type(model).gradient_checkpointing_disable)
    stack = KVStack(stages, model=model if bound else None)
    with pytest.raises(UseError, match=r"Call model.eval\(\) or model.(activation|gradient)_checkpointing_disable\(\)"):
        model(tiny.tokens(1, 20), past_key_values=stack)
    for mend in (model.eval, lambda: off(model.train())):
        mend()
        stack.reset()
        model(tiny.tokens(1, 20), past_key_values=stack)
        assert stack.seen == 20
