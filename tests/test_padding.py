"""A row of a left-padded batch goes through exactly what it goes through alone.

Models run in float64: matrix products of several rows round differently than those of one, and in float32 that
can move a number to the next code of a quantizer.
"""

import pytest
import torch

from kvstack import CommonKV, Evict, KVStack, Quant, SnapKV, UseError
from tests import tiny

LENGTHS = [96, 61, 96, 5]
STACKS = {
    "quant4": [Quant(4, group=8)],
    "evict_share": [Evict(0.4)],
    "evict_count": [Evict(12, SnapKV(window=8, kernel=1))],
    "h2o": [Evict(0.4, "h2o")],
    "kvzip": [Evict(0.4, "kvzip")],
    "kvzip_sealed": [Evict(0.4, "kvzip", layers=2), Quant(8, group=8)],
    "refit": [Evict(0.4, refit=True)],
    "refit_sealed": [Evict(0.4, "keydiff", refit=True), Quant(8, group=8)],
    "budgets": [Evict(0.4, "keydiff", budgets="heads")],
    # rows of one length drop packed tokens together, so a score that is the same for all rows
    "budgets_sealed": [Evict(0.4, "streaming", budgets="heads"), Quant(8, group=8)],
    "places": [Evict(12, "streaming", positions="cache")],
    "places_heads": [Evict(0.4, "keydiff", positions="cache")],
    "places_queries": [Evict(0.4, positions="cache", refit=True)],
    "places_sealed": [Evict(0.4, "keydiff", positions="cache"), Quant(8, group=8)],
    "places_kvzip": [Evict(0.4, "kvzip", positions="cache")],
    "places_commonkv": [CommonKV(0.5, layers=2), Evict(0.5, positions="cache"), Quant(2)],
    "budgets_layers": [Evict(0.4, budgets="layers"), Quant(8, group=8)],
    "shared_layers": [Evict(0.4, layers=2, pool="max")],
    "quant2_evict": [Quant(2, group=8), Evict(0.5)],
    "commonkv": [CommonKV(0.5, layers=2), Evict(0.5), Quant(2)],
}


def make(name):
    return KVStack(STACKS[name], sinks=2, window=8, block=8)


CASES = [(stack, "llama", "sdpa") for stack in STACKS]
CASES += [("quant2_evict", name, "eager") for name in ("llama", "qwen3", "phi3", "gpt_neox")]
# eager attention of transformers turns fully masked rows of a float64 model into NaN in sliding layers
CASES += [("quant2_evict", "gemma3", "sdpa")]


@pytest.mark.parametrize(("stack", "name", "attention"), CASES)
def test_padded_row_equals_row_alone(stack, name, attention):
    model = tiny.model(name, attention, torch.float64)
    ids, mask = tiny.left_padded(LENGTHS)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    steps = 20
    together = KVStack(STACKS[stack], sinks=2, window=8, block=8)
    first = model(ids, attention_mask=mask, past_key_values=together, position_ids=places).logits[:, -1]
    found = torch.cat([first[:, None], decode(model, together, mask, steps)], dim=1)
    for row, length in enumerate(LENGTHS):
        alone = make(stack)
        own = ids[row : row + 1, -length:]
        first = model(own, past_key_values=alone).logits[:, -1]
        expected = torch.cat([first[:, None], decode(model, alone, torch.ones_like(own), steps, row)], dim=1)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)
        for layer in alone.compressed_layers:
            assert tiny.positions_by_head(together, layer, row) == tiny.positions_by_head(alone, layer)


def decode(model, cache, mask, steps, first_row=0):
    found = []
    for step in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        new = ((torch.arange(len(mask)) + first_row) * 7 + step * 3)[:, None] % 90 + 3
        places = mask.sum(1, keepdim=True) - 1
        found.append(model(new, attention_mask=mask, past_key_values=cache, position_ids=places).logits[:, -1])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("stack", STACKS)
