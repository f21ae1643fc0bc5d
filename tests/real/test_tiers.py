"""Tokens in classes, on a real model."""

import pytest

from kvstack import CommonKV, KVStack, Quant, Tiers
from kvstack.bench.measure.sizes import share_of_bfloat16
from tests.real.quality import divergence, text

pytestmark = pytest.mark.real


def test_classes_drift_half_as_far_in_as_many_bytes(smollm2):
    model, tokenizer = smollm2
    drift, share = [], []
    for select in ([], [Tiers("lookahead")]):
        stack = KVStack([CommonKV(0.14), Quant(2), *select], window=16)
        drift.append(divergence(model, text(tokenizer, 1280), 1024, stack)[0])
        held = KVStack([CommonKV(0.14), Quant(2), *select], window=16, model=model)
        model(text(tokenizer, 1024), past_key_values=held, logits_to_keep=1)
        share.append(share_of_bfloat16(held, model))
    print(drift, share)
    assert drift[1] < 0.5 * drift[0]
    assert share[1] < share[0] + 0.001
