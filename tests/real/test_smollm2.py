"""On a real model: agreement with the dense cache, and bytes of a long prompt."""

import pytest
import torch
from transformers import DynamicCache

from kvstack import Evict, KVStack, Quant
from tests.real.quality import check_quality, divergence, text

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("stages", "most_kl", "least_agreement"),
    [([Quant(8)], 1e-3, 0.99), ([Quant(4)], 0.01, 0.93), ([Quant(2)], 0.2, 0.75)],
    ids=repr,
)
def test_quality(smollm2, stages, most_kl, least_agreement):
    check_quality(smollm2, stages, most_kl, least_agreement)


def test_a_score_beats_chance(smollm2):
    model, tokenizer = smollm2
    ids = text(tokenizer, 1280)
    chance, _ = divergence(model, ids, 1024, KVStack([Evict(0.2, "random")]))
    scored, _ = divergence(model, ids, 1024, KVStack([Evict(0.2)]))
    assert scored < chance / 2


def test_eight_bits_generate_what_the_dense_cache_does(smollm2):
    """Stated agreement: token for token along the dense text, 47 of 48 choices are the same."""
    model, tokenizer = smollm2
    ids = text(tokenizer, 400)
    dense = model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=49, do_sample=False)
    stack, same = KVStack([Quant(8)]), 0
    model(ids, past_key_values=stack)
    for i in range(400, 448):
        choice = model(dense[:, i : i + 1], past_key_values=stack).logits[0, -1].argmax()
        same += int(choice == dense[0, i + 1])
    assert same >= 47


@pytest.mark.parametrize(
    ("stages", "most"),
    [([Quant(4)], 0.35), ([Quant(2)], 0.22), ([Quant(2), Evict(0.2)], 0.06)],
    ids=repr,
)
def test_bytes_of_a_long_prompt(smollm2, stages, most):
    """Share of a dense bfloat16 cache held for a prompt of 4,096 tokens."""
    model, tokenizer = smollm2
    model = model.to(torch.bfloat16)
    try:
        stack = KVStack(stages, model=model)
        model(text(tokenizer, 4096), past_key_values=stack, logits_to_keep=1)
        assert stack.dense_nbytes == 4096 * 30 * 3 * 128 * 2
        assert stack.nbytes <= most * stack.dense_nbytes
    finally:
        model.to(torch.float32)
