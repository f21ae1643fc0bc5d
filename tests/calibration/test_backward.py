"""Calibration takes gradients with regard to the cache: they are right, or it says that there are none."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvstack import CalibrationError, CommonKV, KVStack, Quant, calibrate
from kvstack.calibration import calibrate as calibrating
from kvstack.calibration import windows
from kvstack.model.layers import LayerGroups
from kvstack.model.probing import at_rest
from kvstack.testing import tiny_model
from tests import tiny

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "num_local_experts": 4,
    "shared_expert_intermediate_size": 48,
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
MIXED = ["conv", "full_attention"] * 2
MODELS = {
    "qwen3_5_text": LINEAR | {"head_dim": 16},
    "qwen3_next": LINEAR | EXPERTS | {"head_dim": 16},
    "jamba": EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_d_state": 8, "mamba_dt_rank": 4},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA
    | EXPERTS
    | {"layer_types": ["mamba", "attention", "mamba", "attention"], "shared_intermediate_size": 48},
    "nemotron_h": {
        "head_dim": 16,
        "hybrid_override_pattern": "M*-*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "lfm2": {"layer_types": MIXED, "block_multiple_of": 16},
    "mixtral": EXPERTS | {"sliding_window": None},
    "gpt_oss": EXPERTS | {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", MIXED[1]] * 2},
    "falcon": {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
}
"""Hybrids whose states are overwritten in place, mixtures of experts, sinks, ALiBi."""


def built(kind, dtype=torch.float32):
    torch.manual_seed(0)
    settings = tiny.SHAPE | {"vocab_size": 97} | MODELS[kind]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).to(dtype).eval()


def likelihood(model, ids, prompt, drawn, changes):
    """Of `drawn` behind the prompt, where `changes` (layer -> keys, values) are added to the cache."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt], past_key_values=cache)
    for layer, (keys, values) in changes.items():
        cache.layers[layer].keys += keys
        cache.layers[layer].values += values
    logits = model(ids[:, prompt:], past_key_values=cache).logits[0].double().log_softmax(-1)
    return float(logits.gather(-1, drawn).sum()), logits


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_differences(kind):
    """Along the steepest direction of each layer's cache."""
    model, ids, prompt = built(kind), tiny.tokens(1, 60), 40
    full = LayerGroups(model, 1).full
    with at_rest(model):
        cache, gradients = calibrating.read_window(model, ids, prompt, full, seed=0)
        _, logits = likelihood(model, ids, prompt, torch.zeros(20, 1, dtype=torch.long), {})
        drawn = windows.draw(model, logits.float(), torch.Generator().manual_seed(0))
        for layer in full:
            kv, gradient = cache[layer], gradients[layer]
            # small, or another expert may be asked
            steps = [1e-4 * x / x.norm() for x in (gradient.keys, gradient.values)]
            up, down = (
                likelihood(model, ids, prompt, drawn, {layer: [sign * step for step in steps]})[0] for sign in (1, -1)
            )
            expected = float((gradient.keys * steps[0]).sum() + (gradient.values * steps[1]).sum())
            assert kv.keys.shape == gradient.keys.shape
            assert (up - down) / 2 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_hybrids_calibrate_themselves(kind):
    model = built(kind)
    stack = KVStack([CommonKV(0.5), Quant(4)], sinks=2, window=8)
    model(tiny.tokens(1, 100), past_key_values=stack)
    assert stack.compressed_layers == LayerGroups(model, 1).full
    assert torch.isfinite(model(tiny.tokens(1, 1), past_key_values=stack).logits).all()


# ---- kernels without a backward


class Packed(nn.Module):
    """Stands for a layer whose kernel has no backward, such as 4-bit products on some processors."""

    def __init__(self, linear, bend=False):
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().clone())
        self.bend = bend

    @torch.no_grad()
    def forward(self, x):
        y = x @ self.codes.T
        return y.relu() if self.bend else y


