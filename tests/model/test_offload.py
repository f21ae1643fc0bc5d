"""Models whose weights lie elsewhere between forwards, or whose layers lie on several devices: accelerate's hooks bring
them, and everything that looks at a model finds them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvstack import KVStack, calibrate
from kvstack.calibration import keep
from kvstack.model.fingerprint import fingerprint
from kvstack.testing import tiny_model
from tests import tiny

accelerate = pytest.importorskip("accelerate")

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
"""Where each part of a model is kept."""
SPECS = [
    "quant:2",
    "quant:4+evict:0.3",
    "evict:0.2,score=expected",
    "commonkv+quant:4",
    "commonkv:0.5,basis=weights",
    "commonkv:0.5,basis=weights,merge=mean+quant:4",
    "commonkv:0.5,unmerged=0.2",
]
PLUGINS = {"kvstack_xkv": "xkv:keep=0.5", "kvstack_kvsharer": "kvsharer:0.5,threshold=-1.0", "kvstack_kvtc": "kvtc"}


def on_cpu(folder):
    model = tiny_model()
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    return model


def on_disk(folder):
    model = tiny_model()
    accelerate.disk_offload(model, folder, execution_device="cpu", offload_buffers=True)
    return model


def mapped(places):
    def load(folder):
        tiny_model().save_pretrained(folder / "model")
        return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder).eval()

    return load


PLACES = {"cpu": on_cpu, "disk": on_disk, "one device": mapped({"": "cpu"}), "device_map": mapped(SPLIT)}


@pytest.fixture(scope="module", params=PLACES)
def model(request, tmp_path_factory):
    return PLACES[request.param](tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def whole():
    """The same model, all of it in memory."""
    return tiny_model()


def generated(model, spec):
    keep.forget(model)  # so that each model looks for itself
    stack = KVStack.from_spec(spec)
    ids = tiny.tokens(1, 300)
    return model.generate(ids, past_key_values=stack, max_new_tokens=12, do_sample=False), stack


@pytest.mark.parametrize("spec", SPECS + list(PLUGINS.values()))
def test_answers_are_those_of_the_model_in_memory(model, whole, spec):
    for module, known in PLUGINS.items():
        if known == spec:
            pytest.importorskip(module)
    (out, stack), (expected, plain) = generated(model, spec), generated(whole, spec)
    assert torch.equal(out, expected)
    assert stack.nbytes == plain.nbytes
    assert stack.report().reads_with == plain.report().reads_with


def test_the_fingerprint_is_that_of_the_model_in_memory(model, whole):
    assert fingerprint(model) == fingerprint(whole)


def test_a_calibration_is_that_of_the_model_in_memory(model, whole):
    one, other = (calibrate(m, tokens=300, layers=2) for m in (model, whole))
    assert one.fingerprint == other.fingerprint


def test_a_cache_goes_from_memory_to_an_offloaded_model(model, whole, tmp_path):
    _, stack = generated(whole, "quant:4+evict:0.3")
    stack.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model)
    new = tiny.tokens(1, 3, seed=1)
    logits = [m(new, past_key_values=cache).logits for m, cache in ((whole, stack), (model, again))]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("spec", ["commonkv", "commonkv:0.5,basis=weights"])
def test_weights_are_left_as_they_were(model, spec):
    def state():
        places = {name: (x.device, x.requires_grad) for name, x in model.named_parameters()}
        return places, {name: x.device for name, x in model.named_buffers()}

    before = copy.deepcopy(state())
    generated(model, spec)
    assert state() == before


# ---- several devices

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ONE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPUS = {
    "two": pytest.param({name: int(i >= len(SPLIT) // 2) for i, name in enumerate(SPLIT)}, marks=TWO, id="two GPUs"),
    "one": pytest.param({name: 0 if i % 2 else "cpu" for i, name in enumerate(SPLIT)}, marks=ONE, id="GPU and memory"),
}


@pytest.mark.parametrize("places", GPUS.values())
@pytest.mark.parametrize("spec", SPECS)
def test_layers_on_several_devices(tmp_path, whole, places, spec):
    model = mapped(places)(tmp_path)
    stack, plain = KVStack.from_spec(spec), KVStack.from_spec(spec)
    ids = tiny.tokens(1, 300)
    # accelerate moves the tokens: the device of a model whose first weights are offloaded is none
    answers = [m(ids, past_key_values=cache).logits for m, cache in ((model, stack), (whole, plain))]
    torch.testing.assert_close(answers[0].cpu(), answers[1], atol=1e-3, rtol=1e-3)
    for layer in stack.compressed_layers:
        assert stack.read(layer).keys.device == stack.binding.device_of(layer)
        assert torch.equal(stack.positions(layer).cpu(), plain.positions(layer))
