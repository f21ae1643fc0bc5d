"""A generation goes on from what its stack has read, or is refused before anything is computed."""

import copy

import pytest
import torch

from kvstack import Evict, KVStack, Quant, UseError
from kvstack.model.continuing import PREFILL
from kvstack.testing import tiny_model
from tests import tiny

DOCUMENT, QUESTION = tiny.tokens(1, 120), tiny.tokens(1, 15, seed=1)
ANOTHER = "does not begin with them.*new stack for each call, or call reset"


@pytest.fixture
def model():
    return copy.deepcopy(tiny.model("llama"))


def small(model=None):
    return KVStack([Quant(4, group=8), Evict(0.5)], model=model, sinks=2, window=8, block=8)


def generate(model, ids, stack, **more):
    return model.generate(ids, past_key_values=stack, **({"max_new_tokens": 8, "do_sample": False} | more))


def bits(x):
    """The bytes of a tensor: the reserve of a buffer may hold NaN, which equals nothing."""
    return x.contiguous().flatten().view(torch.uint8)


def assert_refused(model, ids, stack, words, **more):
    """The stack holds afterwards what it held before."""
    before, seen = [x.clone() for x in stack.tensors()], stack.seen
    with pytest.raises(UseError, match=words):
        generate(model, ids, stack, **more)
    assert stack.seen == seen
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(before, stack.tensors(), strict=True))


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 7}, {"do_sample": True}], ids=str)
def test_another_text_is_refused(model, bound, more):
    stack = small(model if bound else None)
    answer = generate(model, DOCUMENT, stack, **more)
    for other in (tiny.tokens(1, 200, seed=2), torch.cat([answer[:, :-9], tiny.tokens(1, 40, seed=3)], dim=1)):
        assert_refused(model, other, stack, ANOTHER, **more)
    assert_refused(model, tiny.tokens(1, 50, seed=2), stack, "127 tokens.* given a text of 50, so no new token", **more)
    assert_refused(model, answer[:, :127], stack, "no new token is left", **more)
    expected = generate(model, torch.cat([answer, QUESTION], dim=1), copy.deepcopy(stack))
    assert torch.equal(generate(model, torch.cat([answer, QUESTION], dim=1), stack, prefill_chunk_size=None), expected)
    stack.reset()
    assert torch.equal(generate(model, DOCUMENT, stack), generate(model, DOCUMENT, small()))


def test_a_single_token_that_differs_is_enough(model):
    stack = small()
    answer = generate(model, DOCUMENT, stack)
    text = torch.cat([answer, QUESTION], dim=1)
    for at in (0, 60, 126):
        other = text.clone()
        other[0, at] = 3 + (other[0, at] - 2) % 90
        assert_refused(model, other, stack, ANOTHER)
    swapped = text.clone()
    swapped[0, [10, 11]] = text[0, [11, 10]]
    assert_refused(model, swapped, stack, ANOTHER)
    generate(model, text, stack)


def test_new_ids_with_a_mask_over_all_tokens_go_on(model):
    whole, parts = small(), small()
    answer = generate(model, DOCUMENT, whole)
    generate(model, DOCUMENT, parts)
    text = torch.cat([answer, QUESTION], dim=1)
    expected = generate(model, text, whole)
    new = text[:, parts.seen :]
    found = generate(model, new, parts, attention_mask=torch.ones_like(text))
    assert torch.equal(found[:, -8:], expected[:, -8:])
    # and the whole text again, which has the same hash
    assert torch.equal(
        generate(model, torch.cat([expected, QUESTION], dim=1), whole),
        generate(model, torch.cat([expected, QUESTION], dim=1), parts),
    )


def test_batches_beams_and_several_answers(model):
    ids, mask = tiny.left_padded([60, 90])
    stack = small()
    out = generate(model, ids, stack, attention_mask=mask, num_beams=3)
    assert stack.batch_size == 6
    stack = small()
    out = generate(model, ids, stack, attention_mask=mask)
    text, wider = torch.cat([out, tiny.tokens(2, 5)], dim=1), torch.nn.functional.pad(mask, (0, 13), value=1)
    other = text.clone()
    other[1, 40] = 3 + (other[1, 40] - 2) % 90
    assert_refused(model, other, stack, ANOTHER, attention_mask=wider)
    assert_refused(model, text.flip(0), stack, ANOTHER, attention_mask=wider.flip(0))
    beams = copy.deepcopy(stack)
    beams.batch_repeat_interleave(3)
    generate(model, text, beams, attention_mask=wider, num_beams=3)
    swapped = copy.deepcopy(stack)
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert_refused(model, text, swapped, ANOTHER, attention_mask=wider)
    generate(model, text.flip(0), swapped, attention_mask=wider.flip(0))
    generate(model, text, stack, attention_mask=wider)


