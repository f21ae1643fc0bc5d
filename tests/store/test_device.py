"""Sealed tokens on another device than the model.

Without a GPU, a double stands for that device: tensors that can be stored and moved, and that no arithmetic can read.
"""

import copy
import re
import weakref

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvstack import KVStack, Quant, SpecError, StageError, cache
from kvstack.packed import storage_bytes
from kvstack.report import Report
from tests import tiny

FAR = torch.device("meta")
"""What the other device is called here. No tensor of torch's own is ever made there."""

MOVES = {
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.clone,
    Tensor.contiguous,
    Tensor.expand,
    Tensor.gather,
    Tensor.index_select,
    Tensor.long,
    Tensor.new_empty,
    Tensor.view,
    torch.cat,
}
"""What a store does with tokens that it moves."""
FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "layout", "shape", "nbytes")),
    *(getattr(Tensor, name) for name in ("data_ptr", "dim", "element_size", "is_contiguous", "is_inference", "numel")),
    *(Tensor.size, Tensor.stride, Tensor.untyped_storage),
}


class Far(Tensor):
    """A tensor on the other device."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == Tensor.device.__get__:
            return FAR
        assert function in MOVES | FACTS, f"{function} reads tokens that were not fetched"
        return super().__torch_function__(function, types, args, kwargs)


class Bus(TorchFunctionMode):
    """Moves tensors there and back, and notes what is fetched."""

    def __init__(self):
        super().__init__()
        self.fetched = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.to, Tensor.cpu) and not kwargs:
            x, device = args[0], args[1] if len(args) > 1 else "cpu"
            if device == FAR:
                return x if isinstance(x, Far) else x.clone().as_subclass(Far)
            if isinstance(x, Far) and isinstance(device, str | torch.device):
                return self._fetch(x)
        return function(*args, **(kwargs or {}))

    def _fetch(self, x):
        with torch._C.DisableTorchFunction():
            here = x.as_subclass(Tensor).clone()
        self.fetched.append((here.nbytes, weakref.ref(here)))
        return here

    @property
    def nbytes(self):
        return sum(nbytes for nbytes, _ in self.fetched)

    @property
    def alive(self):
        return sum(nbytes for nbytes, copied in self.fetched if copied() is not None)


SPECS = {
    "codes": "quant:4,group=8",
    "blockwise": "quant:4,codec=nf4",
    "latents": "commonkv:0.5,layers=2+quant:4",
    "exact latents": "commonkv:0.5,layers=2,basis=weights",
    "evicted": "quant:4,group=8+evict:0.5,score=snapkv",
    "evicted latents": "commonkv:0.5,layers=2+quant:4+evict:0.5,score=keydiff",
    "decoded": "quant:4,group=8@fused=False",
    "fitted to the text": "xkv:keep=0.5",
}


@pytest.fixture
def bus(monkeypatch):
    monkeypatch.setattr(cache, "usable", torch.device)
    with Bus() as bus:
        yield bus


def stacks(spec, model):
    """One that stores sealed tokens with the model, and one that stores them on the other device."""
    for device in (None, str(FAR)):
        plain = KVStack.from_spec(spec)
        yield KVStack(plain.stages, model=model, window=8, block=8, device=device, fused=plain.fused)


def decoded(model, stack, tokens=12, seed=9):
    ids = tiny.tokens(stack.batch_size, tokens, seed=seed)
    return [model(token, past_key_values=stack).logits for token in ids.split(1, dim=1)]


def sealed(stack):
    """The parts of what is stored together, of every group."""
    return [part for store in stack.batch.stores for part in store.sealed]


def codes_of(stack):
    return [x for part in sealed(stack) for packed in part.packed.values() for x in packed.parts.values()]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_same_answers_from_there(spec, bus, tmp_path):
    """After everything that moves tokens, too."""
    if spec.startswith("xkv"):
        pytest.importorskip("kvstack_xkv")
    model = tiny.model("llama")
    found = []
    for stack in stacks(spec, model):
        answers = [model(tiny.tokens(2, 180), past_key_values=stack).logits, *decoded(model, stack)]
        for seed, other in enumerate(moved(stack, model, tmp_path)):
            assert other.device == stack.device
            assert {type(x) for x in codes_of(other)} == {Tensor if stack.device is None else Far}
            raw = [x for store in other.batch.stores for raw in store.raw for _, x in raw.parts()]
            assert not any(isinstance(x, Far) for x in raw)
            answers += decoded(model, other, seed=seed)
        found.append(answers)
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)
    assert bus.fetched


def moved(stack, model, folder):
    """Stacks that are made from this one, one after the other, and at last this one."""
    other = copy.deepcopy(stack)
    yield other
    other.batch_select_indices([1, 0, 1])
    yield other
    other.crop(-27)
    yield other
    other.save(folder / "cache.safetensors")
    yield KVStack.load(folder / "cache.safetensors", model=model)
    yield stack


@pytest.mark.parametrize("spec", ["codes", "blockwise", "latents", "exact latents", "decoded"])
@pytest.mark.parametrize("recording", [False, True], ids=["decoding", "assisted"])
def test_a_step_fetches_every_part_once_and_keeps_none(spec, recording, bus, monkeypatch):
    """No more than one group's at a time: nothing of a group is left when the next one is read."""
    model = tiny.model("llama")
    _, stack = stacks(SPECS[spec], model)
    model(tiny.tokens(2, 150), past_key_values=stack)
    decoded(model, stack, tokens=2)
    if recording:
        stack.batch.record()
    most = max(storage_bytes([x for _, x in part.parts()]) for part in sealed(stack))
    whole = storage_bytes([x for part in sealed(stack) for _, x in part.parts()])
    before, fetch = bus.nbytes, Bus._fetch

    def watched(self, x):
        here = fetch(self, x)
        assert self.alive <= most
        return here

    monkeypatch.setattr(Bus, "_fetch", watched)
    decoded(model, stack, tokens=1)
    assert bus.nbytes - before == whole > most
    assert not bus.alive


