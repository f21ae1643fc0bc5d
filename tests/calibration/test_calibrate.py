"""Calibrations: what they find, and that a file is trusted only where it should be."""

import logging
import os

import pytest
import torch
from typer.testing import CliRunner

from kvstack import BindError, Calibration, CalibrationError, CommonKV, KVStack, Quant, calibrate, sensitivity
from kvstack.calibration import calibrate as calibrating
from kvstack.calibration import keep, windows
from kvstack.cli.commands import app, spectra
from kvstack.model.fingerprint import fingerprint, sampled
from kvstack.model.layers import LayerGroups, group_size
from kvstack.model.probing import SINKS
from kvstack.testing import tiny_model
from tests import tiny


@pytest.fixture(scope="module")
def found():
    with torch.no_grad():
        return calibrate(tiny.model("llama"), layers=2)


@pytest.fixture
def saved(found, tmp_path):
    path = tmp_path / "model.safetensors"
    found.save(path)
    return path


def test_axes_cover_all_layers_and_are_ordered(found):
    assert [group.layers for group in found.groups] == [(0, 1), (2, 3)]
    for group in found.groups:
        assert group.axes.codes.shape == (len(group.axes), 128)
        assert group.axes.fine.shape == (4, 128)
        assert group.energy.shape == (128,)
        assert bool((group.energy.diff() <= 0).all())
        assert bool((group.weight > 0).all())
    assert sum(len(group.axes) for group in found.groups) == 128
    # codes, and for each axis the scales of 2 layers, keys and values, 2 heads; fine parts of the first
    assert found.nbytes == 128 * (128 + 4 * 8) + 2 * 4 * 128 + 2 * 3 * 128 * 4


def test_the_axes_that_are_kept_are_those_of_most_energy(found):
    every = calibrate(tiny.model("llama"), layers=2, keep_axes=1.0, bits=16)
    energies = torch.cat([group.energy for group in every.groups])
    least = energies.sort(descending=True).values[127]
    for some, all_of_it in zip(found.groups, every.groups, strict=True):
        assert len(some.axes) == int((all_of_it.energy >= least).sum())
        assert torch.equal(some.energy, all_of_it.energy)
        kept = all_of_it.axes.leading(len(some.axes)).rows()
        torch.testing.assert_close(some.axes.rows(), kept, atol=0.5 / 127, rtol=0)
        product = all_of_it.axes.rows() @ all_of_it.axes.rows().T
        torch.testing.assert_close(product, torch.eye(128), atol=1e-3, rtol=0)


def test_energies_are_the_variances_of_the_latents():
    """On the very text that was read, a latent's channels vary as their energies say, and not together."""
    model = tiny.model("llama")
    texts = windows.written_by(model, windows.SAMPLED_TOKENS)
    found = calibrate(model, layers=4, keep_axes=1.0, bits=16)
    group = found.groups[0]
    basis = group.basis(128, torch.device("cpu"), torch.float32)
    groups = LayerGroups(model, 4)
    latents = []
    for number, (ids, prompt) in enumerate(texts):
        with torch.no_grad():
            cache, _ = calibrating.read_window(model, ids, prompt, groups.full, seed=number)
        sums = calibrating.Sums(groups.full, groups.ropes)
        latents.append(basis.project(sums.flat(cache, lambda rope, x, where: rope.unrotate(x, where))))
    z = torch.cat(latents)
    covariance = torch.cov(z.T, correction=0)
    torch.testing.assert_close(covariance.diagonal(), group.energy[:128], rtol=0.02, atol=1e-3 * float(group.energy[0]))
    off = covariance - covariance.diagonal().diag()
    assert float(off.abs().max()) < 0.01 * float(group.energy[0])


