"""Gemma 3 270M, a real model with sliding layers: three of 18 layers attend to the whole text and are compressed."""

from pathlib import Path

import pytest
from transformers import DynamicCache

from kvstack import CommonKV, Evict, KVStack, Quant
from kvstack.bench.measure.sizes import held_bytes
from kvstack.cli import demo
from tests.real.quality import check_quality, text

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent.parent


def perplexity(model, ids):
    likelihoods = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return float((-likelihoods.mean()).exp())


def test_the_weights_are_read_rightly(gemma3):
    """English is no surprise to it; with the rotations of one kind of layer in the place of the other's, it is more of
    one."""
    model, tokenizer = gemma3
    ids, rope = text(tokenizer, 512), model.model.rotary_emb
    right = perplexity(model, ids)
    assert right < 30
    sliding = rope.sliding_attention_inv_freq.clone()
    try:
        rope.sliding_attention_inv_freq.copy_(rope.full_attention_inv_freq)
        assert perplexity(model, ids) > 2 * right
    finally:
        rope.sliding_attention_inv_freq.copy_(sliding)


def ask(gemma3, cache, characters):
    """The answer to the demo's question behind a text of some characters; the model was never taught to chat."""
    model, tokenizer = gemma3
    licence = (ROOT / "LICENSE").read_text()
    half = characters // 2
    prompt = f"{licence[:half]}\n\n{demo.FACT}\n\n{licence[half:characters]}\n\nThe secret password of the wizard is"
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("characters", [2000, 6600])
def test_the_line_answers_and_bytes_are_told_whole(gemma3, characters):
    model, _ = gemma3
    dense, stack = DynamicCache(config=model.config), KVStack([CommonKV(), Quant(2), Evict(0.2)])
    for cache in (dense, stack):
        assert demo.ANSWER in ask(gemma3, cache, characters)
    assert stack.dense_nbytes == held_bytes(dense)
    paid = {part.part: part.nbytes for part in stack.report().parts if part.payer == "model"}
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    own = sum(dense.layers[i].keys.nbytes + dense.layers[i].values.nbytes for i in full)
    # sliding layers hold what they hold in a dense cache, and are counted
    assert paid == {"uncompressed layers": stack.dense_nbytes - own}
    assert 0 < stack.nbytes - paid["uncompressed layers"] < own / 2


@pytest.mark.parametrize(
    ("stages", "most_kl", "least_agreement"),
    [([Quant(4)], 0.004, 0.97), ([CommonKV(), Quant(2)], 0.02, 0.93)],
    ids=repr,
)
def test_quality(gemma3, stages, most_kl, least_agreement):
    check_quality(gemma3, stages, most_kl, least_agreement)
