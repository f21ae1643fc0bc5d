"""Tiny random models of several architectures, seeded: no weights, no network."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

VOCABULARY = 97

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # random models are nearly indifferent to their input with the default 0.02
    "initializer_range": 0.2,
}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "stablelm": (StableLmConfig, StableLmForCausalLM, {}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {}),
    "opt": (OPTConfig, OPTForCausalLM, {}),
    # keys of 24 channels, the last 8 of them rotated, and values of 16
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 4,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    # three of four layers hold a state instead of keys and values
    "qwen3_next": (
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        {
            "head_dim": 16,
            "num_hidden_layers": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}

# deepseek_v3 attends to something else than it caches, so scores that look at queries refuse it
ARCHITECTURES = sorted(MODELS.keys() - {"deepseek_v3", "qwen3_next"})

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 7},
    "prompt_lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
"""Ways to generate."""


@functools.cache
def model(name: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of the architecture `name`; the same one for the same arguments."""
    config_type, model_type, own = MODELS[name]
    torch.manual_seed(0)
    made = model_type(config_type(**(SHAPE | own | changes))).to(dtype).eval()
    made.set_attn_implementation(attention)
    return made


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length), none of them the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of rows of these lengths, padded on the left."""
    longest = max(lengths)
    ids = tokens(len(lengths), longest, seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


@functools.cache
def with_large(kind: str, dtype: torch.dtype = torch.float16, most: float = 3.5e4) -> Any:
    """A model that caches numbers near `most` in two of its layers, as the attention of some real models does; `kind`
    is `keys` or `values`. A dense cache gives finite logits."""
    from transformers import DynamicCache

    made = copy.deepcopy(model("llama"))
    for _ in range(2):  # the second layer's input depends on the first one
        cache = DynamicCache()
        made(tokens(1, 150), past_key_values=cache)
        largest = max(float(getattr(layer, kind).abs().max()) for layer in cache.layers[1:3])
        for layer in made.model.layers[1:3]:
            getattr(layer.self_attn, f"{kind[0]}_proj").weight.data.mul_(most / largest)
            if kind == "values":
                layer.self_attn.o_proj.weight.data.div_(most / largest)
    return made.to(dtype)


def positions_by_head(stack: Any, layer: int, row: int = 0) -> list[list[int]]:
    """Positions of the tokens that each kv head of a layer holds for a row."""
    heads = range(stack.batch.shape_of(layer, "keys")[0][1])
    return [stack.positions(layer, row, head)[0].tolist() for head in heads]


def mask_for(stack: Any, new: int) -> torch.Tensor | None:
    """The attention mask (B, all tokens) for `new` tokens behind what a stack has seen: padding that it left out stays
    hidden. None where there is none."""
    mask = torch.ones(max(1, stack.batch_size), stack.seen + new, dtype=torch.long)
    for cohort in stack.batch.cohorts:
        rows = range(len(mask)) if cohort.rows is None else cohort.rows.tolist()
        for row in rows:
            mask[row, : stack.seen] = 0
            mask[row, cohort.columns.of(cohort.seen, mask.device)] = 1
    return None if bool(mask.all()) else mask
