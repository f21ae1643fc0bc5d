"""On a real model: bytes of a long prompt. Half precision is slow on many processors, so another process can run this
file beside the others.
"""

import pytest
import torch

from kvstack import Evict, KVStack, Quant
from tests.real.quality import text

pytestmark = pytest.mark.real


def check(model, ids, stages, most):
    stack = KVStack(stages, model=model)
    model(ids, past_key_values=stack, logits_to_keep=1)
    assert stack.dense_nbytes == 4096 * model.config.num_hidden_layers * 3 * 128 * 2
    assert stack.nbytes <= most * stack.dense_nbytes


def test_bytes_of_a_long_prompt(smollm2):
    """Share of a dense bfloat16 cache held for a prompt of 4,096 tokens."""
    model, tokenizer = smollm2
    model = model.to(torch.bfloat16)
    try:
        check(model, text(tokenizer, 4096), [Quant(2), Evict(0.2)], 0.06)
    finally:
        model.to(torch.float32)


@pytest.mark.parametrize(("stages", "most"), [([Quant(4)], 0.35), ([Quant(2)], 0.22)], ids=repr)
def test_bytes_of_codes_alone(smollm2, stages, most):
    """What a layer holds does not depend on how many there are: one group of the model's layers, without their text."""
    model, _ = smollm2
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 5, "intermediate_size": 64})
    fewer = type(model)(config).to(torch.bfloat16).eval()
    check(fewer, torch.randint(0, config.vocab_size, (1, 4096)), stages, most)
