"""Layers of every kind that transformers caches: compressed, or cached exactly as DynamicCache does it."""

import copy
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, MllamaConfig, MllamaForConditionalGeneration
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from kvstack import BindError, Evict, KVStack, KVStackWarning, Quant, Score, UseError
from kvstack.select.attention import attention_received
from tests import tiny

MAMBA = {"mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_n_heads": 4, "mamba_d_head": 16}
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 4,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HALF = ["linear_attention", "full_attention"] * 2

KINDS = {
    # name: (model type, settings, layers that are compressed, words of the warning)
    "hybrid": ("falcon_h1", MAMBA | {"head_dim": 16, "mamba_d_ssm": 64}, [0, 1, 2, 3], None),
    "shared attention": (
        "zamba2",
        {
            "num_key_value_heads": 4,
            "mamba_d_state": 16,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "chunk_size": 16,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "adapter_rank": 8,
        },
        [],
        r"layers 0, 2 \(they hold a state of fixed size\); layers 1, 3 \(no attention module is theirs alone\)",
    ),
    "indexed": (
        "deepseek_v32",
        LATENT | EXPERTS | {"index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
        [],
        r"layers 0, 1, 2, 3 \(an indexer with keys of its own chooses their tokens\)",
    ),
    "conv": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16}, [1, 3], None),
    "linear": ("qwen3_5_text", LINEAR | {"head_dim": 16, "layer_types": HALF}, [1, 3], None),
    "sliding": ("mistral", {"sliding_window": 16}, [], r"layers 0, 1, 2, 3 \(they hold a window of the text\)"),
    "no index": (
        "gpt_neo",
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 16},
        [0, 1, 2, 3],
        None,
    ),
    "own state": (
        "recurrent_gemma",
        {"num_key_value_heads": 1, "attention_window_size": 16, "lru_width": 64},
        [],
        r"layers 0, 1, 3 \(they hold a state of fixed size\); layers 2 \(they hold a window of the text\)",
    ),
    "cycles": ("hrm_text", {"H_cycles": 1, "L_cycles": 1}, [], "no attention module is theirs alone"),
    "reused": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": tiny.VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
        [1],
        None,
    ),
}

SETTINGS = {"sinks": 2, "window": 8, "block": 8}


def built(kind):
    """A model of its own: some hold a state in their modules."""
    model_type, own, *_ = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(tiny.SHAPE | own))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def stack_of(stages, **settings):
    """A stack, and its warnings are not looked at."""
    stack = KVStack(stages, **settings)
    warnings.simplefilter("ignore", KVStackWarning)
    return stack


@pytest.fixture(autouse=True)
def _filters():
    with warnings.catch_warnings():
        yield


def lengths(cache):
    """What every layer says of its tokens, or that it counts none."""
    found = []
    for layer in range(len(cache.layers)):
        try:
            found.append(int(cache.get_seq_length(layer)))
        except ValueError:
            found.append(None)
    return found


def conversation(model, cache):
    """Logits of a prompt, a step, a chunk, and a step with the rows swapped; and the lengths of all layers."""
    ids = tiny.tokens(2, 60)
    found = [model(part, past_key_values=cache).logits[:, -1] for part in ids.split([48, 1, 5, 5, 1], dim=1)]
    cache.reorder_cache(torch.tensor([1, 0]))
    return torch.stack([*found, model(ids[:, :1], past_key_values=cache).logits[:, -1]]), lengths(cache)


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_stack_is_a_dynamic_cache(kind):
    model = built(kind)
    dense, found = (
        conversation(copy.deepcopy(model), cache) for cache in (DynamicCache(config=model.config), KVStack())
    )
    assert torch.equal(found[0], dense[0])
    assert found[1] == dense[1]


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt_lookup", "chunked_prefill"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_stack_generates_as_a_dynamic_cache(kind, mode):
    model, found = built(kind), []
    ids = tiny.tokens(1, 15).repeat(1, 2)
    for cache in (DynamicCache(config=model.config), KVStack()):
        try:
            made = copy.deepcopy(model).generate(ids, past_key_values=cache, max_new_tokens=6, **tiny.MODES[mode])
        except (ValueError, RuntimeError, AttributeError) as error:  # some models cannot be used like that
            made = type(error)
        found.append(made)
    assert found[0] == found[1] if isinstance(found[0], type) else torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_are_compressed(kind):
    *_, compressed, warning = KINDS[kind]
    if warning is None:
        stack = KVStack([Quant(8, group=8)], model=built(kind))
    else:
        with pytest.warns(KVStackWarning, match=r"nothing to compress in \w+ and works as .* own cache: .*" + warning):
            stack = KVStack([Quant(8, group=8)], model=built(kind))
    assert stack.compressed_layers == compressed


