"""CommonKV in a stack: one latent for a group, held once, and read in two ways that agree."""

import pytest
import torch
from transformers import DynamicCache

from kvstack import BindError, CommonKV, Evict, KVStack, Quant, StageError, UseError
from kvstack.packed import storage_bytes
from kvstack.types import KV
from tests import tiny

SETTINGS = {"sinks": 2, "window": 8, "block": 8}


def filled(stages, model=None, tokens=120, rows=1, **settings):
    model = model or tiny.model("llama")
    stack = KVStack(stages, model=model, **(SETTINGS | settings))
    model(tiny.tokens(rows, tokens), past_key_values=stack)
    return stack


def error(stack, model=None, tokens=120):
    """Squared error of all keys and values against a dense cache of the same text."""
    model = model or tiny.model("llama")
    dense = DynamicCache()
    model(tiny.tokens(1, tokens), past_key_values=dense)
    found = 0.0
    for i in stack.compressed_layers:
        kv = stack.read(i)
        found += float((kv.keys - dense.layers[i].keys).square().sum())
        found += float((kv.values - dense.layers[i].values).square().sum())
    return found


# ---- exactness


ALL = ["llama", "qwen3", "phi3", "gpt_neox", "gemma3", "stablelm", "smollm3", "opt", "deepseek_v3"]


@pytest.mark.parametrize("name", ALL)
def test_full_rank_loses_nothing(name):
    model = tiny.model(name)
    assert error(filled([CommonKV(1.0)], model), model) < 1e-5 * 120


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt_neox", "stablelm", "opt"])
def test_weights_of_one_layer_lose_nothing(name):
    """The paper's form at full rank without merging: latents of hidden states give keys and values exactly."""
    model = tiny.model(name)
    stages = [CommonKV(1.0, layers=1, basis="weights", merge="mean")]
    assert error(filled(stages, model), model) < 1e-5 * 120


def test_the_line_of_the_readme():
    """Nothing is called before it, and the stack binds and calibrates itself."""
    model = tiny.model("llama")
    stack = KVStack([CommonKV(), Quant(2), Evict(0.2)])
    out = model.generate(tiny.tokens(1, 200), past_key_values=stack, max_new_tokens=40, do_sample=False)
    assert out.shape == (1, 240)
    assert stack.held <= 68 + 0.2 * (239 - 68)
    assert {part.part for part in stack.report().parts} >= {"latent: codes", "latent: gains", "positions"}


# ---- what is held


def test_a_group_is_held_once():
    """Two layers of a group read from one tensor: the latents of all four layers are held in two."""
    stack = filled([CommonKV(0.5, layers=2)])
    stores = stack.batch.cohorts[0].stores
    assert len(stores) == 2
    for store in stores:
        assert list(store.packed) == [(0, "latent")]
        tensors = [part for packed in store.packed.values() for part in packed.parts.values()]
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors) == 1
    numbers = sum(x.numel() for store in stores for p in store.packed.values() for x in p.parts.values())
    assert numbers <= 0.5 * 110 * 4 * 64, "half the numbers of 110 sealed tokens"


def test_bytes_with_an_encoder_are_the_budget():
    stack = filled([CommonKV(0.5, layers=2), Quant(4)], tokens=2 + 8 + 400)
    sealed = [p for store in stack.batch.cohorts[0].stores for p in store.packed.values()]
    nbytes = storage_bytes([x for p in sealed for x in p.parts.values()])
    assert 0.97 < nbytes / (400 * 4 * 64 * 0.5 * 4 / 8) <= 1.0


