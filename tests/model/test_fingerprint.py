"""Fingerprints are of the weights, wherever they are kept, and looking at them changes nothing."""

import pytest
import torch

from kvstack import CalibrationError, CommonKV, KVStack, Quant, calibrate
from kvstack.errors import BindError
from kvstack.model.fingerprint import fingerprint, kv_fingerprint, weights
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


def test_weights_of_4_bits_that_the_processor_has_repacked():
    """bitsandbytes does so in place at the first forward, where AVX512 has products of bfloat16."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pack = bitsandbytes.functional._convert_weight_packed_for_cpu
    linear = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False)
    linear.load_state_dict({"weight": torch.randn(64, 128)})
    linear = linear.to("cpu")
    (before,) = [x.clone() for x in weights(torch.nn.Sequential(linear)).values()]
    linear.weight.data, linear.weight.quant_state = pack(linear.weight.data, linear.weight.quant_state)
    packed = linear.weight.data.clone()
    (after,) = weights(torch.nn.Sequential(linear)).values()
    assert torch.equal(before, after)
    assert torch.equal(linear.weight.data, packed)
    assert linear.weight.quant_state.packing_format_for_cpu


# ---- with and without the head


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_head_decides_no_keys_and_values(name):
    model = tiny.model(name)
    assert kv_fingerprint(model) == kv_fingerprint(model.base_model)
    assert kv_fingerprint(model) != kv_fingerprint(tiny.model(name, vocab_size=96))


def test_a_cache_filled_through_the_inner_model(tmp_path):
    """To save the logits: it is fitted to the causal model that holds it, and is one cache for both."""
    model, ids, new = tiny_model(intermediate_size=80), tiny.tokens(1, 150), tiny.tokens(1, 1)
    stages = [CommonKV(0.5), Quant(4)]
    stack, expected = KVStack(stages), KVStack(stages, model=model)
    model.model(ids, past_key_values=stack)
    assert stack.binding.model is model
    model(ids, past_key_values=expected)
    stack.save(tmp_path / "cache")
    for again in (KVStack.load(tmp_path / "cache", model=which) for which in (model, model.model)):
        assert again.nbytes == stack.nbytes
        wanted = model(new, past_key_values=KVStack.load(tmp_path / "cache", model=model)).logits
        assert torch.equal(model(new, past_key_values=again).logits, wanted)
    assert torch.equal(model(new, past_key_values=stack).logits, model(new, past_key_values=expected).logits)
    assert stack.bind(model.model) is stack


def test_calibrations_serve_the_inner_model():
    model, ids = tiny_model(intermediate_size=80), tiny.tokens(1, 100)
    given = calibrate(model, tokens=400)
    for stage in (CommonKV(), CommonKV(calibration=given), CommonKV(basis="weights")):
        KVStack([stage], model=model)
        stack = KVStack([stage], model=model.model)
        model.model(ids, past_key_values=stack)
        assert stack.seen == 100


def test_stacks_of_the_inner_and_of_the_whole_model_share_their_hooks():
    model, ids = tiny_model(), tiny.tokens(1, 60)
    stacks = [KVStack([Quant(4)], model=which) for which in (model, model.model)]
    (pre, post), *others = {
        (len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules() if hasattr(m, "layer_idx")
    } - {(0, 0)}
    assert (pre, post, others) == (1, 1, [])
    logits = [model(ids, past_key_values=stack).logits for stack in stacks]
    assert torch.equal(*logits)


def test_an_inner_model_alone_is_refused():
    from transformers import LlamaModel

    model = LlamaModel(tiny_model(intermediate_size=84).config).eval()
    with pytest.raises(CalibrationError, match=r"predicts no tokens.* Pass the causal model it is part of"):
        model(tiny.tokens(1, 60), past_key_values=KVStack([CommonKV()]))
