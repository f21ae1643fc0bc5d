"""On a real model: bytes of a long prompt. Half precision is slow on many processors, so another process can run this
file beside the others.
"""

import pytest
import torch

from kvstack import Evict, KVStack, Quant
from tests.real.quality import text

pytestmark = pytest.mark.real


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
