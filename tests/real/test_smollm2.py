"""On a real model: agreement with the dense cache, and bytes of a long prompt."""

import pydoc_data.topics

import pytest
import torch
from transformers import DynamicCache

from kvstack import Evict, KVStack, Quant

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2():
    from kvstack.models import load

    return load()


def text(tokenizer, length, topic="classes"):
    """`length` token ids of Python's documentation."""
    words = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics) if name >= topic)
    return tokenizer(words[: length * 8], return_tensors="pt").input_ids[:, :length]


def divergence(model, ids, prompt, stack):
    """Mean KL (nats) from the dense model to the stack over the tokens behind the prompt, and top-1 agreement."""
    found = []
    for cache in (DynamicCache(), stack):
        model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        found.append(model(ids[:, prompt:], past_key_values=cache).logits[0].log_softmax(-1))
    dense, given = found
    kl = (dense.exp() * (dense - given)).sum(-1).mean()
    return float(kl), float((dense.argmax(-1) == given.argmax(-1)).float().mean())


def check_quality(smollm2, stages, most_kl, least_agreement):
    model, tokenizer = smollm2
    kl, agreement = divergence(model, text(tokenizer, 1280), 1024, KVStack(stages))
    assert kl <= most_kl
    assert agreement >= least_agreement


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