def pack(model, **settings):
    for layer in model.model.layers:
        for inside in (layer.self_attn, layer.mlp):
            for name, child in list(inside.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(inside, name, Packed(child, **settings))
    return model


def test_weights_are_found_out_where_a_kernel_has_no_backward():
    dense, packed = tiny_model(), pack(tiny_model())
    ids, full = tiny.tokens(1, 60), [0, 1, 2, 3]
    with at_rest(dense), at_rest(packed):
        (_, expected), (_, found) = (calibrating.read_window(m, ids, 40, full, seed=0) for m in (dense, packed))
    for layer in full:
        torch.testing.assert_close(found[layer].keys, expected[layer].keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[layer].values, expected[layer].values, rtol=1e-3, atol=1e-4)
    assert not any(module._forward_hooks for module in packed.modules())


def test_a_function_that_is_not_linear_is_refused():
    with pytest.raises(CalibrationError, match=r"and model\.layers\.3\.[a-z_.]+ passes none on\. Use CommonKV\(basis="):
        calibrate(pack(tiny_model(), bend=True))


class Silent(nn.Module):
    """Attention's last projection, cut off from gradients without being a leaf."""

    def __init__(self, linear):
        super().__init__()
        self.inside = nn.Sequential(nn.Identity(), linear)

    def forward(self, x):
        return self.inside(x.detach())


@pytest.mark.parametrize("layers", [1, 4])
def test_gradients_that_are_cut_off(layers):
    model = tiny_model()
    for layer in model.model.layers[-layers:]:
        layer.self_attn.o_proj = Silent(layer.self_attn.o_proj)
    with pytest.raises(CalibrationError, match=r"takes gradients, and none (reach|pass through)"):
        calibrate(model)


def test_gradients_that_are_zero():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(CalibrationError, match="those of this LlamaForCausalLM are all zero"):
        KVStack([CommonKV()], model=model)


def test_weights_that_are_not_finite():
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match=r"in torch\.float32 predicts NaN"):
        calibrate(model)


def test_small_types_have_other_factors(monkeypatch):
    """Gradients beyond float16 are taken again with a smaller factor, and weigh as much."""
    model = tiny_model().half()
    ids = tiny.tokens(1, 60)

    def gradients(*factors):
        monkeypatch.setattr("kvstack.calibration.backward.SCALES", factors)
        with at_rest(model):
            return calibrating.read_window(model, ids, 40, [0, 1, 2, 3], seed=0)[1]

    expected, found = gradients(1.0), gradients(1e7, 1.0)
    assert all(torch.equal(expected[i].keys, found[i].keys) for i in range(4))
    with pytest.raises(CalibrationError, match=r"are not finite in torch\.float16\. Load it in bfloat16"):
        gradients(1e7)


# ---- the model stays as it was


def test_parts_in_other_modes_and_tables_that_depend_on_the_length():
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny_model(rope_parameters=rope)
    ids = tiny.tokens(1, 70)
    expected = model(ids).logits
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    state = lambda: [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]  # noqa: E731
    before = state()
    calibrate(model)
    assert state() == before
    assert torch.equal(model.eval()(ids).logits, expected)


# ---- text of its own


def test_the_user_is_told_once_that_a_model_reads_its_own_text(caplog):
    model = tiny_model()
    with caplog.at_level(logging.WARNING, "kvstack"):
        calibrate(model, tokens=400)
        calibrate(model, tokens=400)
    (record,) = caplog.records
    assert (
        "tokenizer of this LlamaForCausalLM is not known, so it is calibrated on text that it writes" in record.message
    )
    assert "kvstack.calibrate(model, tokenizer=tokenizer)" in record.message


def test_one_warning_says_all(caplog):
    with caplog.at_level(logging.WARNING, "kvstack"):
        KVStack([CommonKV()], model=tiny_model(intermediate_size=88))
    (record,) = caplog.records
    assert "CommonKV calibrates itself" in record.message
    assert "Pass calibration=kvstack.calibrate(model, tokenizer=tokenizer)" in record.message


def test_a_tokenizer_is_looked_for_in_the_gguf_file(monkeypatch, tmp_path):
    """Where a folder has one such file, and no other tokenizer."""
    import transformers

    asked = []

    def from_pretrained(where, **given):
        asked.append(given)
        if "gguf_file" not in given:
            raise OSError("no tokenizer")
        return "the tokenizer"

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    model = tiny_model()
    model.name_or_path = str(tmp_path)
    assert windows.tokenizer_of(model) is None
    (tmp_path / "model.Q4.gguf").touch()
    assert windows.tokenizer_of(model) == "the tokenizer"
    assert asked[-1] == {"gguf_file": "model.Q4.gguf"}
    (tmp_path / "other.gguf").touch()
    assert windows.tokenizer_of(model) is None


# ---- weights kept elsewhere


def test_a_model_whose_weights_are_offloaded_calibrates():
    """Its parameters lie on the meta device between calls, and its input does not."""
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(tiny_model())
    accelerate.cpu_offload(model, execution_device="cpu")
    made = calibrate(model, tokens=400)
    assert all(torch.isfinite(group.axes.full()).all() for group in made.groups)