@pytest.mark.parametrize("kind", [kind for kind, (*_, compressed, _) in KINDS.items() if compressed])
def test_compressed_is_close(kind):
    model = built(kind)
    dense, _ = conversation(copy.deepcopy(model), DynamicCache(config=model.config))
    # other layers of Gemma 4 read what `update` returned
    stack = KVStack([Quant(8, group=8)], fused=kind != "reused", **SETTINGS)
    found, _ = conversation(model, stack)
    assert float((found - dense).norm() / dense.norm()) < 0.05
    assert stack.compression > 0
    assert stack.seen == 61


@pytest.mark.parametrize("stage", [Quant(2, group=8), Evict(0.3)], ids=repr)
@pytest.mark.parametrize("kind", [kind for kind, (*_, compressed, _) in KINDS.items() if not compressed])
def test_with_nothing_to_compress_a_stack_is_a_dynamic_cache(kind, stage):
    model = built(kind)
    dense = conversation(copy.deepcopy(model), DynamicCache(config=model.config))
    stack = stack_of([stage], **SETTINGS)
    found = conversation(model, stack)
    assert torch.equal(found[0], dense[0])
    assert found[1] == dense[1]
    assert stack.seen == 61
    assert stack.nbytes == stack.dense_nbytes


@pytest.mark.parametrize("kind", ["hybrid", "conv", "linear", "shared attention", "indexed", "sliding"])
def test_rows_copies_and_files(kind, tmp_path):
    """Rows of layers that hold a state go with those of the others, which transformers' own cache cannot do for all."""
    model, ids = built(kind), tiny.tokens(2, 60)
    stack = stack_of([Quant(8, group=8)], **SETTINGS)
    model(ids[:, :50], past_key_values=stack)
    model(ids[:, 50:51], past_key_values=stack)
    stack.save(tmp_path / "cache")
    one, two = copy.deepcopy(stack), copy.deepcopy(stack)
    other = KVStack.load(tmp_path / "cache", model=model)
    one.batch_select_indices(torch.tensor([1]))
    two.batch_repeat_interleave(2)
    expected = model(ids[:, 51:52], past_key_values=stack).logits
    torch.testing.assert_close(model(ids[:, 51:52], past_key_values=other).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids[1:, 51:52], past_key_values=one).logits, expected[1:], atol=1e-4, rtol=1e-4)
    repeated = model(ids[:, 51:52].repeat_interleave(2, 0), past_key_values=two).logits
    torch.testing.assert_close(repeated, expected.repeat_interleave(2, 0), atol=1e-4, rtol=1e-4)
    stack.reset()
    assert stack.seen == 0


# ---- cross-attention


def mllama():
    text = tiny.SHAPE | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    torch.manual_seed(0)
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=96)
    model = MllamaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "cross_attn" in name and "gate" in name:
            parameter.data.fill_(0.7)  # trained models have these gates open
    return model


@pytest.mark.parametrize("stages", [[], [Quant(8, group=8)]], ids=repr)
def test_cross_attention_layers_are_left_alone(stages):
    model, one = mllama(), torch.ones(1, 1, 1, dtype=torch.long)
    ids = tiny.tokens(1, 60).clamp_max(90)
    ids[0, 1] = 96
    inputs = {
        "attention_mask": torch.ones_like(ids),
        "pixel_values": tiny.numbers(1, 1, 1, 1, 3, 28, 28),
        "aspect_ratio_ids": one[0],
        "aspect_ratio_mask": one,
        "cross_attention_mask": torch.ones(1, 60, 1, 1, dtype=torch.long),
    }
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stack = KVStack(stages, **SETTINGS)
    dense, found = (
        torch.stack(model.generate(ids, past_key_values=cache, **inputs, **settings).logits)
        for cache in (DynamicCache(config=model.config), stack)
    )
    torch.testing.assert_close(found, dense, atol=0.05 if stages else 0, rtol=0.05 if stages else 0)
    assert stack.compressed_layers == [0, 2, 3]
    assert stack.seen == stack.get_seq_length() == 65
    assert isinstance(stack.layers[1], DYNAMIC_LAYER_TYPE_MAPPING["full_attention"])


