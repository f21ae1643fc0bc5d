"""A cache that is saved and loaded goes on as if nothing had happened, and its file is as large as the cache."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from kvstack import CommonKV, Evict, KVStack, Quant, UseError
from kvstack.testing import tiny_model
from tests import tiny

STACKS = {
    "empty": [],
    "quant": [Quant(4, group=8)],
    "h2o": [Evict(0.4, "h2o")],
    "kvzip": [Evict(0.4, "kvzip"), Quant(4, group=8)],
    "refit": [Evict(0.4, refit=True), Quant(4, group=8)],
    "budgets": [Evict(0.4, budgets="heads"), Quant(4, group=8)],
    "places": [Evict(0.4, positions="cache"), Quant(4, group=8)],
    "snapkv": [Evict(0.4), Quant(2, group=8)],
    "commonkv": [CommonKV(0.5, layers=2), Quant(2), Evict(0.5)],
    "mean": [CommonKV(0.5, layers=2, basis="weights", merge="mean")],
}
SETTINGS = {"sinks": 2, "window": 8, "block": 8}


# gemma3 normalises its keys, so it has no merge="mean"
NOT_THERE = {("mean", "gemma3"), ("places", "gemma3")}  # and sliding layers keep their positions
CASES = [(name, kind) for kind in ("llama", "gemma3") for name in STACKS if (name, kind) not in NOT_THERE]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_goes_on_as_if_nothing_had_happened(name, architecture, tmp_path):
    model = tiny.model(architecture)
    stack = KVStack(STACKS[name], model=model, **SETTINGS)
    ids, mask = (
        tiny.left_padded([61, 90]) if architecture == "llama" and name != "empty" else (tiny.tokens(2, 90), None)
    )
    model(ids, attention_mask=mask, past_key_values=stack)
    model(ids[:, :1], attention_mask=tiny.mask_for(stack, 1), past_key_values=stack)
    stack.save(tmp_path / "cache.safetensors")
    again = KVStack.load(tmp_path / "cache.safetensors", model=model)
    assert (again.seen, again.held, repr(again)) == (stack.seen, stack.held, repr(stack))
    for step in range(12):
        new, mask = torch.full((2, 1), 5 + step), tiny.mask_for(stack, 1)
        found, expected = (model(new, attention_mask=mask, past_key_values=cache).logits for cache in (again, stack))
        assert torch.equal(found, expected), step


def test_the_file_is_as_large_as_the_cache(tmp_path):
    model = tiny.model("llama")
    stack = KVStack([CommonKV(0.5), Quant(2), Evict(0.5)], model=model)
    model(tiny.tokens(1, 3000), past_key_values=stack)
    stack.save(tmp_path / "cache.safetensors")
    assert abs((tmp_path / "cache.safetensors").stat().st_size / stack.nbytes - 1) < 0.05


@pytest.mark.parametrize(("name", "architecture"), [case for case in CASES if case[0] != "mean"])
def test_deflated_or_not_the_same_bits(name, architecture, tmp_path):
    """All tensors, of all types, and never more bytes to speak of."""
    model, files = tiny.model(architecture, dtype=torch.bfloat16), [tmp_path / "plain", tmp_path / "deflated"]
    stack = KVStack(STACKS[name], model=model, **SETTINGS)
    model(tiny.tokens(2, 600), past_key_values=stack)
    found = []
    for compress, path in enumerate(files):
        stack.save(path, compress=bool(compress))
        found.append(KVStack.load(path, model=model).parts())
    assert found[0]
    for (*who, x), (*other, y) in zip(*found, strict=True):
        assert (who, x.dtype, x.shape) == (other, y.dtype, y.shape)
        assert torch.equal(x, y)
    plain, deflated = (path.stat().st_size for path in files)
    assert deflated <= 1.01 * plain


def test_a_text_that_repeats_itself_is_deflated(tmp_path):
    model = tiny.model("llama")
    stack = KVStack([Quant(4)], model=model)
    model(torch.full((1, 3000), 7), past_key_values=stack)
    sizes = []
    for compress in (False, True):
        stack.save(tmp_path / "cache", compress=compress)
        sizes.append((tmp_path / "cache").stat().st_size)
    assert sizes[1] < 0.9 * sizes[0]


def test_files_of_before_are_read(tmp_path):
    """A description that knows nothing of deflated tensors, nor of transforms that are fitted to a text."""
    import json

    from kvstack import disk as saved
    from kvstack.files import read_tensors, write_tensors

    model, path = tiny.model("llama"), tmp_path / "cache"
    stack = KVStack([CommonKV(0.5, layers=2), Quant(4)], model=model)
    model(tiny.tokens(1, 200), past_key_values=stack)
    stack.save(path)
    metadata, tensors = read_tensors(path, UseError, "cache", "")
    described = json.loads(metadata["cache"])
    assert described.pop("deflated") == {}
    for store in described["cohorts"][0]["stores"]:
        assert store.pop("bases") == [{}]
    write_tensors(path, tensors, {"format": saved.FORMAT, "cache": json.dumps(described)})
    assert torch.equal(KVStack.load(path, model=model).read(0).keys, stack.read(0).keys)


def test_mistakes(tmp_path):
    model, path = tiny.model("llama"), tmp_path / "cache.safetensors"
    stack = KVStack([CommonKV(0.5, layers=2)], model=model)
    model(tiny.tokens(1, 100), past_key_values=stack)
    stack.save(path)
    with pytest.raises(UseError, match="saved with another model than this Qwen2ForCausalLM"):
        KVStack.load(path, model=tiny.model("qwen2"))
    with pytest.raises(UseError, match=r"saved with a model in torch\.float32, and this one is in torch\.bfloat16"):
        KVStack.load(path, model=tiny.model("llama", dtype=torch.bfloat16))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UseError, match="is damaged: its checksum"):
        KVStack.load(path, model=model)
    path.write_bytes(data[:-10])
    with pytest.raises(UseError, match="is damaged or not a cache"):
        KVStack.load(path, model=model)
    with pytest.raises(UseError, match="does not exist"):
        KVStack.load(tmp_path / "none", model=model)
    with pytest.raises(UseError, match="not bound to a model"):
        KVStack([Quant(4)]).save(path)


def test_a_calibration_in_memory_has_no_path_to_be_saved_with(tmp_path):
    from kvstack import StageError, calibrate

    model = tiny.model("llama")
    stack = KVStack([CommonKV(0.5, calibration=calibrate(model, tokens=400))], model=model)
    with pytest.raises(StageError, match=r"calibration is a Calibration, which cannot be written down\. Save it"):
        stack.save(tmp_path / "cache.safetensors")


class Renamed(CommonKV):
    """A transform of another name, such as a plugin's."""

    name = "renamed"


