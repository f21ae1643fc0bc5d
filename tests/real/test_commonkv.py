"""CommonKV on a real model: small versions of the benchmark's rows, and its paper's form beside it."""

import pytest
import torch
from transformers import DynamicCache

from kvstack import CommonKV, Evict, KVStack, Quant, Tiers
from kvstack.bench.measure.sizes import share_of_bfloat16
from tests.real.quality import check_quality, divergence, text

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("stages", "most_kl", "least_agreement"),
    [
        ([CommonKV(0.5)], 0.002, 0.95),
        ([CommonKV(1.0), Quant(2)], 0.002, 0.95),
        ([CommonKV(0.5), Quant(2)], 0.01, 0.93),
        ([CommonKV(0.16), Quant(2)], 0.08, 0.83),
    ],
    ids=repr,
)
def test_quality(smollm2, stages, most_kl, least_agreement):
    check_quality(smollm2, stages, most_kl, least_agreement)


def test_a_sixteenth_of_the_bytes(smollm2):
    """4,096 tokens in a sixteenth of a bfloat16 cache, everything counted."""
    model, tokenizer = smollm2
    stack = KVStack([CommonKV(0.45), Quant(2)], window=16)
    kl, _ = divergence(model, text(tokenizer, 4352), 4096, stack)
    assert kl <= 0.02
    small = KVStack([CommonKV(0.45), Quant(2)], window=16, model=model)
    model(text(tokenizer, 4096), past_key_values=small, logits_to_keep=1)
    assert share_of_bfloat16(small, model) <= 0.0625


def test_classes_drift_half_as_far_in_as_many_bytes(smollm2):
    model, tokenizer = smollm2
    drift, share = [], []
    for select in ([], [Tiers("lookahead")]):
        stack = KVStack([CommonKV(0.14), Quant(2), *select], window=16)
        drift.append(divergence(model, text(tokenizer, 1280), 1024, stack)[0])
        held = KVStack([CommonKV(0.14), Quant(2), *select], window=16, model=model)
        model(text(tokenizer, 1024), past_key_values=held, logits_to_keep=1)
        share.append(share_of_bfloat16(held, model))
    assert drift[1] < 0.5 * drift[0]
    assert share[1] < share[0] + 0.002


def test_the_paper_s_form(smollm2):
    """One layer at full rank is exact up to rounding; merging five layers by their mean is far worse than projecting
    them on the same axes, and that is far worse than calibrated axes."""
    model, tokenizer = smollm2
    ids = text(tokenizer, 1280)
    exact, _ = divergence(model, ids, 1024, KVStack([CommonKV(1.0, layers=1, basis="weights", merge="mean")]))
    assert abs(exact) < 1e-5
    settings = {"keep": 0.3, "layers": 5}
    mean, project, ours = (
        divergence(model, ids, 1024, KVStack([CommonKV(**settings, **form)]))[0]
        for form in ({"basis": "weights", "merge": "mean"}, {"basis": "weights"}, {})
    )
    assert mean > 2 * project > 20 * ours


def test_weighing_latents_is_the_plain_path(smollm2):
    model, tokenizer = smollm2
    ids, logits = text(tokenizer, 600), []
    for fused in (True, False):
        stack = KVStack([CommonKV(0.5, exact=None), Quant(2)], model=model, fused=fused)
        model(ids[:, :590], past_key_values=stack)
        logits.append(
            torch.cat([model(ids[:, i : i + 1], past_key_values=stack).logits for i in range(590, 600)], dim=1)
        )
    torch.testing.assert_close(logits[0], logits[1], atol=2e-3, rtol=1e-3)


def test_rough_scores_drift_by_a_tenth_more_at_most(smollm2):
    """Than keys that are all rebuilt, one token after the other behind a prompt of 2,048."""
    model, tokenizer = smollm2
    ids, found = text(tokenizer, 2112, topic="o"), []
    stacks = [KVStack([CommonKV(0.65, exact=exact), Quant(2)], model=model) for exact in (384, None)]
    for cache in (DynamicCache(), *stacks):
        model(ids[:, :2048], past_key_values=cache, logits_to_keep=1)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(2048, 2112)]
        found.append(torch.cat(steps).log_softmax(-1))
    dense, *given = found
    rough, exact = (float((dense.exp() * (dense - x)).sum(-1).mean()) for x in given)
    assert rough != exact
    assert rough <= 1.1 * exact


def test_a_saved_cache_is_as_large_as_the_cache(smollm2, tmp_path):
    model, tokenizer = smollm2
    stack = KVStack([CommonKV(), Quant(2), Evict(0.2)], model=model)
    model(text(tokenizer, 2048), past_key_values=stack, logits_to_keep=1)
    stack.save(tmp_path / "cache.safetensors")
    assert abs((tmp_path / "cache.safetensors").stat().st_size / stack.nbytes - 1) < 0.05
    again = KVStack.load(tmp_path / "cache.safetensors", model=model)
    token = torch.tensor([[42]])
    assert torch.equal(model(token, past_key_values=again).logits, model(token, past_key_values=stack).logits)


@pytest.mark.parametrize("linear", ["int8", "nf4"])
def test_weights_of_a_quantized_layer(smollm2, linear):
    """The basis of a layer whose projections bitsandbytes holds in 8 or 4 bits is near that of the exact ones."""
    bnb = pytest.importorskip("bitsandbytes")
    from kvstack.calibration.weight_axes import matrix

    model, _ = smollm2
    plain = model.model.layers[3].self_attn.v_proj
    shape = plain.in_features, plain.out_features
    if linear == "int8":
        packed = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
    else:
        packed = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict(plain.state_dict())
    weight, _ = matrix(packed.to("cpu"), model.config)
    assert 0 < float((weight - plain.weight).norm() / plain.weight.norm()) < (0.02 if linear == "int8" else 0.15)