def test_what_pads_contain_does_not_matter(stack):
    model = tiny.model("llama", dtype=torch.float64)
    ids, mask = tiny.left_padded([80, 44])
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 50))
    made = [make(stack), make(stack)]
    for cache, text in zip(made, (ids, other), strict=True):
        model(text, attention_mask=mask, past_key_values=cache)
    found = [decode(model, cache, mask, 10) for cache in made]
    assert torch.equal(*found)


@pytest.mark.parametrize("stack", STACKS)
def test_chunked_prefill_of_a_padded_batch(stack):
    """Pads may fill a row's whole first chunk, and its text may begin inside a later one."""
    model = tiny.model("llama", dtype=torch.float64)
    lengths = [70, 20]
    ids, mask = tiny.left_padded(lengths)
    together = make(stack)
    options = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": 32}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    batch = model.generate(ids, attention_mask=mask, past_key_values=together, **options)
    assert together.get_seq_length() == 70
    # the short row's text lies in the last two chunks: 32 + 6 tokens of the batch, 14 + 6 of its own
    alone = make(stack)
    own = ids[1:, -20:]
    for chunk in own.split([14, 6], dim=1):
        first = model(chunk, past_key_values=alone).logits[:, -1]
    torch.testing.assert_close(batch.logits[0][1:].double(), first, atol=1e-4, rtol=1e-4)
    for layer in range(4):
        assert tiny.positions_by_head(together, layer, 1) == tiny.positions_by_head(alone, layer)


def test_second_turn_may_be_padded_too():
    model = tiny.model("llama", dtype=torch.float64)
    ids, mask = tiny.left_padded([50, 30])
    turn, turn_mask = tiny.left_padded([12, 5], seed=1)
    stack = make("quant4")
    model(ids, attention_mask=mask, past_key_values=stack, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    both = torch.cat([mask, turn_mask], dim=1)
    places = (both.cumsum(1) - 1)[:, 50:]
    found = model(turn, attention_mask=both, past_key_values=stack, position_ids=places).logits[:, -1]
    for row, (first, second) in enumerate([(50, 12), (30, 5)]):
        alone = make("quant4")
        model(ids[row : row + 1, -first:], past_key_values=alone)
        expected = model(turn[row : row + 1, -second:], past_key_values=alone).logits[:, -1]
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stack", STACKS)
def test_padding_may_stand_on_the_right(stack):
    """A batch of finished questions: each row goes on behind its padding."""
    model = tiny.model("llama", dtype=torch.float64)
    lengths = [40, 27, 40, 9]
    ids, mask = tiny.left_padded(lengths)
    ids = torch.stack([row.roll(-(40 - n)) for row, n in zip(ids, lengths, strict=True)])
    mask = mask.flip(1)
    together = make(stack)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, past_key_values=together, position_ids=places).logits
    first = torch.stack([row[n - 1] for row, n in zip(logits, lengths, strict=True)])
    found = torch.cat([first[:, None], decode(model, together, mask, 12)], dim=1)
    for row, length in enumerate(lengths):
        alone = make(stack)
        own = ids[row : row + 1, :length]
        first = model(own, past_key_values=alone).logits[:, -1]
        expected = torch.cat([first[:, None], decode(model, alone, torch.ones_like(own), 12, row)], dim=1)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)
        for layer in alone.compressed_layers:
            assert tiny.positions_by_head(together, layer, row) == tiny.positions_by_head(alone, layer)


def test_a_row_may_have_nothing_but_padding_so_far():
    """The first chunk of a long batch."""
    model = tiny.model()
    ids, mask = tiny.left_padded([40, 8])
    stack = make("quant2_evict")
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=stack)
    assert stack.read(0, 1).keys.shape == (1, 2, 0, 16)
    assert stack.positions(0, 1).shape[-1] == 0
    stack.batch_select_indices([1])
    with pytest.raises(UseError, match="holds nothing yet but padding"):
        stack.read(0, 0)
    model(ids[1:, 20:], attention_mask=mask[1:], past_key_values=stack)
    assert stack.held == 8