# ---- eviction


class Seen(Score):
    """Remembers what a score is given."""

    queries = -1

    def __init__(self):
        self.given = {}

    def score(self, kv, context):
        self.given[context.layer] = attention_received(context.queries, kv.keys, context.scaling, "sum")
        return self.given[context.layer].mean(2)


@pytest.mark.parametrize("layers", [1, 2])
def test_scores_of_latent_attention_are_those_of_its_keys(layers):
    """What is held are latents, and queries are compared with the keys that are made of them."""
    model, score = tiny.model("deepseek_v3", "eager"), Seen()
    ids = tiny.tokens(2, 60)
    attended = model(ids, output_attentions=True).attentions
    stack = KVStack([Evict(0.5, score, layers=layers)], **SETTINGS)
    model(ids, past_key_values=stack)
    assert stack.held < 60
    for layer, weights in enumerate(attended):  # (B, heads, queries, T)
        torch.testing.assert_close(score.given[layer][:, :, 0], weights.sum(2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("score", ["snapkv", "h2o", "tova", "expected"])
def test_every_score_works_on_latent_attention(score):
    model = tiny.model("deepseek_v3")
    ids = tiny.tokens(2, 90)
    dense = model(ids).logits[:, -1]
    for keep in (1.0, 0.5):
        stack = KVStack([Evict(keep, score), Quant(8, group=8)], **SETTINGS)
        for part in ids.split([70, 1, 1, 17, 1], dim=1):
            found = model(part, past_key_values=stack).logits[:, -1]
        assert bool(found.isfinite().all())
        assert keep < 1 or float((found - dense).norm() / dense.norm()) < 0.05
        assert (stack.held < 60) is (keep < 1)


ALIBI = {
    "mpt": {"n_layers": 2, "n_heads": 4, "d_model": 64, "max_seq_len": 1024},
    "falcon": {"num_hidden_layers": 2, "alibi": True, "multi_query": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_layer": 2, "n_head": 4, "n_embd": 64, "rotary_dim": 8},
}


@pytest.mark.parametrize("name", ALIBI)
def test_attention_outside_of_the_interface(name):
    """Every token must be held, since masks and biases are made for all of them."""
    config = AutoConfig.for_model(name, **(tiny.SHAPE | ALIBI[name]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    dense, found = (
        [model(part, past_key_values=cache).logits for part in tiny.tokens(2, 70).split([60, 1, 9], dim=1)]
        for cache in (DynamicCache(config=model.config), KVStack([Quant(8, group=8)], **SETTINGS))
    )
    for one, other in zip(found, dense, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05
    for score in ("keydiff", "snapkv"):
        with pytest.raises(
            BindError, match=r"does not go through transformers' interface.*stages that keep all tokens"
        ):
            KVStack([Evict(0.5, score)], model=model)


def test_a_decoder_with_cross_attention_is_refused():
    config = AutoConfig.for_model("gpt2", **(tiny.SHAPE | {"add_cross_attention": True}))
    with pytest.raises(BindError, match="made with add_cross_attention=True"):
        KVStack(model=AutoModelForCausalLM.from_config(config))


def test_more_layer_types_than_layers():
    model = copy.deepcopy(tiny.model("gemma3"))
    model.config.layer_types = [*model.config.layer_types, "full_attention"]
    with pytest.raises(BindError, match=r"has 4 layers .*layer_types for 5.*config.layer_types\[:4\]"):
        KVStack([Quant(8)], model=model)


def test_several_masks_at_once():
    """Zaya tells its attention two masks: nobody knows which of them tells padding."""
    config = AutoConfig.for_model(
        "zaya",
        **(tiny.SHAPE | {"head_dim": 16, "layer_types": ["hybrid"] * 4, "num_experts": 4, "mlp_hidden_size": 32}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UseError, match=r"several masks at once \(causal, conv\).*Use KVStack\(\[\]\)"):
        model(tiny.tokens(2, 20), past_key_values=KVStack([Quant(8)]))
    found = model(tiny.tokens(2, 20), past_key_values=KVStack([])).logits
    assert torch.equal(found, model(tiny.tokens(2, 20), past_key_values=DynamicCache(config=config)).logits)
