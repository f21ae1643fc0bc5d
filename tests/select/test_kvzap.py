"""KVzap: a regression to the attention that a token gets when the text is repeated, against plain loops."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvstack import CalibrationError, Context, Evict, KVStack, KVzap, StageError
from kvstack.calibration import keep
from kvstack.calibration.by_layer import ByLayer
from kvstack.calibration.listening import listening
from kvstack.model.layers import LayerGroups
from kvstack.select import kvzap
from kvstack.types import KV
from tests import tiny

SETTINGS = {"sinks": 2, "window": 8}


def largest_attention(model, ids):
    """(layers, kv heads, T): the largest attention of each token from any query of a second reading, one by one."""
    t = ids.shape[1]
    layers = model(torch.cat([ids, ids], dim=1), output_attentions=True).attentions
    found = torch.zeros(len(layers), 2, t)
    for layer, weights in enumerate(layers):
        for head, rows in enumerate(weights[0].tolist()):
            for row in rows[t:]:
                for token in range(t):
                    found[layer, head // 2, token] = max(float(found[layer, head // 2, token]), row[token])
    return found


def test_what_is_guessed():
    """Targets are those of plain loops, features the plain key and value, and sums those of each token by itself."""
    model = tiny.model("llama", "eager")
    ids, groups = tiny.tokens(1, 80), LayerGroups(model, 1)
    with listening(model, groups.full) as read:
        found = kvzap.find(read, [ids], groups)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    goal = largest_attention(model, ids)
    for layer in range(4):
        keys = groups.unrotated(layer, cache.layers[layer].keys)
        x = kvzap.features(keys, cache.layers[layer].values)[0, :, 4:].double()
        y = (goal[layer, :, 4:].double() + kvzap.FLOOR).log()
        for head in range(2):
            centred, mean = x[head] - x[head].mean(0), x[head].mean(0)
            # ridge as a plain least-squares problem: one more row for each feature
            rows = torch.cat([centred, torch.diag((kvzap.RIDGE * centred.square().sum(0)).sqrt())]).numpy()
            aim = np.concatenate([(y[head] - y[head].mean()).numpy(), np.zeros(x.shape[-1])])
            weight = torch.from_numpy(np.linalg.lstsq(rows, aim, rcond=None)[0])
            bias = y[head].mean() - mean @ weight
            torch.testing.assert_close(found[layer]["weight"][head].double(), weight, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(found[layer]["bias"][head].double(), bias, atol=2e-2, rtol=2e-3)


def test_a_token_is_guessed_by_itself():
    """So the same tokens are worth the same in a prompt, while decoding, and when others are gone."""
    model = tiny.model()
    ranking = KVzap().bind(model, range(4))
    kv = KV(tiny.numbers(0, 2, 2, 20, 16), tiny.numbers(1, 2, 2, 20, 16))
    positions = torch.arange(20)[None, None]
    whole = ranking.score(kv, Context(1, 20, positions))
    for token in range(20):
        one = torch.full((1, 1, 1), token)
        alone = ranking.score(kv.take(one), Context(1, 50, one))
        torch.testing.assert_close(alone, whole[:, :, token : token + 1])


def test_positions_do_not_matter():
    """Keys are compared without rotary embedding: a text further on is worth the same."""
    model, ids = tiny.model(), tiny.tokens(1, 60)
    stacks = [KVStack([Evict(0.4, "kvzap", layers=1)], model=model, **SETTINGS) for _ in range(2)]
    for stack, first in zip(stacks, (0, 1000), strict=True):
        model(ids, past_key_values=stack, position_ids=torch.arange(first, first + 60)[None])
    for layer in range(4):
        assert torch.equal(*(stack.positions(layer) for stack in stacks))


def test_it_is_made_once_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setattr(keep, "folder", lambda: tmp_path)
    model, other = tiny.model("llama"), tiny.model("qwen3")
    keep.forget(model)
    first = KVzap().bind(model, range(4))
    (path,) = tmp_path.glob("*.safetensors")
    keep.forget(model)
    monkeypatch.setattr(kvzap, "find", None)
    again = KVzap().bind(model, range(4))
    assert again.found is not first.found
    for one, two in zip(first.tensors, again.tensors, strict=True):
        assert torch.equal(one, two)
    with pytest.raises(CalibrationError, match=r"not for KVzap\(\) and this Qwen3ForCausalLM"):
        ByLayer.load(path, other, "KVzap()", {i: {"weight": (2, 36), "bias": (2,)} for i in range(4)})
    keep.forget(model)


@pytest.mark.parametrize(
    "size", [{"weight": (2, 35), "bias": (2,)}, {"weight": (2, 36)}, {"weight": (2, 36), "bias": (1,)}]
)
def test_a_file_of_other_sizes_is_refused(size, monkeypatch, tmp_path):
    model = tiny.model()
    KVzap().bind(model, range(4)).found.save(tmp_path / "file")
    with pytest.raises(CalibrationError, match="is damaged"):
        ByLayer.load(tmp_path / "file", model, "KVzap()", dict.fromkeys(range(4), size))


def test_bytes_of_the_regression_are_counted():
    model = tiny.model()
    stack = KVStack([Evict(0.4, "kvzap")], model=model)
    assert stack.model_nbytes == sum(x.numel() * x.element_size() for x in stack.binding.plan.ranking.tensors) > 0


def test_a_caller_without_a_model_is_refused():
    kv = torch.zeros(1, 2, 8, 16)
    with pytest.raises(Exception, match="does not know its model"):
        KVStack([Evict(0.4, "kvzap")]).update(kv, kv, 0)


def test_the_newest_queries_are_asked_too():
    """Sum of the guess and of the logarithm of the largest attention, smoothed: against plain loops."""
    model = tiny.model("llama", "eager")
    ids = tiny.tokens(1, 40)
    stack = KVStack([Evict(1.0, KVzap(window=6, kernel=3), layers=1)], model=model, **SETTINGS)
    stack.activate_past_recording()  # queries are known until the forward is settled
    model(ids, past_key_values=stack)
    layers = model(ids, output_attentions=True).attentions
    ranking = KVzap().bind(model, range(4))
    for layer, store in enumerate(stack.batch.stores):
        found = store._scores(0, 40, 16**-0.5, stack._work)  # of the tokens between sinks and window
        kv, rope = stack.read(layer), stack.binding.ropes[layer]
        guess = ranking.score(kv, Context(layer, 40, torch.arange(40)[None, None], rope=rope))
        for head in range(2):
            most = [
                max(float(layers[layer][0, h, q, t]) for h in (2 * head, 2 * head + 1) for q in range(34, 40))
                for t in range(40)
            ]
            for t in range(2, 32):
                expected = guess[0, head, t] + np.log(max(most[max(0, t - 1) : t + 2]) + kvzap.FLOOR)
                assert float(found[0, head, t - 2]) == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("settings", [{"window": -1}, {"window": True}, {"kernel": 4}, {"kernel": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(StageError, match="KVzap"):
        KVzap(**settings)