@pytest.mark.parametrize("kind", [CommonKV, Renamed])
def test_latents_of_another_calibration_are_refused(kind, tmp_path, monkeypatch):
    from kvstack import calibrate, registry

    model, path, axes = tiny.model("llama"), tmp_path / "cache.safetensors", tmp_path / "axes.safetensors"
    calibrate(model, layers=2, tokens=400).save(axes)
    entry = EntryPoint("renamed", f"{__name__}:Renamed", "kvstack.stages")
    monkeypatch.setitem(registry.BUILT_IN["stages"], "renamed", entry)
    stack = KVStack([kind(0.5, layers=2, calibration=str(axes))], model=model)
    model(tiny.tokens(1, 100), past_key_values=stack)
    stack.save(path)
    assert torch.equal(KVStack.load(path, model=model).read(0).keys, stack.read(0).keys)
    calibrate(model, layers=2, tokens=900).save(axes)
    with pytest.raises(
        UseError, match=rf"with another calibration .* with the cache: {kind.__name__}\(calibration=PATH\)\."
    ):
        KVStack.load(path, model=model)


def test_codes_of_other_widths_are_refused(tmp_path, monkeypatch):
    """As many channels and as many bits, which another version gives out in another way."""
    from kvstack import calibrate
    from kvstack.encode import quant

    model, path = tiny.model("llama"), tmp_path / "cache.safetensors"
    axes = str(tmp_path / "axes.safetensors")
    calibrate(model, layers=2, tokens=900, keep_axes=1.0, bits=16).save(axes)
    stack = KVStack([CommonKV(0.5, layers=2, calibration=axes), Quant(8)], model=model)
    model(tiny.tokens(1, 100), past_key_values=stack)
    stack.save(path)
    assert torch.equal(KVStack.load(path, model=model).read(0).keys, stack.read(0).keys)

    def flatter(energies, *budget, spread=quant.spread_by_class):
        return spread([energy.sqrt() for energy in energies], *budget)

    monkeypatch.setattr(quant, "spread_by_class", flatter)
    with pytest.raises(UseError, match="by a version that gives channels other bits: read the text again"):
        KVStack.load(path, model=model)


