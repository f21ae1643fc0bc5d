"""On a real model: agreement with the dense cache."""

import pytest
import torch
from transformers import DynamicCache

from kvstack import Evict, KVStack, Quant
from tests.real.quality import check_quality, divergence, text
from tests.test_numbering import Oracle

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


@torch.no_grad()
def test_places_in_the_cache_are_those_of_a_plain_cache_of_the_kept_tokens(smollm2):
    model, tokenizer = smollm2
    ids, seen = text(tokenizer, 300), 0
    stack, oracle = KVStack([Evict(64, "keydiff", positions="cache")], window=16, model=model), Oracle(model)
    for count in (200, 1, 1, 40, 1, 57):
        new = ids[:, seen : seen + count]
        found, expected = model(new, past_key_values=stack).logits, oracle.feed(new, seen)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.01)
        seen += count
        oracle.follow(stack)
