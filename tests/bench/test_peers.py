"""What kvstack is compared with. kvpress itself runs only where `make peers` has built its environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from kvstack.bench.peers import caches, kvpress
from kvstack.bench.peers.caches import tensors_in
from kvstack.bench.peers.kvpress import KvPress, Press
from kvstack.bench.peers.spec import parse
from kvstack.errors import KVStackError, SpecError
from kvstack.packed import storage_bytes
from tests import tiny

T = 256
"""Tokens of the texts below: those that turboquant needs for its first block."""


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny.model("llama", head_dim=32)


def ids(tokens: int = T) -> torch.Tensor:
    return tiny.tokens(1, tokens)


def held(model: LlamaForCausalLM, spec: str) -> int:
    """Bytes of the first layer after a prefill of T tokens."""
    cache = parse(spec).make(model)
    model(input_ids=ids(), past_key_values=cache)
    return storage_bytes(tensors_in(cache.layers[0]))


# ---- spec strings


def test_every_form_is_read():
    assert parse("dense").family == "DynamicCache"
    assert parse("hqq:8").family == parse("quanto:2, group=32").family == "QuantizedCache"
    assert parse("turboquant:3").family == "turboquant"
    assert parse("kvpress:snapkv,keep=0.2,window_size=16").press == Press("snapkv", 0.2, {"window_size": 16})
    assert parse("kvpress:dense").press == Press("dense", 1.0)
    assert [parse(spec).label for spec in ("hqq:4", "kvpress:tova,keep=0.5")] == ["hqq:4", "kvpress:tova,keep=0.5"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gear:4", r"'gear:4' is not a baseline\. There are dense, hqq:BITS, quanto:BITS and turboquant:BITS"),
        ("dense:4", r"dense takes no settings"),
        ("hqq:3", r"'hqq:3': the bits of hqq are one of 2, 4, 8, as in 'hqq:4,group=32'"),
        ("quanto", r"the bits of quanto are one of 2, 4, as"),
        ("quanto:4,axis=0", r"quanto has no setting axis\. It has group"),
        ("hqq:4,group=x", r"'group=x' is not a setting\. Write NAME=VALUE"),
        ("hqq:4,group=0", r"group is a number of values that share a scale, got 0"),
        ("kvpress:h2o,keep=0.2", r"no press 'h2o'\. There are dense, snapkv, expected"),
        ("kvpress:snapkv", r"keep is a share of the tokens above 0 and up to 1, got nothing\. Write keep=0\.2"),
        ("kvpress:snapkv,keep=20", r"up to 1, got 20"),
        ("kvpress:snapkv,keep=0.2,n_sink=4", r"no setting n_sink\. It has keep, window_size, kernel_size"),
    ],
)
def test_what_is_no_peer_is_told_what_is(spec, says):
    with pytest.raises(SpecError, match=says):
        parse(spec)


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert parse("quanto:4").missing() == (
        "the package optimum-quanto is not installed. Run: pip install 'kvstack[peers]'"
    )


def test_a_missing_environment_is_named_with_the_way_to_get_it(monkeypatch, tmp_path):
    peer = parse("kvpress:snapkv,keep=0.2")
    monkeypatch.delenv("KVSTACK_PEERS", raising=False)
    monkeypatch.setattr(kvpress, "PROJECT", tmp_path)
    assert peer.missing() == "kvpress has no environment yet. Run `make peers`."
    monkeypatch.setenv("KVSTACK_PEERS", "/nowhere")
    assert peer.missing() == "KVSTACK_PEERS=/nowhere holds no bin/python. Name the folder that `make peers` made."
    (tmp_path / ".venv-peers" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-peers" / "bin" / "python").touch()
    monkeypatch.delenv("KVSTACK_PEERS")
    assert peer.missing() is None


# ---- bytes, by hand: one layer of 2 heads and 32 channels, keys and values, float32 scales

NUMBERS = 2 * T * 2 * 32


def test_bytes_of_dense(model):
    assert held(model, "dense") == NUMBERS * 4


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (2, 32)])
def test_bytes_of_quantized_caches(model, backend, bits, group):
    spec = f"{backend}:{bits},group={group}"
    if why := parse(spec).missing():
        pytest.skip(why)
    # packed numbers, and a scale and a zero for every group of them
    assert held(model, spec) == NUMBERS * bits // 8 + NUMBERS // group * 2 * 4


def test_bytes_of_turboquant(model):
    if why := parse("turboquant:4").missing():
        pytest.skip(why)
    window, block = 128, 128  # the youngest tokens as they are, and one block of older ones
    numbers = 2 * 2 * 32
    keys, values = 2 * 2 * 32 * 2, 2 * 2 * block * 2  # scale and zero, float16: per channel; per token
    assert held(model, "turboquant:4") == window * numbers * 4 + block * numbers // 2 + keys + values


def test_quanto_needs_no_compiler(model):
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import get_extension

    cache = parse("quanto:4").make(model)
    text = ids()
    model(input_ids=text, past_key_values=cache)
    dequantized = cache.layers[0]._dequantize(cache.layers[0]._quantized_keys)
    dense = caches.dense(model)
    model(input_ids=text, past_key_values=dense)
    # 4 bits: half a step of the widest group at most
    exact = dense.layers[0].keys
    steps = (exact.reshape(-1, 64, 32).amax(1) - exact.reshape(-1, 64, 32).amin(1)) / 15
    assert (dequantized - exact).abs().max() <= steps.max() / 2 * 1.001
    # the extension that would be compiled was never loaded
    assert get_extension("quanto_cpp").lib.__name__ == "Unpacker"


def test_quanto_takes_texts_of_any_length(model):
    """61 tokens are quantized like 64 whose last four are the same."""
    pytest.importorskip("optimum.quanto")
    keys = torch.randn(1, 2, 61, 32)
    filled = torch.cat([keys, keys[..., -1:, :].expand(-1, -1, 3, -1)], dim=-2)
    layer = parse("quanto:4").make(model).layers[0]
    packed, tokens = layer._quantize(keys, axis=-1)
    assert (packed.shape, tokens) == (filled.shape, 61)
    whole = layer._dequantize(layer._quantize(filled, axis=-1))
    assert torch.equal(layer._dequantize((packed, tokens)), whole[..., :61, :])


@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_takes_texts_of_any_length(model, bits):
    """Codes of four or two groups share a byte; a text of an odd number of tokens fills its bytes anyway."""
    pytest.importorskip("hqq")
    keys = torch.randn(1, 1, 61, 32)
    layer = parse(f"hqq:{bits}").make(model).layers[0]
    layer.keys = keys  # what transformers asks for device and dtype
    back = layer._dequantize(layer._quantize(keys, axis=1))
    assert back.shape == keys.shape
    step = (keys.amax() - keys.amin()) / (2**bits - 1)
    assert (back - keys).abs().max() <= step


@pytest.mark.parametrize("spec", ["dense", "hqq:4", "quanto:4", "turboquant:4"])
def test_caches_serve_generate(model, spec):
    if why := parse(spec).missing():
        pytest.skip(why)
    text = ids(300)
    out = model.generate(
        text,
        attention_mask=torch.ones_like(text),
        past_key_values=parse(spec).make(model),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape == (1, 304)


# ---- the protocol, with a worker that is not kvpress

FAKE = """
import json, sys
import torch
from safetensors.torch import save_file
print(json.dumps({"torch": "1", "transformers": "2"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "answer":
        print("the fourth wall fell", file=sys.stderr)
        sys.exit(3)
    if request["context"] == 1:
        reply = {"error": "AssertionError: too short"}
    else:
        save_file({"log_probs": torch.zeros(len(request["ids"]) - request["context"] - 1, 5)}, request["out"])
        reply = {"share": request["press"]["ratio"] if request["press"] else 1.0, "simulated": False}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)
    monkeypatch.setattr(kvpress, "WORKER", worker)
    with KvPress(Path(sys.executable), tmp_path) as peer:
        yield peer


def test_requests_and_replies(fake):
    assert fake.versions == {}  # it has not started yet
    reading = fake.read(ids(20), 10, Press("tova", 0.25))
    assert reading.log_probs.shape == (9, 5)
    assert reading.share == pytest.approx(0.75)
    assert fake.read(ids(20), 10, Press("dense", 1.0)).share == 1
    assert fake.versions == {"torch": "1", "transformers": "2"}


def test_a_failed_request_is_an_error_and_the_next_one_is_served(fake):
    with pytest.raises(KVStackError, match=r"kvpress failed with TOVAPress: AssertionError: too short"):
        fake.read(ids(20), 1, Press("tova", 0.25))
    assert fake.read(ids(20), 10, Press("dense", 1.0)).share == 1


def test_a_dead_worker_is_an_error_with_its_last_words(fake):
    with pytest.raises(KVStackError, match=r"died with code 3. It last said:\nthe fourth wall fell"):
        fake.answer(ids(20), ids(5), 3, Press("dense", 1.0), blind=True)
    # and another one starts
    assert fake.read(ids(20), 10, Press("dense", 1.0)).share == 1


def test_snapkv_looks_from_no_more_than_half_of_what_it_keeps():
    assert Press("snapkv", 0.2).asked(1000)["settings"] == {"window_size": 32}
    assert Press("snapkv", 0.05).asked(500)["settings"] == {"window_size": 12}
    assert Press("snapkv", 0.05, {"window_size": 7}).asked(500)["settings"] == {"window_size": 7}
    assert Press("tova", 0.2).asked(1000)["settings"] == {}


# ---- the real worker


@pytest.fixture
def real(model, tmp_path):
    if why := kvpress.missing():
        pytest.skip(why)
    model.save_pretrained(tmp_path)
    with KvPress(kvpress.find(), tmp_path, threads=1) as peer:
        yield peer


def test_kvpress_reads_and_answers(real, model):
    text, context = ids(150), 100
    dense = model(input_ids=text[:, :-1]).logits[0, context:].log_softmax(-1)
    reading = real.read(text, context, Press("dense", 1.0))
    assert reading.share == 1
    assert not reading.simulated
    torch.testing.assert_close(reading.log_probs, dense, atol=1e-4, rtol=1e-4)

    # the first four tokens and the last sixteen, which a mask can hide as well as a press can drop
    mask = torch.ones(149, 149).tril().bool()
    mask[context:, 4:84] = False
    masked = model(input_ids=text[:, :-1], attention_mask=mask[None, None]).logits[0, context:].log_softmax(-1)
    streaming = real.read(text, context, Press("streaming", 0.2))
    assert streaming.share == pytest.approx(0.2)
    assert not streaming.simulated
    torch.testing.assert_close(streaming.log_probs, masked, atol=1e-4, rtol=1e-4)

    # a press that masks keeps the bytes, and says so
    ada = real.read(text, context, Press("ada-snapkv", 0.2))
    assert ada.share == pytest.approx(0.2)
    assert ada.simulated
    assert not real.read(text, context, Press("random", 0.2)).simulated

    # greedy, with true positions
    greedy = model.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    new = greedy[0, 150:].tolist()
    for blind in (True, False):
        assert real.answer(text[:, :120], text[:, 120:], 5, Press("dense", 1.0), blind).ids == new
    # 24 of the text's 120 tokens, the question's 30, and the answer's but the last, which was never fed
    blind = real.answer(text[:, :120], text[:, 120:], 5, Press("streaming", 0.2), blind=True)
    fed = len(blind.ids) - 1
    assert blind.share == pytest.approx((24 + 30 + fed) / (150 + fed))