def test_all_a_layer_of_transformers_holds_is_saved():
    """Dicts of tensors too, as linear-attention layers have them; what cannot be written is said."""
    from types import SimpleNamespace

    from kvstack.checks import Tensors
    from kvstack.disk import Writer
    from kvstack.other_layers import describe_layer, fill_layer

    writer, state = Writer(), {0: torch.ones(2), 1: [torch.zeros(2, 3), True]}
    layer = SimpleNamespace(states=state, seen=3, dtype=torch.float32)
    described = describe_layer(layer, writer.put)
    assert set(described) == {"states", "seen"}
    again = SimpleNamespace(states={0: None, 1: None}, seen=3, dtype=None)
    fill_layer(again, layer, described, Tensors(writer.tensors, {}), rows=2)
    assert again.dtype == torch.float32
    back = again.states
    assert torch.equal(back[0], state[0])
    assert torch.equal(back[1][0], state[1][0])
    assert back[1][1] is True
    with pytest.raises(UseError, match="is a function, which cannot be saved"):
        describe_layer(SimpleNamespace(hook=test_mistakes), writer.put)


def test_files_can_be_read_by_others(tmp_path):
    import os

    mask = os.umask(0o022)
    try:
        stack = KVStack([Quant(4)], model=tiny.model("llama"))
        stack.binding.model(tiny.tokens(1, 10), past_key_values=stack)
        stack.save(tmp_path / "cache.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "cache.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_file_of_version_0_1_is_read(tmp_path):
    """Written by kvstack 0.1: `quant:4,group=8+evict:0.5,score=h2o` after 93 tokens of two rows. The other file holds
    what 0.1 read from it."""
    import json

    from safetensors.torch import load_file

    from kvstack.files import read_tensors, write_tensors
    from kvstack.model.fingerprint import fingerprint

    data, model, path = Path(__file__).parent / "data", tiny_model(), tmp_path / "cache"
    metadata, tensors = read_tensors(data / "cache-0.1.safetensors", UseError, "cache", "")
    described = json.loads(metadata["cache"])
    described["model"] = fingerprint(model)  # a newer transformers may know more settings of the same model
    write_tensors(path, tensors, {"format": metadata["format"], "cache": json.dumps(described)})
    stack = KVStack.load(path, model=model)
    assert stack.spec == "quant:bits=4,group=8+evict:keep=0.5,score=h2o@sinks=2,window=6,block=8"
    for name, expected in load_file(data / "read-0.1.safetensors").items():
        layer, row, what = name.split(".")
        if what == "positions":
            assert torch.equal(stack.positions(int(layer), int(row)), expected)
        else:
            assert torch.equal(getattr(stack.read(int(layer), int(row)), what), expected)
    model(tiny.tokens(2, 20), past_key_values=stack)
    assert stack.seen == 93 + 20


# ---- what a file says is checked


def changed(path, change):
    """Change the description and tensors of a file, and sign it again."""
    import json

    from kvstack.files import read_tensors, write_tensors

    metadata, tensors = read_tensors(path, UseError, "cache", "")
    described = json.loads(metadata["cache"])
    change(described, tensors)
    write_tensors(path, tensors, metadata | {"cache": json.dumps(described)})


def stored(stages, path, architecture="llama", **how):
    model = tiny.model(architecture)
    stack = KVStack(stages, model=model, **SETTINGS)
    model(tiny.tokens(1, 200), past_key_values=stack)
    stack.save(path, **how)
    return model, stack


def test_what_a_newer_version_adds_is_said(tmp_path):
    path = tmp_path / "cache"
    for place in (lambda d: d, lambda d: d["cohorts"][0], lambda d: d["cohorts"][0]["stores"][0]):
        model, _ = stored([Quant(4)], path)
        changed(path, lambda described, tensors, place=place: place(described).update(colour="red"))
        with pytest.raises(
            UseError, match=r"holds \['colour'\], which a newer kvstack wrote\. Update kvstack, or save"
        ):
            KVStack.load(path, model=model)


def test_a_missing_part_is_said(tmp_path):
    path = tmp_path / "cache"
    model, _ = stored([Quant(4)], path)
    changed(path, lambda described, tensors: described.pop("cohorts"))
    with pytest.raises(
        UseError, match=r"cache' cannot be read as a cache: .*its description lacks \['cohorts'\]\. Save it again"
    ):
        KVStack.load(path, model=model)
    model, _ = stored([Quant(4)], path)
    changed(path, lambda described, tensors: tensors.pop("0"))
    with pytest.raises(
        UseError, match=r"does not fit KVStack\(\[Quant.*raw keys of layer 0 are missing\. Save it again"
    ):
        KVStack.load(path, model=model)


@pytest.mark.parametrize("codec", ["nf4", "fp4", "int8"])
def test_no_size_reaches_bitsandbytes_unchecked(codec, tmp_path):
    """Fewer scales than there are codes would be read beyond their end: the process would die."""

    def cut(described, tensors):
        (entry, *_) = described["cohorts"][0]["stores"][0]["sealed"]
        name = entry["parts"]["absmax"]
        tensors[name] = tensors[name][..., :0].contiguous()

    path = tmp_path / "cache"
    model, _ = stored([Quant(8 if codec == "int8" else 4, codec=codec)], path)
    changed(path, cut)
    with pytest.raises(
        UseError, match=r"keys: absmax of layer 0 are \(1, 2, 2, 0\) float16, not \(1, 2, 2, 16\) float"
    ):
        KVStack.load(path, model=model)


def bomb(described, tensors):
    """3 GB of zeros in 3 MB."""
    import zlib

    packer = zlib.compressobj(9)
    data = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(300)), packer.flush()])
    name = described["cohorts"][0]["stores"][0]["raw"][0][0]
    tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return name


