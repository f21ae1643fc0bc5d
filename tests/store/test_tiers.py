"""Sealed tokens in classes: each is held as the encoder of its class holds it, and nothing is lost on the way."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvstack import BindError, CommonKV, KVStack, Quant, StageError, Tiers, UseError
from kvstack.encode.class_codes import ClassCodes
from kvstack.store.tiered import Schedule, TieredLatents
from tests import tiny
from tests.stages import Pairs

SETTINGS = {"sinks": 2, "window": 8, "block": 16}
STAGES = [CommonKV(0.5, layers=2, exact=None), Quant(2), Tiers("keydiff")]
QUERIES = [CommonKV(0.5, layers=2, exact=None), Quant(2), Tiers("snapkv", shares=(0.25, 0.75), weights=(9, 1))]


def model():
    return tiny.model("llama")


def filled(stages, length, decode=0, rows=1, **changed):
    stack = KVStack(stages, model=model(), **SETTINGS | changed)
    ids = tiny.tokens(rows, length + decode)
    with torch.no_grad():
        model()(ids[:, :length], past_key_values=stack)
        for i in range(length, length + decode):
            model()(ids[:, i : i + 1], past_key_values=stack)
    return stack


def parts(stack):
    """What each group of layers holds in classes."""
    return [part for store in stack.batch.stores for part in store.sealed]


def classes(part):
    found = part._classes_held()
    part.close()
    return found


# ---- how many of each class


shares = st.lists(st.integers(1, 32), min_size=2, max_size=8).map(lambda some: [x / sum(some) for x in some])


@given(shares, st.integers(0, 500), st.integers(0, 500))
def test_any_run_of_tokens_has_about_the_shares(some, first, granules):
    schedule = Schedule(some, 8)
    counts = schedule.counts(8 * first, 8 * (first + granules))
    assert sum(counts) == 8 * granules
    assert all(count % 8 == 0 for count in counts)
    for count, share in zip(counts, some, strict=True):
        assert abs(count / 8 - share * granules) < 5


@given(shares, st.integers(0, 60), st.integers(0, 60))
def test_blocks_add_up(some, first, more):
    """What is sealed in two blocks has the counts of what is sealed at once: nobody has to remember the blocks."""
    schedule = Schedule(some, 8)
    one, two = schedule.counts(0, 8 * first), schedule.counts(8 * first, 8 * (first + more))
    assert [x + y for x, y in zip(one, two, strict=True)] == schedule.counts(0, 8 * (first + more))


@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_classes_come_back_from_their_bits(count, units, rows, seed):
    x = torch.randint(count, (rows, 1, 8 * units, 1), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    coder = ClassCodes(count)
    packed = coder.encode(x, "classes")
    assert torch.equal(coder.decode(packed, "classes"), x)
    assert packed.parts["classes"].numel() == rows * units * (count - 1).bit_length()


# ---- what is held


@pytest.mark.parametrize("stages", [STAGES, QUERIES], ids=["keydiff", "snapkv"])
def test_every_token_is_held_as_its_class_holds_it(stages):
    """Codes of channels are those of single tokens. So the oracle packs all tokens of the prompt as each class does,
    and takes of every token what its class made of it. A stack without an encoder has the latents."""
    stack, plain = (filled(some, 200, decode=40, rows=2) for some in (stages, stages[:1]))
    for part, exact in zip(parts(stack), parts(plain), strict=True):
        assert isinstance(part, TieredLatents)
        held, first = part._latents()["latent"], 184 // 8 * 8
        z = exact._latents()["latent"][:, :, :first]
        which = classes(part)[:, None, :first, None]
        for number, name in enumerate(part._each["latent"]):
            encoder = part._encoder(name)
            rank = encoder.rank
            assert rank <= z.shape[-1]
            made = encoder.decode(encoder.encode(z[..., :rank], name), name)
            mine = (which == number).expand_as(made)
            assert torch.equal(held[:, :, :first, :rank][mine], made[mine])
            assert not held[:, :, :first, rank:][(which == number).expand_as(held[:, :, :first, rank:])].any()


def test_important_tokens_are_in_the_first_classes():
    """Scores of a prompt, from a stack that looks at the same prompt before it seals it."""
    scores = {}

    class Fixed:
        queries = 0

        def score(self, kv, context):
            made = torch.rand(kv.keys.shape[:3], generator=torch.Generator().manual_seed(context.layer))
            scores[context.layer] = made
            return made

    stack = filled([CommonKV(0.5, layers=2), Quant(2), Tiers(Fixed())], 200, rows=2)
    for part, (one, other) in zip(parts(stack), ((0, 1), (2, 3)), strict=True):
        pooled = Tiers("keydiff").pooled([scores[one][:, :, 2:192], scores[other][:, :, 2:192]])[:, 0, : part.tokens]
        which = classes(part)
        for row in range(2):
            by_class = [pooled[row][which[row] == number] for number in range(5)]
            assert [len(x) for x in by_class] == part.schedule.counts(0, part.tokens)
            for more, less in itertools.pairwise(by_class):
                assert more.min() >= less.max()


def test_nothing_is_dropped_and_bytes_are_those_of_the_plain_stack():
    stack, plain = filled(STAGES, 600, decode=50), filled(STAGES[:2], 600, decode=50)
    assert stack.held == stack.seen == 650
    told = sum(x.nbytes for part in parts(stack) for name, x in part.parts() if name == "classes: classes")
    sealed = [sum(x.nbytes for part in parts(each) for _, x in part.parts()) for each in (stack, plain)]
    assert told == sum(part.tokens * 3 // 8 for part in parts(stack))
    assert abs((sealed[0] - told) / sealed[1] - 1) < 0.1


@settings(max_examples=8)
@given(st.integers(30, 120), st.integers(0, 40), st.integers(1, 30), st.booleans())
def test_a_crop_keeps_the_others(length, decode, remove, fused):
    """Tokens that stay sealed are those from before, bit for bit; those that become raw again are what was read."""
    stack = filled(STAGES, length, decode, rows=2, fused=fused)
    before = [[stack.read(layer, row) for row in range(2)] for layer in range(4)]
    before = [[(kv.keys.clone(), kv.values.clone()) for kv in rows] for rows in before]
    stack.crop(-remove)
    left = stack.seen
    assert left == stack.held == length + decode - remove
    for layer, rows in enumerate(before):
        for row, (keys, values) in enumerate(rows):
            kv = stack.read(layer, row)
            torch.testing.assert_close(kv.keys, keys[:, :, :left], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(kv.values, values[:, :, :left], atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        model()(tiny.tokens(2, 70, seed=5), past_key_values=stack)
    assert stack.held == stack.seen == left + 70
    for part in parts(stack):
        assert bool(part.schedule.fit(classes(part))[-1])


@given(st.data())
@settings(max_examples=5)
def test_rows_go_their_own_way(data):
    stack = filled(STAGES, 90, 20, rows=3)
    index = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    before = [[stack.read(layer, row).keys.clone() for row in range(3)] for layer in range(4)]
    stack.batch_select_indices(torch.tensor(index))
    for layer in range(4):
        for row, old in enumerate(index):
            assert torch.equal(stack.read(layer, row).keys, before[layer][old])


@pytest.mark.parametrize("stages", [STAGES, QUERIES], ids=["keydiff", "snapkv"])
def test_one_query_reads_what_several_read(stages):
    """From latents, and from keys that are decoded in the order of positions."""
    stacks = [filled(stages, 150, 20, rows=2, fused=fused) for fused in (True, False)]
    with torch.no_grad():
        one, other = (model()(tiny.tokens(2, 1, seed=3), past_key_values=stack).logits for stack in stacks)
    torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_padding_changes_nothing():
    ids, mask = tiny.left_padded([150, 97], seed=7)
    both = KVStack(QUERIES, model=model(), **SETTINGS)
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp_min(0)
        model()(ids, attention_mask=mask, past_key_values=both, position_ids=places)
        alone = KVStack(QUERIES, model=model(), **SETTINGS)
        model()(ids[1:, -97:], past_key_values=alone)
    for layer in range(4):
        torch.testing.assert_close(both.read(layer, 1).keys, alone.read(layer, 0).keys, atol=1e-5, rtol=1e-5)


# ---- files


def test_a_file_goes_on_where_it_stopped(tmp_path):
    stack = filled(STAGES, 100, 30, rows=2)
    stack.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model())
    for layer in range(4):
        for row in range(2):
            assert torch.equal(again.read(layer, row).keys, stack.read(layer, row).keys)
    with torch.no_grad():
        one, other = (model()(tiny.tokens(2, 40, seed=3), past_key_values=x).logits for x in (stack, again))
    assert torch.equal(one, other)
    assert again.nbytes == stack.nbytes


def test_a_file_with_other_classes_is_refused(tmp_path):
    stack = filled(STAGES, 100)
    held = parts(stack)[0].packed["classes"].parts["classes"]
    held.copy_(torch.zeros_like(held))
    stack.save(tmp_path / "cache")
    with pytest.raises(UseError, match=r"classes of tokens .* are not as many"):
        KVStack.load(tmp_path / "cache", model=model())


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"shares": (1.0,), "weights": (1.0,)}, "1 classes. Use 2 to 8"),
        ({"shares": (0.5, 0.4), "weights": (2, 1)}, "the shares are 0.9 in all"),
        ({"shares": (0.5, 0.5), "weights": (1, 2)}, "the most important class comes first"),
        ({"shares": (0.5, 0.5)}, "2 shares and 5 weights"),
        ({"shares": (0.5, 0.5), "weights": (1, 0)}, "weights is a tuple of numbers above 0"),
        ({"pool": "sum"}, "'sum' is not a way to pool"),
    ],
)
def test_settings_that_make_no_classes(settings, problem):
    with pytest.raises(StageError, match=problem):
        Tiers(**settings)


@pytest.mark.parametrize("stages", [[Tiers()], [Quant(2), Tiers()], [CommonKV(), Tiers()]])
def test_a_stack_that_cannot_spend_bits(stages):
    with pytest.raises(StageError, match="this stack has no"):
        KVStack(stages)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([Pairs(), Quant(2)], "must know the energy of its channels"),
        ([CommonKV(layers=2), Quant(4, codec="nf4")], "spend bits unevenly"),
        ([CommonKV(layers=2, basis="weights"), Quant(2)], "must know the energy"),
        ([CommonKV(layers=2, unmerged=0.4), Quant(2)], "Use unmerged=0"),
    ],
)
def test_latents_that_cannot_be_told_apart(stages, problem):
    with pytest.raises(BindError, match=problem):
        KVStack([*stages, Tiers()], model=model())


def test_what_encoders_of_all_classes_know_is_counted():
    stack = filled(STAGES, 90)
    codecs = stack.binding.plan.codecs
    lower = [x for codec in codecs for each in codec.lower.values() for one in each for x in one.tensors]
    first = [x for codec in codecs for one in codec.encoders.values() for x in one.tensors]
    whole = [x for codec in codecs for x in codec.tensors]
    tensors = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*lower, *first, *whole)}
    assert lower
    assert stack.model_nbytes == sum(tensors.values())
