"""Tiny random models of many architectures: no weights, no network.

They cover what differs for a cache: grouped and multi-query heads, norms of queries and keys, soft caps, sinks,
sliding and chunked layers, layers that share keys and values, latent attention, hybrids with linear attention or state
spaces, mixtures of experts, no rotary embedding, ALiBi, rotary tables of every type, positions of several dimensions.

    model = build("qwen3_5", "sdpa")
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VOCABULARY = 256

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
"""What all have, unless their own settings say otherwise."""

WIDE = {"head_dim": 16}
WINDOW = {"sliding_window": 32}
FULL = {"sliding_window": None}
TURNS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 48,
}
GPT = {"n_layer": 4, "n_head": 4, "n_embd": 64, "n_positions": 1024}
MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
DEEPSEEK = MLA | EXPERTS | {"first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
INDEXED = {"q_lora_rank": 16, "index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}
LINEAR = {
    "num_hidden_layers": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Settings of a rotary embedding of the type `kind`."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LONG = rope(
    "longrope",
    short_factor=[1.0] * 8,
    long_factor=[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0],
    original_max_position_embeddings=128,
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # plain attention
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", WIDE),
    "mistral": ("mistral", FULL),
    "ministral3": ("ministral3", WIDE),
    "gemma": ("gemma", WIDE),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", FULL),
    "gpt_neox": ("gpt_neox", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"attention_multiplier": 0.1}),
    "cohere": ("cohere", {}),
    "starcoder2": ("starcoder2", FULL),
    "stablelm": ("stablelm", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "glm": ("glm", WIDE),
    "glm4": ("glm4", WIDE),
    "nemotron": ("nemotron", {}),
    "ernie4_5": ("ernie4_5", WIDE),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", WIDE),
    "seed_oss": ("seed_oss", WIDE),
    "helium": ("helium", WIDE),
    "arcee": ("arcee", {}),
    "jais2": ("jais2", WIDE),
    "bitnet": ("bitnet", {}),
    "apertus": ("apertus", {}),
    "diffllama": ("diffllama", {}),
    "persimmon": ("persimmon", {}),
    "internlm3": ("internlm3", {}),
    "nanochat": ("nanochat", {}),
    "iquestcoder": ("iquestcoder", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "hrm_text": ("hrm_text", {}),
    # rotary tables
    "llama-linear": ("llama", rope("linear", factor=2.0)),
    "llama-dynamic": ("llama", rope("dynamic", factor=2.0) | {"max_position_embeddings": 128}),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-llama3": (
        "llama",
        rope("llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "llama-longrope": ("llama", {"rope_parameters": LONG["rope_parameters"] | {"factor": 4.0}}),
    "phi3-longrope": ("phi3", FULL | LONG | {"original_max_position_embeddings": 128}),
    # sliding and chunked layers
    "qwen2-window": ("qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "mistral-window": ("mistral", WINDOW),
    "gemma2": ("gemma2", WIDE | WINDOW | {"query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", WIDE | TURNS | {"query_pre_attn_scalar": 16}),
    "olmo3": ("olmo3", TURNS),
    "cohere2": ("cohere2", WIDE | TURNS),
    "exaone4": ("exaone4", TURNS | {"sliding_window_pattern": "LG"}),
    "vaultgemma": ("vaultgemma", WIDE | TURNS),
    "modernbert_decoder": ("modernbert-decoder", {"local_attention": 32}),
    "cwm": ("cwm", WIDE | TURNS),
    "ministral": ("ministral", WIDE | WINDOW),
    "granite_swa": ("granite_swa", WINDOW),
    "granitemoe_swa": ("granitemoe_swa", EXPERTS | WINDOW),
    "cohere2_moe": ("cohere2_moe", EXPERTS | WINDOW),
    "afmoe": ("afmoe", WIDE | EXPERTS | WINDOW),
    "exaone_moe": ("exaone_moe", WIDE | EXPERTS | WINDOW),
    "mimo_v2_flash": ("mimo_v2_flash", WIDE | EXPERTS | WINDOW),
    "flint": ("flint", WIDE | EXPERTS | WINDOW),
    "kolibri1": ("kolibri1", WIDE | EXPERTS | WINDOW),
    "gemma4_unified_text": ("gemma4_unified_text", WIDE | WINDOW | {"global_head_dim": 32}),
    "gpt_oss": ("gpt_oss", WIDE | EXPERTS | TURNS),
    "llama4_text": (
        "llama4_text",
        WIDE
        | EXPERTS
        | {
            "attention_chunk_size": 32,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 1, 1, 0],
            "interleave_moe_layer_step": 2,
        },
    ),
    # layers that use the keys and values of others
    "gemma3n_text": (
        "gemma3n_text",
        WIDE
        | WINDOW
        | {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": [96] * 6,
            "activation_sparsity_pattern": [0.0] * 6,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        WIDE
        | WINDOW
        | {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 32,
        },
    ),
    # other positions than rotary ones, or none
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 8}),
    "codegen": ("codegen", GPT | {"rotary_dim": 8}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 4, "num_heads": 4, "window_size": 32, "attention_types": [[["global", "local"], 2]]},
    ),
    "falcon": ("falcon", {"alibi": False, "multi_query": True}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "bloom": ("bloom", {"n_layer": 4, "n_head": 4}),
    "opt": ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 96}),
    "xglm": ("xglm", {"d_model": 64, "num_layers": 4, "attention_heads": 4, "ffn_dim": 96}),
    "biogpt": ("biogpt", {}),
    "mpt": ("mpt", {"n_layers": 4, "n_heads": 4, "d_model": 64, "max_seq_len": 4096}),
    # attention of their own
    "doge": ("doge", {}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v32": ("deepseek_v32", DEEPSEEK | INDEXED),
    "minicpm3": ("minicpm3", MLA | {"q_lora_rank": 16}),
    "mistral4": ("mistral4", DEEPSEEK | {"q_lora_rank": 16}),
    "axk1": ("axk1", DEEPSEEK | {"q_lora_rank": 16}),
    "glm4_moe_lite": ("glm4_moe_lite", DEEPSEEK),
    "youtu": ("youtu", MLA),
    "glm_moe_dsa": ("glm_moe_dsa", DEEPSEEK | INDEXED),
    "axk2": ("axk2", DEEPSEEK | INDEXED),
    "hy_v4": ("hy_v4", DEEPSEEK | INDEXED),
    # mixtures of experts
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3_moe": ("qwen3_moe", WIDE | EXPERTS),
    "mixtral": ("mixtral", EXPERTS | FULL),
    "phimoe": ("phimoe", EXPERTS | FULL),
    "olmoe": ("olmoe", EXPERTS),
    "granitemoe": ("granitemoe", EXPERTS),
    "glm4_moe": ("glm4_moe", WIDE | EXPERTS | {"first_k_dense_replace": 1}),
    "minimax_m2": ("minimax_m2", WIDE | EXPERTS),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        WIDE | EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", WIDE | EXPERTS | {"moe_topk": 2}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 2048,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "hy_v3": ("hy_v3", WIDE | EXPERTS),
    "laguna": ("laguna", WIDE | EXPERTS),
    "flex_olmo": ("flex_olmo", EXPERTS),
    "granitemoeshared": ("granitemoeshared", EXPERTS | {"shared_intermediate_size": 48}),
    "jetmoe": ("jetmoe", WIDE | EXPERTS),
    "dots1": ("dots1", WIDE | EXPERTS),
    "solar_open": ("solar_open", WIDE | EXPERTS),
    "mellum": ("mellum", WIDE | EXPERTS),
    # hybrids with linear attention, state spaces or convolutions
    "qwen3_next": ("qwen3_next", WIDE | EXPERTS | LINEAR),
    "qwen3_5": ("qwen3_5_text", WIDE | LINEAR),
    "qwen3_5_moe": ("qwen3_5_moe_text", WIDE | EXPERTS | LINEAR),
    "olmo_hybrid": ("olmo_hybrid", LINEAR),
    "kimi_linear": (
        "kimi_linear",
        DEEPSEEK
        | {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
    ),
    "minimax": ("minimax", WIDE | EXPERTS | {"layer_types": ["linear_attention", "full_attention"] * 2}),
    "granitemoehybrid": (
        "granitemoehybrid",
        EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 48},
    ),
    "nemotron_h": (
        "nemotron_h",
        WIDE
        | {
            "hybrid_override_pattern": "M*-*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "jamba": (
        "jamba",
        EXPERTS
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("bamba", MAMBA | {"attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", WIDE | MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "lfm2": ("lfm2", CONVOLUTIONS | {"block_multiple_of": 16}),
    "lfm2_moe": ("lfm2_moe", CONVOLUTIONS | EXPERTS | {"num_dense_layers": 1}),
    "lfm3": ("lfm3", {}),
    "zamba": (
        "zamba",
        {
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "n_mamba_heads": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            "mamba_d_state": 16,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "chunk_size": 16,
            "use_mem_rope": True,
            "num_key_value_heads": 4,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "adapter_rank": 8,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"attention_window_size": 32, "block_types": ["recurrent", "attention"], "lru_width": 64},
    ),
}
"""Name, the type of its config, and its own settings over `SHAPE`."""

CLASSES = {"mistral4": "Mistral4ForCausalLM"}
"""Classes of those that `AutoModelForCausalLM` does not know."""


# ---- models that read pictures

PICTURE = 16
"""Tokens of a picture: four by four patches, or patches of patches."""
BEFORE = 2
"""Tokens of a text before its picture."""
IMAGE = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
SEES = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
ROWS_AND_COLUMNS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}

WITH_PICTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        WIDE | TURNS | {"query_pre_attn_scalar": 16},
        SIGLIP,
        {"mm_tokens_per_image": PICTURE, "image_token_index": 250, "boi_token_index": 252, "eoi_token_index": 253},
    ),
    "paligemma": (
        "paligemma",
        WIDE | {"model_type": "gemma"},
        SIGLIP | {"model_type": "siglip_vision_model", "projection_dim": 64},
        {"image_token_id": 250, "projection_dim": 64},
    ),
    "qwen2_vl": (
        "qwen2_vl",
        ROWS_AND_COLUMNS,
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        IMAGE,
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        ROWS_AND_COLUMNS,
        SEES | {"depth": 1, "window_size": 16, "fullatt_block_indexes": [0]},
        IMAGE,
    ),
    "qwen3_vl": (
        "qwen3_vl",
        WIDE | ROWS_AND_COLUMNS,
        SEES | {"depth": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        IMAGE,
    ),
    "glm4v": ("glm4v", ROWS_AND_COLUMNS, SEES | {"depth": 1, "image_size": 32}, IMAGE),
    "mllama": (
        "mllama",
        {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {
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
        },
        {"image_token_index": 250},
    ),
}
"""Name, the type of its config, settings of its language model over `SHAPE`, of what sees, and of the whole."""

NAMES = [*MODELS, *WITH_PICTURES]

EAGER_ALONE = {
    *("gemma2", "vaultgemma", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "flint", "hy_v4"),
    *("gptj", "codegen", "gpt_neo", "gpt_neox_japanese", "bloom", "xglm", "mpt"),
}
"""Those that transformers runs with eager attention alone."""


def attentions(name: str) -> tuple[str, ...]:
    """The attentions that a model has, of those that the matrix asks for."""
    return ("eager",) if name in EAGER_ALONE else ("sdpa", "eager")


def pictures(model: Any, ids: Tensor, mask: Any) -> dict[str, Any]:
    """What a model reads with a prompt: its ids, for models that see with a picture near the beginning of each row."""
    kind, draw = model.config.model_type, torch.Generator().manual_seed(0)
    if kind not in WITH_PICTURES:
        return {"input_ids": ids}
    rows, length = ids.shape
    padded = isinstance(mask, Tensor) and mask.dim() == 2
    starts = mask.argmax(1) if padded else torch.zeros(rows, dtype=torch.long)
    places = torch.arange(length)[None] - starts[:, None] - BEFORE
    seen = (places >= 0) & (places < (1 if kind == "mllama" else PICTURE))
    given: dict[str, Any] = {"input_ids": torch.where(seen, 250, ids)}
    if kind in ("gemma3", "paligemma"):
        given |= {"pixel_values": torch.randn(rows, 3, 28, 28, generator=draw), "token_type_ids": seen.long()}
    elif kind == "mllama":
        one = torch.ones(rows, 1, dtype=torch.long)
        given["pixel_values"] = torch.randn(rows, 1, 1, 3, 28, 28, generator=draw)
        given |= {"aspect_ratio_ids": one, "aspect_ratio_mask": one[:, :, None]}
        given["cross_attention_mask"] = torch.ones(rows, length, 1, 1, dtype=torch.long)
    else:  # two frames of 8 x 8 patches of 4 x 4 points, of which 2 x 2 make one token
        given["pixel_values"] = torch.randn(rows * 64, 3 * 2 * 4 * 4, generator=draw)
        given["image_grid_thw"] = torch.tensor([[1, 8, 8]]).repeat(rows, 1)
        given["mm_token_type_ids"] = seen.int()
    return given


# ---- making them


def config(name: str) -> Any:
    """The config of the tiny model called `name`."""
    if name in WITH_PICTURES:
        kind, text, vision, whole = WITH_PICTURES[name]
        return AutoConfig.for_model(kind, text_config=SHAPE | text, vision_config=vision, **whole)
    kind, own = MODELS[name]
    return AutoConfig.for_model(kind, **(SHAPE | own))


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model called `name`, always with the same weights."""
    torch.manual_seed(0)
    maker: Any = AutoModelForImageTextToText if name in WITH_PICTURES else AutoModelForCausalLM
    maker = getattr(transformers, CLASSES[name])._from_config if name in CLASSES else maker.from_config
    model = maker(config(name), attn_implementation=attention).to(dtype).eval()
    if name in WITH_PICTURES:
        _open_eyes(model)
    # a text ends when the caller says so
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _open_eyes(model: Any) -> None:
    """Let pictures matter as they do in trained models: their tokens differ, and gates for them are open."""
    for name, weight in model.named_parameters():
        if "gate" in name and "cross_attn" in name:
            weight.data.fill_(0.7)
        elif weight.dim() > 1 and any(part in name for part in ("vision", "visual", "projector")):
            weight.data.normal_(0, 0.5)