def test_the_weight_is_the_fisher_information():
    """Half the weight times a small squared error is the KL that the error causes, up to one common factor: what
    matters most in the tiny model is told from what matters least."""
    model = tiny.model("llama")
    texts = windows.written_by(model, 1600)
    groups = LayerGroups(model, 2)
    sums = [calibrating.Sums(group, groups.ropes) for group in groups.groups]
    caused = torch.zeros(4)
    for number, (ids, prompt) in enumerate(texts):
        kvs, gradients = calibrating.read_window(model, ids, prompt, groups.full, seed=number)
        for one in sums:
            one.add(kvs, gradients)
        for layer in range(4):
            caused[layer] += kl_of_noise_in_values(model, ids, prompt, layer)
    weights = torch.stack([one.weight().split([32] * 4)[2 * i + 1].mean() for one in sums for i in range(2)])
    shares, expected = weights / weights.sum(), caused / caused.sum()
    assert shares.argsort().tolist() == expected.argsort().tolist()
    torch.testing.assert_close(shares, expected, atol=0.1, rtol=0.3)


def kl_of_noise_in_values(model, ids, prompt, layer):
    from transformers import DynamicCache

    logits = []
    for size in (0.0, 1e-2):
        cache = DynamicCache(config=model.config)
        model(ids[:, :prompt], past_key_values=cache)
        values = cache.layers[layer].values
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(layer))
        noise[:, :, :SINKS] = 0
        cache.layers[layer].values = values + size * noise
        logits.append(model(ids[:, prompt:], past_key_values=cache).logits.double().log_softmax(-1))
    exact, noisy = logits
    return float((exact.exp() * (exact - noisy)).sum())