def test_after_assisted_decoding_a_crop_and_a_file(model, tmp_path):
    draft = tiny.model("llama", num_hidden_layers=1)
    stack = small(model)
    answer = generate(model, DOCUMENT, stack, assistant_model=draft, max_new_tokens=20)
    text = torch.cat([answer, QUESTION], dim=1)
    other = torch.cat([DOCUMENT, tiny.tokens(1, 60, seed=5)], dim=1)
    assert stack.batch.ids.known
    assert_refused(model, other, stack, ANOTHER)
    stack.save(tmp_path / "cache.safetensors")
    loaded = KVStack.load(tmp_path / "cache.safetensors", model=model)
    assert_refused(model, other, loaded, ANOTHER)
    assert torch.equal(generate(model, text, loaded), generate(model, text, stack.fork()))
    stack.crop(-5)  # sums of tokens that were accepted are not held, so no text can be refused
    assert not stack.batch.ids.known
    generate(model, text, stack)


def test_embeddings_have_no_ids(model):
    embeddings = model.get_input_embeddings()
    stack = small(model)
    generate(model, None, stack, inputs_embeds=embeddings(DOCUMENT))
    assert not stack.batch.ids.known
    longer = embeddings(torch.cat([DOCUMENT, tiny.tokens(1, 30)], dim=1))
    with pytest.raises(UseError, match="no new token"):
        generate(model, None, stack, inputs_embeds=longer[:, :100])
    generate(model, None, stack, inputs_embeds=longer)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "phi3", "opt", "gpt_neox"])
def test_other_architectures(name):
    model = tiny.model(name)
    stack = KVStack([Quant(4, group=8)], model=model)
    answer = generate(model, DOCUMENT, stack)
    assert_refused(model, tiny.tokens(1, 200, seed=2), stack, ANOTHER)
    generate(model, torch.cat([answer, QUESTION], dim=1), stack)


def test_eight_bytes_a_row_are_counted(model):
    stack = small()
    generate(model, tiny.tokens(3, 40), stack)
    assert [part.nbytes for part in stack.report().parts if part.part == "text hash"] == [3 * 8]


def test_nothing_is_left_on_a_model():
    model = tiny_model()
    stack, other = small(model), small(model)
    assert PREFILL in vars(model)
    stack.unbind()
    assert PREFILL in vars(model)
    other.unbind()
    assert PREFILL not in vars(model)


def test_other_caches_are_left_alone(model):
    from transformers import DynamicCache

    stack = small(model)
    cache = DynamicCache()
    generate(model, DOCUMENT, cache)
    generate(model, tiny.tokens(1, 200, seed=2), cache)  # transformers does not look
    assert stack.seen == 0


NO_CACHE = "together with use_cache=False.*Pass use_cache=True.*leave out past_key_values"


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("bound", [False, True])
def test_a_generation_without_a_cache_is_refused(name, bound):
    """It would feed the whole text at every step, as new tokens."""
    model = copy.deepcopy(tiny.model(name))
    stack = KVStack([Quant(4, group=8)], model=model if bound else None)
    assert_refused(model, DOCUMENT, stack, NO_CACHE, use_cache=False)
    model.generation_config.use_cache = False
    assert_refused(model, DOCUMENT, stack, NO_CACHE)
    assert bound or stack.binding is None
    answer = generate(model, DOCUMENT, stack, use_cache=True)
    text = torch.cat([answer, QUESTION], dim=1)
    assert_refused(model, text, stack, NO_CACHE)
    assert_refused(model, text[:, stack.seen :], stack, NO_CACHE, attention_mask=torch.ones_like(text))
    generate(model, text, stack, use_cache=True)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("inner", [False, True], ids=["causal model", "its decoder"])
def test_a_forward_that_is_told_not_to_cache_is_refused(model, bound, inner):
    stack, caller = small(model if bound else None), model.model if inner else model
    with pytest.raises(UseError, match=NO_CACHE):
        caller(DOCUMENT, past_key_values=stack, use_cache=False)
    assert not stack.seen
    # the default of a model is no wish: transformers fills the cache that it is given all the same
    model.config.use_cache = False
    caller(DOCUMENT, past_key_values=stack)
    assert stack.seen == DOCUMENT.shape[1]
    with pytest.raises(UseError, match=NO_CACHE):
        caller(QUESTION, past_key_values=stack, use_cache=False)
    assert stack.seen == DOCUMENT.shape[1]


def test_a_prefill_that_was_stopped_is_the_first_thing_to_know(model):
    """Advice to pass all ids would not help: half of the layers hold them."""
    stack = small(model)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(model, DOCUMENT, stack)
    handle.remove()
    for text in (DOCUMENT, QUESTION, torch.cat([DOCUMENT, QUESTION], dim=1)):
        with pytest.raises(UseError, match=r"^the last forward of this cache did not end.*Call reset\(\)"):
            generate(model, text, stack)
    stack.reset()
    assert torch.equal(generate(model, DOCUMENT, stack), generate(model, DOCUMENT, small()))
