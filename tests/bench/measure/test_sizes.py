"""Bytes of any cache, by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvstack import CommonKV, Evict, KVStack, Quant
from kvstack.bench.measure import sizes
from kvstack.testing import tiny_model
from tests import tiny


def test_bytes_as_a_share_of_bfloat16():
    """Raw numbers of a float32 model count two bytes each, codes and positions what they are."""
    model = tiny_model()
    ids = torch.randint(3, 97, (1, 2 + 8 + 64), generator=torch.Generator().manual_seed(0))
    caches = [DynamicCache(), *(KVStack(s, model=model, sinks=2, window=8) for s in ([], [Quant(4)], [Evict(32)]))]
    shares = []
    for cache in caches:
        model(ids, past_key_values=cache)
        shares.append(sizes.share_of_bfloat16(cache, model))
    codes, raw = 64 * (4 + 32 / 32 / 2 + 32 / 16 / 2) / 16, 10
    text_hash = 8 / 512  # a stack holds one number for each row; a dense token has 512 bytes
    assert shares[0] == 1.0
    assert shares[1] == pytest.approx((74 + text_hash) / 74)
    assert shares[2] == pytest.approx((raw + codes + text_hash) / 74)
    held = caches[3].held
    assert held <= 32 + 10
    # positions: four bytes for each token that was chosen, once for all four layers; a token has 256 numbers
    assert shares[3] == pytest.approx((held + (held - 10) * 4 / (256 * 2) + text_hash) / 74)


def test_dense_bytes_of_a_sliding_layer_end_with_its_window():
    model = tiny.model("gemma3")
    ids = tiny.tokens(1, 200)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    # 2 layers hold 15 of 200 tokens and 2 hold all, 2 heads of 16 for keys and for values, 2 bytes
    assert sizes.dense_bfloat16(cache, model) == (2 * 15 + 2 * 200) * 2 * 2 * 16 * 2
    # behind a prompt sliding layers hold views of all of it; a few counters come on top
    assert sizes.share_of_bfloat16(cache, model) == pytest.approx(1, rel=0.01)
    stack = KVStack([], model=model)
    model(ids, past_key_values=stack)
    assert sizes.share_of_bfloat16(stack, model) == pytest.approx(1, rel=0.01)


def test_what_was_fitted_to_the_model_is_told_beside_the_bytes():
    model = tiny.model()
    dense, stack = DynamicCache(), KVStack([CommonKV(), Quant(4)], model=model)
    for cache in (dense, stack):
        model(tiny.tokens(2, 200), past_key_values=cache)
    assert sizes.fitted(dense) == {"model_nbytes": 0, "break_even": 0}
    assert sizes.of_bfloat16(dense, model) == {"share": 1.0, "model_nbytes": 0, "break_even": 0}
    assert sizes.fitted(stack) == {"model_nbytes": stack.model_nbytes, "break_even": stack.report().break_even}
    told = sizes.of_bfloat16(stack, model)
    saved = (1 - told["share"]) * 2 * 200 * 256 * 2  # 2 rows, 256 numbers a token, of 2 bytes
    assert told["model_nbytes"] == stack.model_nbytes > 0
    assert told["break_even"] == pytest.approx(stack.model_nbytes * 400 / saved, abs=1)
    # half the bytes of float32 are saved, and what was fitted is as large as before
    assert told["break_even"] > stack.report().break_even
