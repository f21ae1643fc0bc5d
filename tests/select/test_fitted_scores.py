"""What holds for every score that is fitted to a model."""

import copy

import pytest
import torch

from kvstack import BindError, CalibrationError, Evict, KVStack, Quant, registry
from kvstack.spec import make_score
from tests import tiny

FITTED = [name for name in registry.BUILT_IN["scores"] if make_score(name).is_fitted]
SETTINGS = {"sinks": 2, "window": 8}


def test_there_are_some():
    assert FITTED == ["kvzap", "triattention"]


@pytest.mark.parametrize("name", FITTED)
def test_latents_are_refused(name):
    with pytest.raises(BindError, match=r'caches latents in their place \(layer 0\). Use score="snapkv"'):
        KVStack([Evict(0.4, name)], model=tiny.model("deepseek_v3"))


@pytest.mark.parametrize("name", FITTED)
def test_weights_that_are_not_finite_are_refused(name):
    model = copy.deepcopy(tiny.model())
    model.model.layers[2].self_attn.q_proj.weight.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"layer 2 are not finite|predicts NaN"):
        KVStack([Evict(0.4, name)], model=model)


@pytest.mark.parametrize("name", FITTED)
def test_a_running_model_is_calibrated_and_left_as_it_was(name):
    """A stack that nobody bound calibrates itself in the middle of the first forward."""
    model, ids = copy.deepcopy(tiny.model()), tiny.tokens(2, 60)
    before = set(vars(model.model.layers[0].self_attn))
    stack, bound = KVStack([Evict(0.4, name)], **SETTINGS), KVStack([Evict(0.4, name)], model=model, **SETTINGS)
    found = [model(ids, past_key_values=cache).logits for cache in (stack, bound)]
    assert torch.equal(*found)
    for layer in range(4):
        assert torch.equal(stack.positions(layer), bound.positions(layer))
    stack.unbind()
    bound.unbind()
    assert set(vars(model.model.layers[0].self_attn)) == before


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("stages", [[], [Quant(8, group=8)]], ids=str)
def test_a_cache_that_was_saved_goes_on(name, stages, tmp_path):
    model, ids = tiny.model(), tiny.tokens(1, 90)
    stack = KVStack([Evict(0.4, name), *stages], model=model, **SETTINGS)
    model(ids[:, :50], past_key_values=stack)
    stack.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model)
    for part in ids[:, 50:].split(10, dim=1):
        one, other = (model(part, past_key_values=cache).logits for cache in (stack, again))
        assert torch.equal(one, other)
    assert again.held == stack.held < 60


@pytest.mark.parametrize("name", FITTED)
def test_a_padded_row_is_the_row_alone(name):
    model = tiny.model()
    ids, mask = tiny.left_padded([70, 50])
    stack, alone = (KVStack([Evict(0.4, name)], model=model, **SETTINGS) for _ in range(2))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)  # as generate counts them
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=stack)
    model(ids[1:, 20:], past_key_values=alone)
    for layer in range(4):
        assert torch.equal(stack.positions(layer, row=1), alone.positions(layer))


def test_several_processes_need_a_calibration_that_is_there(monkeypatch, tmp_path):
    """One that is split among processes is not read by one of them alone."""
    from kvstack.calibration import of_score
    from kvstack.heads import Heads

    monkeypatch.setattr(of_score, "heads_of", lambda model: Heads(0, 2))
    monkeypatch.setattr(of_score.keep, "folder", lambda: tmp_path)
    model = copy.deepcopy(tiny.model())
    with pytest.raises(
        CalibrationError, match=r"is split among 2 processes.*Make it there in one process, with the same stages"
    ):
        make_score("kvzap").bind(model, range(4))
