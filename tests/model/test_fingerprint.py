"""Fingerprints are of the weights, wherever they are kept, and looking at them changes nothing."""

import pytest
import torch

from kvstack import CommonKV, KVStack
from kvstack.errors import BindError
from kvstack.model.fingerprint import fingerprint, weights
from kvstack.testing import tiny_model
from tests import tiny


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_weights_are_those_of_the_state(name):
    model = tiny.model(name)
    state, ours = model.state_dict(), weights(model)
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], x) for name, x in ours.items())


def test_the_state_is_not_asked(monkeypatch):
    """With 4-bit weights of bitsandbytes, asking for it unpacks them in place on some processors."""
    model = tiny_model()
    expected = fingerprint(model)
    monkeypatch.setattr(type(model), "state_dict", lambda *a, **k: pytest.fail("state_dict was called"))
    assert fingerprint(model) == expected


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model(), tiny.tokens(1, 200)
    expected = fingerprint(model)
    plain = KVStack([CommonKV()], model=model)
    model(ids, past_key_values=plain)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert fingerprint(model) == expected
    stack = KVStack([CommonKV()])
    model(ids, past_key_values=stack)
    new = tiny.tokens(1, 1)
    torch.testing.assert_close(model(new, past_key_values=stack).logits, model(new, past_key_values=plain).logits)


def test_weights_that_are_nowhere():
    with pytest.raises(BindError, match=r"is on the meta device\. Load the model's weights\."):
        fingerprint(tiny_model().to("meta"))