def test_a_bomb_is_not_inflated(tmp_path):
    """Neither one that declares little nor one that declares all."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "cache"
    for declared in ([1, 2, 10, 16], [1, 2, 300 << 14, 16]):

        def change(described, tensors, declared=declared):
            described["deflated"][bomb(described, tensors)] = ["float32", declared]

        model, _ = stored([Quant(4, group=8)], path)
        changed(path, change)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UseError, match=r"raw keys of layer 0 (do not inflate to|are)"):
            KVStack.load(path, model=model)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # kilobytes


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_next"])
def test_tensors_go_where_the_model_is(architecture, tmp_path):
    """Wherever they were saved from: a file that names a device that is not here loads."""

    def elsewhere(x):
        if isinstance(x, dict) and "tensor" in x:
            x["device"] = "cuda:3"
        for value in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            elsewhere(value)

    path = tmp_path / "cache"
    model, stack = stored([Quant(4, group=8)], path, architecture)
    changed(path, lambda described, tensors: elsewhere(described["others"]))
    again = KVStack.load(path, model=model)
    for mine, other in zip(again._others, stack._others, strict=True):
        assert vars(mine).keys() == vars(other).keys()
        assert (mine.dtype, mine.device) == (other.dtype, other.device)
    new = tiny.tokens(1, 1)
    assert torch.equal(model(new, past_key_values=again).logits, model(new, past_key_values=stack).logits)


def test_a_file_sets_no_other_attribute(tmp_path):
    path = tmp_path / "cache"
    for name in ("update", "get_mask_sizes", "__class__", "colour"):
        model, _ = stored([Quant(4, group=8)], path, "gemma3")
        changed(path, lambda described, tensors, name=name: described["others"][0].update({name: 1}))
        with pytest.raises(UseError, match=rf"a DynamicSlidingWindowLayer holds \['{name}'\]"):
            KVStack.load(path, model=model)


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path):
    path = tmp_path / "cache"
    model, _ = stored([Quant(4)], path)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    changed(path, lambda described, tensors: tensors.pop("0"))
    for _ in range(2):
        with pytest.raises(UseError):
            KVStack.load(path, model=model)
    import gc

    gc.collect()
    assert [len(module._forward_pre_hooks) for module in model.modules()] <= hooks


def test_a_stack_that_has_read_nothing(tmp_path):
    for architecture in ("llama", "gemma3", "qwen3_next"):
        model = tiny.model(architecture)
        KVStack([Quant(4)], model=model).save(tmp_path / "cache")
        again = KVStack.load(tmp_path / "cache", model=model)
        assert (again.seen, again.held, again.batch_size) == (0, 0, -1)
        model(tiny.tokens(2, 100), past_key_values=again)
        assert again.seen == 100


def test_after_a_crop_of_everything(tmp_path):
    model, stack = stored([Quant(4)], tmp_path / "cache")
    stack.crop(-200)
    stack.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model)
    ids = tiny.tokens(1, 90)
    assert torch.equal(model(ids, past_key_values=again).logits, model(ids, past_key_values=stack).logits)