def test_calibrating_leaves_the_model_as_it_was():
    model = tiny.model("llama", num_hidden_layers=2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    random = torch.random.get_rng_state()
    with torch.inference_mode():
        calibrate(model, tokens=200)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    model.eval()


def test_the_same_text_gives_the_same_calibration(found):
    again = calibrate(tiny.model("llama"), layers=2)
    for a, b in zip(found.groups, again.groups, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


# ---- files


def test_a_file_gives_back_what_was_saved(found, saved):
    again = Calibration.load(saved)
    assert again.manifest == found.manifest
    for a, b in zip(found.groups, again.groups, strict=True):
        assert (a.layers, a.shapes) == (b.layers, b.shapes)
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
        assert torch.equal(a.axes.full(), b.axes.full())
    again.check(tiny.model("llama"))
    assert os.listdir(saved.parent) == [saved.name], "nothing partial is left"


@pytest.mark.parametrize("where", [0.2, 0.5, 0.99])
def test_a_flipped_bit_is_noticed(saved, where):
    data = bytearray(saved.read_bytes())
    data[int(where * len(data))] ^= 4
    saved.write_bytes(data)
    with pytest.raises(CalibrationError, match="damaged"):
        Calibration.load(saved)


@pytest.mark.parametrize("size", [0, 7, 2000, -1])
def test_a_truncated_file_is_refused(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(CalibrationError, match="damaged"):
        Calibration.load(saved)


def test_a_file_of_version_0_1(found, saved):
    """All axes, as halves."""
    from kvstack.files import read_tensors, write_tensors

    every = calibrate(tiny.model("llama"), layers=2, keep_axes=1.0, bits=16)
    every.save(saved)
    metadata, tensors = read_tensors(saved, CalibrationError, "calibration", "")
    before = {name: x for name, x in tensors.items() if not name.endswith(("axes", "fine", "scale"))}
    before |= {f"{i}.axes": group.axes.rows().half() for i, group in enumerate(every.groups)}
    groups = '[{"layers": [0, 1], "shapes": [[2, 16, 16], [2, 16, 16]]}, '
    groups += '{"layers": [2, 3], "shapes": [[2, 16, 16], [2, 16, 16]]}]'
    write_tensors(saved, before, {**metadata, "format": "kvstack calibration 1", "groups": groups})
    again = Calibration.load(saved)
    for a, b in zip(every.groups, again.groups, strict=True):
        assert torch.equal(a.energy, b.energy)
        torch.testing.assert_close(a.axes.full(), b.axes.full(), atol=1e-3, rtol=1e-3)
    assert again.fingerprint == sampled(before)[:24], "that of 0.1, which caches were saved with"
    again.save(saved)
    assert Calibration.load(saved).fingerprint == again.fingerprint
    KVStack([CommonKV(0.9, calibration=again)], model=tiny.model("llama"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match=r"none\.safetensors' does not exist.*kvstack calibrate MODEL"):
        Calibration.load(tmp_path / "none.safetensors")


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CalibrationError, match="not a calibration of this version"):
        Calibration.load(tmp_path / "model.safetensors")


def test_a_foreign_calibration_is_refused(saved):
    other = tiny.model("llama", intermediate_size=80)
    with pytest.raises(CalibrationError, match="another model than this LlamaForCausalLM"):
        KVStack([CommonKV(layers=2, calibration=str(saved))], model=other)


def test_groups_of_another_size_are_refused(saved):
    with pytest.raises(BindError, match=r"groups of 2 layers, not of 4\. Use layers=2, or calibrate with layers=4"):
        KVStack([CommonKV(layers=4, calibration=saved)], model=tiny.model("llama"))


def test_a_failed_write_leaves_the_old_file(found, saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        found.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


# ---- whose it is


def test_identity_is_of_the_weights_not_of_their_type():
    model = tiny.model("llama")
    assert fingerprint(model) == fingerprint(tiny.model("llama", dtype=torch.bfloat16))
    assert fingerprint(model) != fingerprint(tiny.model("qwen2"))
    other = tiny.model("llama", num_hidden_layers=2)
    before = fingerprint(other)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert fingerprint(other) != before
    with torch.no_grad():
        other.lm_head.weight[0, 0] -= 1


def test_identity_survives_saving(tmp_path):
    """`save_pretrained` writes the architecture into the config of the model it saves."""
    model = tiny.model("llama", intermediate_size=72)
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(model) == before == fingerprint(type(model).from_pretrained(tmp_path))


def test_identity_knows_the_rotation():
    assert fingerprint(tiny.model("llama")) != fingerprint(tiny.model("llama", max_position_embeddings=512))


# ---- by itself


def test_commonkv_calibrates_itself_once_and_says_so(monkeypatch, tmp_path, caplog):
    model = tiny.model("mistral")
    monkeypatch.setattr(keep, "folder", lambda: tmp_path)
    keep.forget(model)
    with caplog.at_level(logging.WARNING, "kvstack"):
        KVStack([CommonKV()], model=model)
        KVStack([CommonKV(0.2), Quant(2)], model=model)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "CommonKV calibrates itself for this MistralForCausalLM"
    ]
    (path,) = tmp_path.glob("*.safetensors")
    assert str(path) in caplog.text
    keep.forget(model)
    monkeypatch.setattr(calibrating, "calibrate", lambda *a, **k: pytest.fail("the file was there"))
    KVStack([CommonKV()], model=model)


def test_a_damaged_file_in_the_cache_is_made_anew(monkeypatch, tmp_path, caplog):
    model = tiny.model("mistral")
    monkeypatch.setattr(keep, "folder", lambda: tmp_path)
    path = calibrating.default_path(model, 4)
    path.write_bytes(b"nothing")
    keep.forget(model)
    with caplog.at_level(logging.WARNING, "kvstack"):
        KVStack([CommonKV()], model=model)
    assert "is damaged" in caplog.text
    Calibration.load(path).check(model)


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path, caplog):
    model = tiny.model("mistral")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(keep, "folder", lambda: tmp_path / "file" / "calibrations")
    keep.forget(model)
    with caplog.at_level(logging.WARNING, "kvstack"):
        KVStack([CommonKV()], model=model)
    assert "cannot be kept, and is made for this process alone" in caplog.text
    keep.forget(model)


def test_stacks_share_one_copy_of_the_axes():
    model = tiny.model("llama")
    one, other = (KVStack([CommonKV(0.5)], model=model) for _ in range(2))
    axes = [stack.batch.cohorts[0].stores[0].codecs[0].bases[0].axes for stack in (one, other)]
    assert axes[0] is axes[1]
    assert one.model_nbytes == other.model_nbytes > 0
    assert "that all caches of the model share" in str(one.report())


USUAL = [(30, 5), (32, 4), (28, 4), (24, 4), (18, 6), (3, 3), (1, 1), (26, 2), (16, 4)]


@pytest.mark.parametrize(("count", "size"), USUAL)
def test_usual_group(count, size):
    assert group_size(count) == size


# ---- mistakes


def test_axes_of_keys_and_of_values_apart(tmp_path):
    """Plain variance: half the numbers each, all of one weight; saved, loaded and told from the other kind."""
    model = tiny.model("llama")
    found = calibrate(model, layers=2, tokens=400, metric="variance")
    assert [group.layers for group in found.groups] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    for part in range(2):
        assert [len(energy) for energy in found.spectrum(part).values()] == [64, 64]
        assert list(found.rank(0.9, part)) == [(0, 1), (2, 3)]
    weights = torch.cat([group.weight for group in found.groups])
    # sums of other processors differ in their last bits
    torch.testing.assert_close(weights, weights[:1].expand_as(weights), atol=0, rtol=1e-6)
    device = torch.device("cpu")
    basis = [found.basis((2, 3), len(found.of((2, 3))[part].axes), device, torch.float32, part) for part in range(2)]
    assert basis[0].shapes == ((2, 16, 0),) * 2
    assert basis[1].shapes == ((2, 0, 16),) * 2
    assert torch.equal(basis[1].mean, found.groups[3].mean)
    rows = ["0 to 1, keys", "0 to 1, values", "2 to 3, keys", "2 to 3, values"]
    assert list(spectra(found).columns[0].cells) == rows
    found.save(tmp_path / "axes")
    again = Calibration.load(tmp_path / "axes")
    assert (again.metric, again.fingerprint) == ("variance", found.fingerprint)
    again.check(model, "variance")
    with pytest.raises(
        CalibrationError, match=r"made with metric='variance', and 'fisher' is needed\. Make one with it"
    ):
        again.check(model)
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_is_none():
    with pytest.raises(CalibrationError, match=r"'mean' is not a metric\. Use \"fisher\" or \"variance\"\."):
        calibrate(tiny.model("llama"), metric="mean")


def test_layers_that_do_not_divide():
    with pytest.raises(CalibrationError, match=r"layers=3: LlamaForCausalLM has 4 .* Use one of \[1, 2, 4\]"):
        calibrate(tiny.model("llama"), layers=3)


class Letters:
    """A tokenizer with a token for each letter."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(letter) % 90 + 3 for letter in text]])}


def test_variance_needs_no_predictions():
    """The model without its head has the same keys and values; it can only not write its own text."""
    model = tiny.model("llama")
    text = ["".join(map(chr, tiny.tokens(1, 1200)[0].tolist()))]
    given = {"tokens": 1000, "metric": "variance", "tokenizer": Letters()}
    found = [calibrate(which, text, **given) for which in (model, model.model)]
    for one, other in zip(*(c.groups for c in found), strict=True):
        assert torch.equal(one.energy, other.energy)
    with pytest.raises(CalibrationError, match="predicts no tokens, and calibration asks how its predictions change"):
        calibrate(model.model)
    with pytest.raises(CalibrationError, match=r"no tokens, so it cannot write a text, and its tokenizer is not known"):
        calibrate(model.model, metric="variance")


def test_variance_is_of_all_layers_by_default():
    """Where KVTC looks for it."""
    found = calibrate(tiny_model(num_hidden_layers=8), tokens=400, metric="variance")
    assert [group.layers for group in found.groups] == [tuple(range(8))] * 2


def test_more_axes_than_tokens():
    model = tiny_model(num_hidden_layers=8)
    message = r"8 layers of LlamaForCausalLM cache 256 numbers .* and 142 tokens .* Use layers= one of \[1, 2, 4\], or"
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, tokens=100, metric="variance")
    assert calibrate(model, tokens=100, layers=4, metric="variance").layers == 4
    with pytest.raises(CalibrationError, match=r"cache 384 numbers .* Use tokens=960 or more"):
        calibrate(tiny_model(num_hidden_layers=1, head_dim=192), tokens=100, metric="variance")


def test_texts_without_a_tokenizer():
    with pytest.raises(CalibrationError, match="Pass tokenizer="):
        calibrate(tiny.model("llama"), ["a text"])


# ---- spectra


def test_ranks_follow_the_spectrum(found):
    assert all(1 <= a <= b for a, b in zip(found.rank(0.5).values(), found.rank(0.99).values(), strict=True))
    energy = found.spectrum()[0, 1]
    rank = found.rank(0.9)[0, 1]
    assert float(energy[:rank].sum()) >= 0.9 * float(energy.sum()) > float(energy[: rank - 1].sum())


def test_spectra_can_be_drawn(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_command(tmp_path, monkeypatch):
    """On a folder with a tiny model and no tokenizer the command says what is missing."""
    folder = tmp_path / "model"
    tiny.model("llama").save_pretrained(folder)
    done = CliRunner().invoke(app, ["calibrate", str(folder)])
    assert done.exit_code == 2
    assert "cannot be loaded as a model" in done.stderr


# ---- blocks


def test_a_block_is_bounded_and_heads_are_cut():
    """A group of more numbers than a block holds: its kv heads are cut into runs, as few as do."""
    model = tiny.model("llama")
    joint, runs = calibrate(model, layers=2), calibrate(model, layers=2, block=64)
    assert (joint.parts, runs.parts) == (1, 2)
    assert [group.heads for group in runs.groups] == [((0, 1), (0, 1)), ((1, 2), (1, 2))] * 2
    assert all(group.shapes == ((1, 16, 16),) * 2 for group in runs.groups)
    # each run is what its numbers give alone: mean and weight are those of the joint block
    of = torch.arange(128).view(2, 2, 2, 16)
    for whole, parts in zip(joint.groups, (runs.groups[:2], runs.groups[2:]), strict=True):
        for head, part in enumerate(parts):
            torch.testing.assert_close(part.mean, whole.mean[of[:, :, head].flatten()])
    assert next(iter(spectra(runs).columns[0].cells)) == "0 to 1, heads 0 to 0"


def test_groups_are_as_large_as_a_block_allows():
    model = tiny.model("llama")  # 64 numbers a layer
    assert [calibrate(model, block=n).layers for n in (8192, 255, 128, 64)] == [4, 2, 2, 1]
    assert [calibrate(model, block=n, metric="variance").layers for n in (128, 64, 32)] == [4, 2, 1]
    with pytest.raises(
        CalibrationError, match=r"2 layers of LlamaForCausalLM cache 128 .* Use layers= one of \[1\], or"
    ):
        calibrate(model, layers=2, block=48)
    with pytest.raises(CalibrationError, match=r"Use block=32\."):
        calibrate(model, block=16)


def test_texts_are_read_again_where_sums_take_too_much():
    """The same calibration, whatever memory the sums may take."""
    model, seen = tiny.model("llama"), []
    one = calibrate(model, layers=1, tokens=300)
    few = calibrate(model, layers=1, tokens=300, memory=2 * 64 * 64 * 4 / 2**30, progress=lambda *at: seen.append(at))
    for a, b in zip(one.groups, few.groups, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    windows_read = (seen[-1][1] - 4) // 2
    assert seen == [(done + 1, 2 * windows_read + 4) for done in range(2 * windows_read + 4)]


def test_fewer_tokens_than_axes_are_refused():
    with pytest.raises(CalibrationError, match=r"4 layers .* cache 256 numbers .* share axes, and 142 tokens"):
        calibrate(tiny.model("llama"), tokens=100, layers=4)


@pytest.mark.parametrize("setting", [{"keep_axes": 0.0}, {"keep_axes": 1.5}, {"bits": 4}, {"block": 0}, {"memory": 0}])
def test_settings_that_mean_nothing(setting):
    (name,) = setting
    with pytest.raises(CalibrationError, match=f"{name}=.* Use "):
        calibrate(tiny.model("llama"), **setting)


# ---- budgets that want more axes


def test_a_large_budget_gets_all_axes(monkeypatch, tmp_path):
    """The default calibration keeps half of the axes; a stack that would lose by it gets one with all of them."""
    model = tiny.model("mistral")
    monkeypatch.setattr(keep, "folder", lambda: tmp_path)
    keep.forget(model)
    KVStack([CommonKV(0.5)], model=model)
    assert len(list(tmp_path.glob("*-half.safetensors"))) == len(list(tmp_path.glob("*.safetensors"))) == 1
    stack = KVStack([CommonKV(1.0)], model=model)
    assert len(list(tmp_path.glob("*-all.safetensors"))) == 1
    (basis,) = stack.batch.cohorts[0].stores[0].codecs[0].bases
    assert basis.rank == 4 * 64
    assert len(basis.axes.fine) == 4 * 64
    keep.forget(model)


def test_a_kept_file_that_is_not_complete_is_made_again(monkeypatch, tmp_path, caplog):
    model = tiny.model("mistral")
    monkeypatch.setattr(keep, "folder", lambda: tmp_path)
    keep.forget(model)
    calibrate(model, tokens=400, keep_axes=0.1).save(calibrating.default_path(model, 4, complete=True))
    with caplog.at_level(logging.WARNING, "kvstack"):
        stack = KVStack([CommonKV(1.0)], model=model)
    assert "axes, and all are wanted. It is made again" in caplog.text
    assert stack.batch.cohorts[0].stores[0].codecs[0].bases[0].rank == 256
    keep.forget(model)


def test_a_count_is_that_of_a_group_also_in_runs():
    model = tiny.model("llama")
    joint, runs = (calibrate(model, layers=2, block=n, keep_axes=1.0, bits=16) for n in (128, 64))
    for axes in (joint, runs):
        stack = KVStack([CommonKV(32, calibration=axes)], model=model)
        codecs = [store.codecs[0] for store in stack.batch.cohorts[0].stores]
        bases = [basis for codec in codecs for basis in codec.bases]
        # a block that the others leave nothing to has one channel all the same
        assert 64 <= sum(basis.rank for basis in bases) <= 64 + sum(basis.rank == 1 for basis in bases)
        with pytest.raises(BindError, match=r"a group of 2 layers has 128 axes\. Use keep=128 or less"):
            KVStack([CommonKV(129, calibration=axes)], model=model)


def test_layers_that_the_model_does_not_have(found, saved):
    from kvstack.files import read_tensors, write_tensors

    metadata, tensors = read_tensors(saved, CalibrationError, "calibration", "")
    groups = metadata["groups"].replace("[2, 3]", "[2, 99]")
    write_tensors(saved, tensors, {**metadata, "groups": groups})
    with pytest.raises(CalibrationError, match="has axes for layer 99, and LlamaForCausalLM has no full-attention"):
        Calibration.load(saved).check(tiny.model("llama"))


def test_a_given_calibration_that_is_too_small_is_refused(saved):
    with pytest.raises(BindError, match=r"keeps 128 of 256 axes, and this stack has bits for more .* keep_axes=1\.0"):
        KVStack([CommonKV(0.9, calibration=saved)], model=tiny.model("llama"))
    with pytest.raises(BindError, match="this stack has bits for more of them"):
        KVStack([CommonKV(0.6, calibration=saved), Quant(8)], model=tiny.model("llama"))


def test_groups_are_those_of_the_calibration(found):
    stack = KVStack([CommonKV(0.5, calibration=found)], model=tiny.model("llama"))
    assert len(stack.batch.cohorts[0].stores) == 2


# ---- sensitivity


def test_sensitivity_tells_a_layer_that_is_not_listened_to():
    """A layer whose attention output is switched off loses nothing when its keys are noise."""
    model = tiny.model("llama", rms_norm_eps=1e-5)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    found = sensitivity(model)
    assert len(found) == 4
    assert found[2] == 0
    assert max(found) > 0
    assert found == sensitivity(model)
    stage = CommonKV(basis="weights", merge="mean", weights=found)
    assert KVStack([stage], model=model).stages == (stage,)
