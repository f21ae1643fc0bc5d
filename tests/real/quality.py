"""Drift of a stack on a real model."""

import pydoc_data.topics

from transformers import DynamicCache

from kvstack import KVStack


def text(tokenizer, length, topic="classes"):
    """`length` token ids of Python's documentation."""
    words = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics) if name >= topic)
    return tokenizer(words[: length * 8], return_tensors="pt").input_ids[:, :length]


def divergence(model, ids, prompt, stack):
    """Mean KL (nats) from the dense model to the stack over the tokens behind the prompt, and top-1 agreement."""
    found = []
    for cache in (DynamicCache(config=model.config), stack):
        model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        found.append(model(ids[:, prompt:], past_key_values=cache).logits[0].log_softmax(-1))
    dense, given = found
    kl = (dense.exp() * (dense - given)).sum(-1).mean()
    return float(kl), float((dense.argmax(-1) == given.argmax(-1)).float().mean())


def check_quality(loaded, stages, most_kl, least_agreement):
    model, tokenizer = loaded
    kl, agreement = divergence(model, text(tokenizer, 1280), 1024, KVStack(stages))
    assert kl <= most_kl
    assert agreement >= least_agreement