def test_error_falls_with_keep():
    errors = [error(filled([CommonKV(keep)])) for keep in (0.1, 0.3, 0.6, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]


def test_error_falls_with_the_bits():
    errors = [error(filled([CommonKV(0.5), Quant(bits)])) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("encode", [[], [Quant(4)], [Quant(4, codec="nf4")]], ids=repr)
def test_block_size_does_not_change_the_result(encode):
    """Sealed all at once, or in blocks while decoding."""
    ids = tiny.tokens(1, 90)
    found = []
    for block in (8, 32, 80):
        model = tiny.model("llama")
        stack = KVStack([CommonKV(0.4), *encode], model=model, sinks=2, window=8, block=block)
        for piece in ids.split([20, *[1] * 70], dim=1):
            model(piece, past_key_values=stack)
        found.append(stack)
    shortest = min(stack.batch.cohorts[0].stores[0].sealed_tokens for stack in found)
    assert shortest >= 8
    # early tokens: sealed in all three. Their exact keys differ a little, since later ones read compressed ones
    first = [stack.read(0).keys[:, :, : 2 + 8] for stack in found]
    torch.testing.assert_close(first[0], first[1])
    torch.testing.assert_close(first[0], first[2])


# ---- two ways to read


@pytest.mark.parametrize(
    "stages",
    [
        [CommonKV(0.4, exact=None)],
        [CommonKV(0.4, exact=None), Quant(4)],
        [CommonKV(0.4, exact=None), Quant(2), Evict(0.5)],
    ],
    ids=repr,
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_weighing_latents_is_the_plain_path(stages, attention):
    """With all keys rebuilt; what rough scores add is measured with the real model."""
    model = tiny.model("llama", attention=attention)
    ids = tiny.tokens(2, 130)
    logits = []
    for fused in (True, False):
        stack = KVStack(stages, model=model, fused=fused, **SETTINGS)
        pieces = [model(piece, past_key_values=stack).logits for piece in ids.split([100, *[1] * 30], dim=1)]
        logits.append(torch.cat(pieces[1:], dim=1))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=1e-3)


def test_rebuilding_in_bfloat16():
    exact, close = (error(filled([CommonKV(1.0, rebuild=rebuild)])) for rebuild in (None, "bfloat16"))
    assert exact < 1e-3 < close < 20


# ---- the paper's merge


def test_mean_is_the_weighed_mean_of_the_latents():
    """Against an example worked out by hand: two layers whose hidden states and weights are known."""
    model = tiny.model("llama")
    stage = (
        CommonKV(1.0, layers=2, basis="weights", merge="mean", weights=(3.0, 1.0, 1.0, 1.0))
        .bind(model)
        .for_group([0, 1])
    )
    hidden = [torch.randn(1, 1, 5, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    empty = torch.zeros(1, 2, 5, 16)
    latents = stage.forward([KV(empty, empty, h) for h in hidden])
    average = (0.75 * hidden[0] + 0.25 * hidden[1])[:, 0]
    back = stage.inverse({name: latent.data for name, latent in latents.items()}, 1)
    attention = model.model.layers[1].self_attn
    expected = attention.k_proj(average).view(1, 5, 2, 16).transpose(1, 2)
    torch.testing.assert_close(back.keys, expected, atol=1e-4, rtol=1e-4)
    expected = attention.v_proj(average).view(1, 5, 2, 16).transpose(1, 2)
    torch.testing.assert_close(back.values, expected, atol=1e-4, rtol=1e-4)


def test_projecting_is_better_than_the_mean():
    project, mean = (
        error(filled([CommonKV(0.3, layers=2, basis="weights", merge=merge)])) for merge in ("project", "mean")
    )
    assert project < mean


def test_hidden_states_of_raw_tokens_are_counted():
    plain, mean = (filled([CommonKV(0.3, layers=2, basis="weights", merge=m)]) for m in ("project", "mean"))
    raw = plain.batch.cohorts[0].stores[0].raw_tokens
    assert mean.nbytes - plain.nbytes == 4 * raw * 64 * 4


def test_hidden_states_come_with_padding_and_chunks():
    model = tiny.model("llama")
    ids, mask = tiny.left_padded([70, 100])
    stages = [CommonKV(1.0, layers=1, basis="weights", merge="mean")]
    together, alone = KVStack(stages, model=model, **SETTINGS), KVStack(stages, model=model, **SETTINGS)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=together)
    model(ids[:1, 30:], past_key_values=alone)
    torch.testing.assert_close(together.read(3, 0).keys, alone.read(3, 0).keys, atol=1e-4, rtol=1e-4)


def test_cropping_into_merged_hidden_states_is_refused():
    stack = filled([CommonKV(0.3, layers=2, basis="weights", merge="mean"), Quant(4)])
    with pytest.raises(UseError, match="merges hidden states, and those of compressed tokens are not kept"):
        stack.crop(-50)


@pytest.mark.parametrize("linear", ["int8", "nf4"])
def test_weights_of_a_quantized_model(linear):
    """Projections whose weights are no plain matrix are asked what they do to unit vectors."""
    bnb = pytest.importorskip("bitsandbytes")
    from kvstack.calibration.weight_axes import matrix

    plain = tiny.model("llama").model.layers[0].self_attn.k_proj
    if linear == "int8":
        packed = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    else:
        packed = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict(plain.state_dict())
    packed = packed.to("cpu")
    weight, bias = matrix(packed, tiny.model("llama").config)
    assert bias is None
    assert weight.shape == plain.weight.shape
    assert 0 < float((weight - plain.weight).norm() / plain.weight.norm()) < (0.03 if linear == "int8" else 0.15)


# ---- together with the others


def test_layers_of_a_group_keep_the_same_tokens():
    stack = filled([CommonKV(0.5, layers=2), Quant(2), Evict(0.4)])
    assert torch.equal(stack.positions(0), stack.positions(1))
    assert torch.equal(stack.positions(2), stack.positions(3))
    assert not torch.equal(stack.positions(0), stack.positions(2))


def test_evicting_more_layers_together_than_are_stored_together():
    stack = filled([CommonKV(0.5, layers=2), Quant(2), Evict(0.4, layers=4)])
    assert torch.equal(stack.positions(0), stack.positions(3))
    assert {role for role, _ in stack.batch.cohorts[0].stores[0].packed} == {0, 2}


def test_layers_that_are_not_full_attention_are_left_alone():
    model = tiny.model("gemma3")
    stack = filled([CommonKV(0.5), Quant(2)], model)
    assert stack.compressed_layers == [1, 3]
    assert stack.nbytes < stack.dense_nbytes


def test_bfloat16():
    model = tiny.model("llama", dtype=torch.bfloat16)
    stack = filled([CommonKV(0.9)], model)
    assert stack.read(0).keys.dtype == torch.bfloat16
    assert error(stack, model) < 100
    half = filled([CommonKV(0.5)], model)
    assert half.nbytes < stack.nbytes


# ---- mistakes


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 0.0}, r"CommonKV\(keep=0\.0\): keep is what stays"),
        ({"keep": True}, "keep is what stays"),
        ({"layers": 0}, r"CommonKV\(layers=0\): layers counts layers\. Use 1 or more\."),
        ({"basis": "data"}, "'data' is not a basis"),
        ({"merge": "median", "basis": "weights"}, "'median' is not a way to merge"),
        ({"merge": "mean"}, 'Use merge="project", or basis="weights"'),
        ({"weights": (1.0,), "basis": "weights"}, 'Use merge="mean"'),
        ({"weights": (-1.0, 2.0), "basis": "weights", "merge": "mean"}, "weights are shares"),
        ({"calibration": ("out", "axes")}, "calibration is not a path. Quote it in a spec: calibration='out/axes'"),
        ({"basis": "weights", "calibration": "x"}, "weights need no calibration"),
        ({"weights": (), "basis": "weights", "merge": "mean"}, "weights is empty"),
        ({"rebuild": "int8"}, "'int8' is not a type to compute in"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings, says):
    with pytest.raises(StageError, match=says):
        CommonKV(**settings)


@pytest.mark.parametrize(
    ("stage", "name", "says"),
    [
        (CommonKV(layers=3), "llama", r"stores 3 layers together.*Use layers= one of \[1, 2, 4\]"),
        (CommonKV(9999), "llama", r"a group of 4 layers has 256 axes\. Use keep=256 or less"),
        (CommonKV(100, basis="weights"), "llama", r"has 64 axes\. Use keep=64 or less"),
        (CommonKV(basis="weights"), "qwen3", r"layer 0 normalises keys \(k_norm\).*Use basis='calibrated'"),
        (CommonKV(basis="weights"), "deepseek_v3", "no projections of keys and values that kvstack knows"),
        (
            CommonKV(layers=2, basis="weights", merge="mean", weights=(1.0, 1.0)),
            "llama",
            "weights holds 2 numbers.*has 4 full-attention layers",
        ),
    ],
    ids=str,
)
def test_stages_that_do_not_fit_the_model(stage, name, says):
    with pytest.raises(BindError, match=says):
        KVStack([stage], model=tiny.model(name))


def test_keys_that_are_no_projection_of_the_hidden_states_are_refused():
    model = tiny.model.__wrapped__("llama")
    model.model.layers[3].self_attn.k_proj.register_forward_hook(lambda module, args, output: output.clamp(-1, 1))
    with pytest.raises(BindError, match="keys of layer 3 of LlamaForCausalLM are not its projection"):
        KVStack([CommonKV(basis="weights")], model=model)


def test_layers_without_rotation_are_projections_too():
    """SmolLM3 rotates no keys in every fourth layer."""
    stack = KVStack([CommonKV(basis="weights")], model=tiny.model("smollm3"))
    assert [layer for layer, rope in stack.binding.ropes.items() if rope is None] == [3]


def test_settings_travel():
    stack = KVStack([CommonKV(0.25, layers=2, basis="weights", merge="mean", weights=(1.0, 2.0, 0.5, 1.0))])
    again = KVStack.from_spec(stack.spec)
    assert again.stages == stack.stages
    assert KVStack.from_spec(stack.to_dict()).stages == stack.stages
    assert repr(KVStack.from_spec("commonkv:0.125+quant:2")) == "KVStack([CommonKV(keep=0.125), Quant(bits=2)])"


# ---- tokens that are not merged

APART = [
    CommonKV(0.3, layers=2, unmerged=0.4),
    CommonKV(0.3, layers=2, basis="weights", merge="mean", unmerged=0.4),
    CommonKV(0.3, layers=2, basis="weights", merge="mean", unmerged=0.4, similarity="pairs"),
]


@pytest.mark.parametrize("stage", APART, ids=repr)
@pytest.mark.parametrize("encode", [[], [Quant(4)], [Quant(8, group=8)]], ids=repr)
def test_unmerged_tokens_are_exact_and_counted(stage, encode):
    model = tiny.model("llama")
    tokens = 2 + 8 + 512
    stack = filled([stage, *encode], model, tokens)
    dense = DynamicCache()
    model(tiny.tokens(1, tokens), past_key_values=dense)
    kept = 0
    for group, store in enumerate(stack.batch.cohorts[0].stores):
        if (0, "places") not in store.packed:  # the other group's tokens are more unlike each other
            continue
        places = store.packed[0, "places"].parts["data"][0, 0, :, 0]
        apart = places.long() + torch.arange(0, 512, 256).repeat_interleave(len(places) // 2) + 2
        kept += len(apart)
        rest = torch.tensor([i for i in range(2, 514) if i not in set(apart.tolist())])
        for layer in (2 * group, 2 * group + 1):
            kv, exact_kv = stack.read(layer), dense.layers[layer]
            for found, exact in ((kv.keys, exact_kv.keys), (kv.values, exact_kv.values)):
                torch.testing.assert_close(found[:, :, apart], exact[:, :, apart], atol=1e-4, rtol=1e-4)
                assert not torch.allclose(found[:, :, rest], exact[:, :, rest], atol=1e-2)
        plain = store.packed[0, "unmerged"].parts["data"]
        assert plain.shape == (1, 1, len(apart), 128)
        assert store.packed[0, "latent"].tokens == 512 - len(apart)
    assert abs(kept / (2 * 512) - 0.4) <= 32 / 256
    (part,) = (part for part in stack.report().parts if part.part == "unmerged: data")
    assert part.payer.startswith("CommonKV(")
    assert part.nbytes == kept * 128 * 4


def test_unmerged_tokens_are_those_the_latent_serves_worst():
    stages = [CommonKV(0.3, layers=2, unmerged=unmerged) for unmerged in (0.4, 0.0)]
    apart, merged = (error(filled([stage], tokens=522), tokens=522) for stage in stages)
    assert apart < 0.6 * merged


def test_unmerged_tokens_follow_the_text():
    """Chunks, decoding, eviction by granule, and a crop through one."""
    model = tiny.model("llama")
    stack = KVStack([APART[0], Evict(0.6)], model=model, **SETTINGS)
    for piece in tiny.tokens(1, 1200).split([700, 300, *[1] * 200], dim=1):
        model(piece, past_key_values=stack)
    assert stack.batch.cohorts[0].stores[0].sealed_tokens % 256 == 0
    held = stack.held
    stack.crop(-700)
    assert stack.seen == 500
    assert stack.held < held
    assert stack.read(0).keys.shape[2] == stack.held == stack.positions(0).shape[-1]
    model(tiny.tokens(1, 3), past_key_values=stack)


@pytest.mark.parametrize("unmerged", [-0.1, 1.0])
def test_unmerged_is_a_share(unmerged):
    with pytest.raises(StageError, match="unmerged is a share of the tokens"):
        CommonKV(unmerged=unmerged)


def test_the_same_budget_gives_the_same_codes():
    """A quarter of the numbers in 4 bits, or half of them in 2: all channels compete for as many bits."""
    one, other = (filled([CommonKV(keep), Quant(bits)]) for keep, bits in ((0.25, 4), (0.5, 2)))
    for mine, theirs in zip(one.batch.cohorts[0].stores, other.batch.cohorts[0].stores, strict=True):
        parts, others = mine.packed[0, "latent"].parts, theirs.packed[0, "latent"].parts
        assert all(torch.equal(parts[name], others[name]) for name in ("codes", "gains"))


def test_who_pays_for_latents_that_no_encoder_packed():
    payers = {part.payer for part in filled([CommonKV(0.5, layers=2)]).report().parts}
    assert payers == {"stack", "CommonKV(layers=2)"}


def test_layers_that_do_not_nest_are_refused_once_both_are_known():
    """CommonKV chooses 4 of 4 layers; Evict wants 3."""
    with pytest.raises(StageError, match="4 and 3 layers do not nest"):
        KVStack([CommonKV(), Evict(0.5, layers=3)], model=tiny.model("llama"))


@pytest.mark.parametrize("encode", [Quant(4, codec="nf4"), Quant(4, group=64)], ids=repr)
def test_unmerged_tokens_with_an_encoder_of_larger_groups(encode):
    stage = CommonKV(0.3, layers=2, basis="weights", unmerged=0.125)
    stack = KVStack([stage, encode], model=tiny.model("llama", head_dim=64), **SETTINGS)
    stack.binding.model(tiny.tokens(1, 1200), past_key_values=stack)
    assert stack.batch.cohorts[0].stores[0].sealed_tokens >= 512


def test_channels_of_equal_energy_share_the_budget_exactly():
    from kvstack.waterfilling import leading

    equal = [torch.full((100,), 1e-8) for _ in range(2)]
    assert leading(equal, 30) == [30, 1]
    assert leading(equal, 0) == [1, 1]


def test_a_group_that_no_weight_listens_to_is_averaged():
    stage = CommonKV(0.5, layers=2, basis="weights", merge="mean", weights=(0.0, 0.0, 1.0, 0.0))
    equal = CommonKV(0.5, layers=2, basis="weights", merge="mean", weights=(1.0, 1.0, 1.0, 0.0))
    assert torch.equal(filled([stage]).read(0).keys, filled([equal]).read(0).keys)


def test_bound_inside_inference_mode_and_used_outside():
    """What stacks share must not be an inference tensor."""
    model = tiny.model("llama", intermediate_size=112)
    with torch.inference_mode():
        model(tiny.tokens(1, 100), past_key_values=KVStack([CommonKV(0.3), Quant(2)]))
    with torch.enable_grad():
        stack = KVStack([CommonKV(0.3), Quant(2)], **SETTINGS)
        model(tiny.tokens(1, 100), past_key_values=stack)
        assert torch.isfinite(model(tiny.tokens(1, 1), past_key_values=stack).logits).all()


def test_a_model_without_predictions_is_refused():
    from kvstack import CalibrationError

    with pytest.raises(CalibrationError, match="LlamaModel predicts no tokens"):
        KVStack([CommonKV()], model=tiny.model("llama", intermediate_size=104).model)


@pytest.mark.parametrize(
    "stages",
    [
        [CommonKV(calibration="/a/c++/x (1).safetensors")],
        [CommonKV(0.5, basis="weights", merge="mean", weights=(1.0,))],
    ],
    ids=repr,
)
def test_odd_settings_travel(stages):
    spec = KVStack(stages).spec
    assert KVStack.from_spec(spec).stages == tuple(stages)