def test_the_report_says_where_bytes_are(bus):
    model = tiny.model("llama")
    here, there = stacks("quant:4,group=8", model)
    for stack in (here, there):
        model(tiny.tokens(1, 150), past_key_values=stack)
    assert here.report().devices == {"cpu": here.nbytes}
    report = there.report()
    assert report.devices["meta"] == storage_bytes([x for part in sealed(there) for _, x in part.parts()])
    assert sum(report.devices.values()) == report.nbytes == here.nbytes
    assert report.to_dict()["devices"] == report.devices


def test_several_devices_are_named_in_the_table():
    report = Report("a stack", 1, 1, 3 << 20, 4 << 20, [], devices={"cpu": 1 << 20, "cuda:0": 2 << 20})
    assert "1.0 MiB on cpu and 2.0 MiB on cuda:0" in " ".join(str(report).split())
    assert "MiB on" not in str(Report("a stack", 1, 1, 3 << 20, 4 << 20, [], devices={"cpu": 3 << 20}))


# ---- the setting


def test_the_device_of_the_layers_changes_nothing():
    model = tiny.model("llama")
    found = []
    for device in (None, "cpu", torch.device("cpu", 0)):
        stack = KVStack([Quant(4, group=8)], model=model, window=8, device=device)
        found.append([model(tiny.tokens(1, 60), past_key_values=stack).logits, *decoded(model, stack, tokens=3)])
        assert all(packed.home is None for part in sealed(stack) for packed in part.packed.values())
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_it_travels_with_the_stack(tmp_path):
    stack = KVStack([Quant(4)], device="cpu")
    assert repr(stack) == "KVStack([Quant(bits=4)], device='cpu')"
    assert stack.spec == "quant:bits=4@device='cpu'"
    for again in (KVStack.from_spec(stack.spec), KVStack.from_spec(stack.to_dict()), copy.deepcopy(stack)):
        assert again.device == stack.device == torch.device("cpu")
    assert KVStack.from_spec("quant:4@device=cpu").device == stack.device
    assert KVStack.from_spec("quant:4").to_dict()["device"] is None


def test_a_file_says_which_unless_the_reader_does(tmp_path):
    model, path = tiny.model("llama"), tmp_path / "cache.safetensors"
    KVStack([Quant(4)], model=model, device="cpu").save(path)
    assert KVStack.load(path, model=model).device == torch.device("cpu")
    assert KVStack.load(path, model=model, device=None).device is None
    with pytest.raises(StageError, match=r"^KVStack\(device='abacus'\): device 'abacus' cannot be used"):
        KVStack.load(path, model=model, device="abacus")


@pytest.mark.parametrize("device", ["abacus", "", "cuda:99", "meta", 0, True])
def test_other_devices_are_refused(device):
    with pytest.raises(StageError, match=re.escape(f"KVStack(device={device!r}): device {device!r} cannot be used: ")):
        KVStack([Quant(4)], device=device)


def test_a_spec_names_it_as_a_word():
    with pytest.raises(SpecError, match=r"device=0, and device is the name of a device, such as 'cpu'"):
        KVStack.from_spec("quant:4@device=0")
    with pytest.raises(StageError, match=r"Use 'cpu', a GPU of this machine, or None"):
        KVStack.from_spec("quant:4@device=abacus")


# ---- a real one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_model_on_a_gpu_reads_codes_on_the_processor(spec):
    model, found = copy.deepcopy(tiny.model("llama")).to("cuda"), []
    for device in (None, "cpu"):
        stack = KVStack(KVStack.from_spec(spec).stages, model=model, window=8, block=8, device=device)
        ids = tiny.tokens(2, 190).to("cuda")
        found.append([model(x, past_key_values=stack).logits for x in (ids[:, :150], *ids[:, 150:].split(1, dim=1))])
        assert all(x.device.type == (device or "cuda") for x in codes_of(stack))
        assert all(raw.device.type == "cuda" for store in stack.batch.stores for raw in store.raw)
    assert stack.report().devices.keys() == {"cpu", "cuda:0"}
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there)
