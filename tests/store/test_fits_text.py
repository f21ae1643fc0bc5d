"""A transform that is fitted to the text: what it fitted is counted, moved, saved and forgotten with the tokens."""

import copy
from importlib.metadata import EntryPoint

import pytest
import torch

from kvstack import Evict, KVStack, Latent, Quant, StageError, registry
from kvstack.authoring import NeedsHidden
from kvstack.testing import check_stage, tiny_model
from tests.stages import Centred, CentredCodec

SETTINGS = {"sinks": 2, "window": 8, "block": 8}
FLOAT = 4


def tokens(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def filled(stages, model, rows=2, length=90):
    stack = KVStack(stages, model=model, **SETTINGS)
    model(tokens(rows, length), past_key_values=stack)
    return stack


def bases(stack):
    stores = stack.batch.cohorts[0].stores
    return [x for store in stores for part in store.sealed for x in part.fitted.values()]


@pytest.mark.parametrize("far", [1e9, 0.0], ids=["fitted once", "fitted anew at every block"])
def test_contract(far):
    check_stage(Centred(far=far))


@pytest.mark.parametrize("far", [1e9, 0.0])
def test_loses_nothing(far):
    model, plain = tiny_model(), KVStack()
    stack = KVStack([Centred(far=far)], **SETTINGS)
    for length in (90, 1, 1, 30, 12, 1):  # prompt, new tokens, further turns
        ids = tokens(2, length, seed=length)
        found, expected = (model(ids, past_key_values=cache).logits for cache in (stack, plain))
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_bytes_are_counted_and_paid_for():
    stack = filled([Centred(), Quant(8, group=8)], tiny_model())
    # a mean of keys and values, 2 * 16 channels, of 2 heads, 4 layers and 2 rows
    expected = 2 * 16 * 2 * 4 * 2 * FLOAT
    assert [part.nbytes for part in stack.report().parts if part.part == "bases"] == [expected]
    assert stack.nbytes == sum(part.nbytes for part in stack.report().parts)
    assert stack.model_nbytes == 0


def test_it_is_fitted_to_the_first_block_that_is_sealed():
    model = tiny_model()
    stack = filled([Centred()], model)
    first = [x.clone() for x in bases(stack)]
    model(tokens(2, 40, seed=1), past_key_values=stack)
    assert stack.batch.cohorts[0].stores[0].sealed_tokens == 90 + 40 - 10
    assert all(map(torch.equal, bases(stack), first))


def test_it_is_fitted_anew_to_all_tokens():
    model = tiny_model()
    stack = filled([Centred(far=0.0)], model)
    model(tokens(2, 40, seed=1), past_key_values=stack)
    values = torch.cat([stack.read(0, row).values[:, :, 2:-8] for row in (0, 1)])
    torch.testing.assert_close(bases(stack)[0][..., 16:], values.mean(2, keepdim=True))


class PatientCodec(CentredCodec):
    """Says how many tokens it wants to see before it is fitted, and how many of those it is fitted to were decoded."""

    def min_tokens(self, group):
        assert [kv.keys.shape[1:2] + kv.keys.shape[3:] for kv in group] == [(2, 16)] * 2
        return 30

    def fit(self, group, decoded=0):
        fitted = super().fit(group)
        return self.with_fitted({**fitted.fitted, "decoded": torch.full((2, 1), float(decoded))})


class Patient(Centred):
    def codec(self):
        return PatientCodec(self)


@pytest.mark.parametrize(("encode", "first"), [([], 30), ([Quant(8, group=8)], 32)])
def test_a_first_block_that_is_too_short_stays_raw(encode, first):
    model = tiny_model()
    stack = filled([Patient(), *encode], model, length=SETTINGS["sinks"] + SETTINGS["window"] + first - 1)
    store = stack.batch.cohorts[0].stores[0]
    assert store.sealed_tokens == 0
    model(tokens(2, 1), past_key_values=stack)
    assert store.sealed_tokens == first
    model(tokens(2, 8), past_key_values=stack)
    assert store.sealed_tokens == first + 8, "later blocks may be as short as ever"
    stack.crop(-8 - SETTINGS["window"] - first)
    model(tokens(2, 20), past_key_values=stack)
    assert store.sealed_tokens == 0, "a text cut back to nothing that is sealed begins again"


def test_a_cut_does_not_seal_less_than_the_first_block():
    model = tiny_model()
    stack = filled([Patient(), Evict(29)], model, length=200)
    assert stack.batch.cohorts[0].stores[0].sealed_tokens == 0
    assert stack.held <= 29 + 10
    other = filled([Patient(), Evict(40)], model, length=200)
    assert other.batch.cohorts[0].stores[0].sealed_tokens >= 30


def test_a_new_fit_is_told_how_many_tokens_are_decoded():
    model = tiny_model()
    stack = filled([Patient(far=0.0)], model, length=90)
    part = stack.batch.cohorts[0].stores[0].sealed[0]
    assert float(part.fitted["decoded"][0]) == 0
    model(tokens(2, 40, seed=1), past_key_values=stack)
    assert float(part.fitted["decoded"][0]) == 80


def test_once_leaves_later_tokens_raw():
    model = tiny_model()
    stack = filled([Centred(once=True), Quant(2, group=8)], model)
    model(tokens(2, 40, seed=1), past_key_values=stack)
    store = stack.batch.cohorts[0].stores[0]
    assert (store.sealed_tokens, store.raw_tokens) == (80, 50)
    stack.crop(-125)
    model(tokens(2, 60, seed=1), past_key_values=stack)
    assert store.sealed_tokens == 48, "a text cut back to nothing that is sealed begins again"


def test_a_budget_holds_where_later_tokens_stay_raw():
    model = tiny_model()
    stack = filled([Centred(once=True), Quant(2, group=8), Evict(32)], model)
    for seed in range(60):
        model(tokens(2, 1, seed), past_key_values=stack)
        assert stack.held <= 32 + 10


STACKS = {"alone": [Centred(far=0.5)], "quant, evict": [Centred(far=0.5), Quant(8, group=8), Evict(0.5)]}


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
def test_rows_take_theirs_with_them(stages):
    stack = filled(stages, tiny_model(), rows=3)
    before = [stack.read(2, row).keys for row in range(3)]
    stack.reorder_cache(torch.tensor([2, 0, 1]))
    assert all(torch.equal(stack.read(2, row).keys, before[old]) for row, old in enumerate([2, 0, 1]))
    stack.batch_repeat_interleave(2)
    assert all(torch.equal(stack.read(2, row).keys, before[old]) for row, old in enumerate([2, 2, 0, 0, 1, 1]))
    stack.batch_select_indices(torch.tensor([3]))
    assert torch.equal(stack.read(2).keys, before[0])
    assert all(len(x) == 1 for x in bases(stack))


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
def test_a_saved_cache_and_a_copy_go_on_alike(stages, tmp_path, monkeypatch):
    model = tiny_model()
    stack = filled(stages, model)
    entry = EntryPoint("centred", "tests.stages:Centred", "kvstack.stages")
    monkeypatch.setitem(registry.BUILT_IN["stages"], "centred", entry)
    stack.save(tmp_path / "cache.safetensors")
    others = [KVStack.load(tmp_path / "cache.safetensors", model=model), copy.deepcopy(stack)]
    for seed, length in enumerate((1, 30, 1, 1)):
        ids = tokens(2, length, seed)
        expected = model(ids, past_key_values=stack).logits
        assert all(torch.equal(model(ids, past_key_values=other).logits, expected) for other in others)


def test_a_copy_shares_nothing():
    model = tiny_model()
    stack = filled([Centred(far=0.0)], model)
    before = [x.clone() for x in bases(stack)]
    model(tokens(2, 40, seed=1), past_key_values=copy.deepcopy(stack))
    assert all(map(torch.equal, bases(stack), before))


def test_crop_and_reset_forget_it_with_the_last_sealed_token():
    model = tiny_model()
    stack = filled([Centred()], model)
    stack.crop(-40)
    assert len(bases(stack)) == 4
    stack.crop(-48)
    assert stack.batch.cohorts[0].stores[0].sealed_tokens == 0
    assert bases(stack) == []
    fresh = KVStack([Centred()], model=model, **SETTINGS)
    model(tokens(2, 2), past_key_values=fresh)
    for cache in (stack, fresh):
        model(tokens(2, 60, seed=3), past_key_values=cache)
    torch.testing.assert_close(bases(stack)[0], bases(fresh)[0])
    stack.reset()
    assert bases(stack) == []


class NarrowCodec(CentredCodec):
    """Its latents have as many channels as it was fitted to tokens."""

    def forward(self, group):
        width = int(self.fitted["width"][0])
        return super().forward(group) | {"width": Latent(torch.zeros(len(group[0].keys), 1, group[0].tokens, width))}

    def fit(self, group, decoded=0):
        width = torch.full((len(group[0].keys), 1), float(group[0].tokens))
        return self.with_fitted({**super().fit(group).fitted, "width": width})

    def needs_refit(self, group):
        return False


class Narrow(Centred):
    def codec(self):
        return NarrowCodec(self)


def test_codes_of_dropped_tokens_are_forgotten_with_the_fit():
    """The second turn drops all that is sealed: what is fitted next has another width."""
    model = tiny_model()
    stack = filled([Narrow(), Evict(0.3, "streaming")], model, rows=1, length=60)
    store = stack.batch.cohorts[0].stores[0]
    first = store.sealed_tokens
    assert store.packed[0, "width"].width == first > 0
    model(tokens(1, 120, seed=1), past_key_values=stack)
    assert store.packed[0, "width"].width == store.sealed_tokens > first


def test_hidden_states_of_compressed_tokens_are_gone():
    class AsksCodec(NeedsHidden, CentredCodec):
        pass

    class Asks(Centred):
        def codec(self):
            return AsksCodec(self)

    with pytest.raises(
        StageError, match=r"Asks\(\): it wants hidden states and may be fitted again, .* Leave out hidden"
    ):
        KVStack([Asks()], model=tiny_model())
