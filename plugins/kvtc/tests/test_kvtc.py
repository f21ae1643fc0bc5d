"""KVTC: bits by dynamic programming, beside every other way to spend them; codes of two latents; bytes."""

import itertools

import pytest
import torch
from kvstack_kvtc import KVTC, widths
from transformers import DynamicCache

from kvstack import KV, BindError, CalibrationError, CommonKV, Evict, KVStack, Quant, StageError, UseError, calibrate
from kvstack.authoring import (
    DISTORTION,
    GAIN_BITS,
    STEPS,
    LayerGroups,
    observe,
    spread,
    storage_bytes,
    windows_of,
)
from kvstack.testing import check_registered, check_stage, tiny_model

SETTINGS = {"sinks": 2, "window": 8, "block": 8}


def ids(rows=1, length=300, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def energies(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator).pow(3).sort(descending=True).values for n in lengths]


def cost(given):
    return sum(int(x.sum()) + 2 * len(x[x > 0].unique()) for x in given)


def error(given, known):
    distortion = torch.tensor(DISTORTION, dtype=torch.float64)
    return sum(float(distortion[x.long()] @ e.double()) for x, e in zip(given, known, strict=True))


# ---- bits


def every_way(known, bits):
    """The least error over all widths for every channel, each latent with one channel at least."""
    ways = []
    for energy in known:
        found = {}
        for given in itertools.product(range(len(DISTORTION)), repeat=len(energy)):
            if not any(given):
                continue
            x = torch.tensor(given)
            price, loss = cost([x]), error([x], [energy])
            found[price] = min(loss, found.get(price, loss))
        ways.append(found)
    sums = [
        sum(loss for _, loss in choice)
        for choice in itertools.product(*(way.items() for way in ways))
        if sum(price for price, _ in choice) <= bits
    ]
    return min(sums, default=None)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [5, 6, 9, 14, 23, 40])
def test_bits_are_spent_as_well_as_can_be(bits, seed):
    known = energies(3, 2, seed=seed)
    given, best = widths(known, bits), every_way(known, bits)
    if best is None:
        assert given is None
        return
    assert cost(given) <= bits
    assert error(given, known) == pytest.approx(best, rel=1e-9)
    for x in given:
        assert bool((x[:-1] >= x[1:]).all()), "widths fall with the energy"
        assert x[0] >= 1, "every latent is stored"


def test_too_few_bits():
    assert widths(energies(4, 4), 5) is None
    assert widths(energies(4, 4), 0) is None
    assert [x.tolist() for x in widths(energies(4, 4), 6)] == [[1, 0, 0, 0]] * 2


@pytest.mark.parametrize("lengths", [(40, 40), (300, 300), (700, 900)])
@pytest.mark.parametrize("bits", [1, 4])
def test_less_error_than_greedy_with_gains_set_aside(lengths, bits):
    """Bits one by one where they help most, after room for the most runs in each latent is set aside."""
    known = energies(*lengths)
    budget = bits * sum(lengths)
    gains = len(known) * GAIN_BITS * len(STEPS)
    given, greedy = widths(known, budget), spread(known, budget - gains)
    assert cost(given) <= budget
    assert error(given, known) < error(greedy, known)


def test_all_bits_there_are():
    """The most for every channel, and no more where more could be spent."""
    most = len(STEPS)
    assert [x.tolist() for x in widths(energies(3, 2), 10_000)] == [[most] * 3, [most] * 2]


# ---- there and back


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def codec_of(model, **settings):
    bound = KVTC(**settings).bind(model)
    return bound.for_group(list(range(bound.layers)))


def group(tokens=16, layers=4):
    def numbers(seed):
        return torch.randn(2, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))

    return [KV(numbers(2 * i), numbers(2 * i + 1)) for i in range(layers)]


def test_latents_are_the_projections_in_plain_loops(model):
    codec, kvs = codec_of(model), group()
    latents = codec.forward(kvs)
    for kind, basis in zip(("keys", "values"), codec.bases, strict=True):
        found = latents[kind].data
        assert found.shape == (2, 1, 16, basis.rank)
        for row, token in ((0, 0), (1, 7)):
            x = [float(n) for kv in kvs for head in getattr(kv, kind)[row, :, token] for n in head]
            for channel in (0, 3):
                axis, mean, weight = basis.full[channel], basis.mean, basis.weight
                z = sum((x[n] - float(mean[n])) * float(weight[n]) * float(axis[n]) for n in range(len(x)))
                assert float(found[row, 0, token, channel]) == pytest.approx(z, rel=1e-3, abs=1e-4)


def test_all_axes_without_codes_lose_nothing(model):
    """What is lost is lost in the codes: at two bytes a number all channels are there."""
    codec, kvs = codec_of(model, ratio=1.99), group()
    latents = {name: latent.data for name, latent in codec.forward(kvs).items()}
    for layer, kv in enumerate(kvs):
        found = codec.inverse(latents, layer)
        torch.testing.assert_close(found.keys, kv.keys, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found.values, kv.values, atol=2e-4, rtol=1e-4)


def test_numbers_on_the_grid_survive(model):
    """Latents that codes can say, gain 1, come back as they were: along axes in 16 bits, which are orthonormal."""
    axes = calibrate(model, layers=4, metric="variance", keep_axes=1.0, bits=16)
    codec = codec_of(model, ratio=8, calibration=axes)
    found = {}
    for kind, mine in codec.encoders.items():
        bits = mine.bits.long()
        codes = (torch.arange(16)[:, None] * 7 + torch.arange(len(bits)) * 5) % 2**bits
        step = torch.tensor((0.0, *STEPS))[bits] * mine.energy.sqrt()
        found[kind] = ((codes - (2.0**bits - 1) / 2) * step)[None]
    exact = [KV(codec.bases[0].keys(found["keys"], i), codec.bases[1].values(found["values"], i)) for i in range(4)]
    latents = codec.forward(exact)
    packed = {name: codec.encoders[name].encode(x.data, name) for name, x in latents.items()}
    for layer, kv in enumerate(exact):
        again = codec.inverse({name: codec.encoders[name].decode(x, name) for name, x in packed.items()}, layer)
        torch.testing.assert_close(again.keys, kv.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.values, kv.values, atol=1e-4, rtol=1e-4)


def test_axes_are_of_the_variance_of_keys_and_of_values(model):
    """The same eigenvalues as a covariance made at once, up to the common factor."""
    found = calibrate(model, tokens=400, layers=4, metric="variance")
    assert (found.metric, found.parts, len(found.groups)) == ("variance", 2, 2)
    groups, (windows, _) = LayerGroups(model, 4), windows_of(model, None, 400, None)
    seen = [observe(model, groups, window[:, :prompt]) for window, prompt in windows]
    ratios = []
    for group, kind in zip(found.groups, ("keys", "values"), strict=True):
        x = torch.cat(
            [torch.cat([getattr(kvs[i], kind)[0].transpose(0, 1).flatten(1) for i in range(4)], 1) for kvs in seen]
        )
        values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
        ratios.append(group.energy[:40] / values[:40])
        assert group.shapes == (((2, 16, 0),) * 4 if kind == "keys" else ((2, 0, 16),) * 4)
    ratio = torch.cat(ratios)
    torch.testing.assert_close(ratio, ratio.mean().expand(80), rtol=1e-3, atol=0)


# ---- in a stack


def filled(stages, model, tokens=2 + 8 + 400, **settings):
    stack = KVStack(stages, model=model, **(SETTINGS | settings))
    model(ids(1, tokens), past_key_values=stack)
    return stack


def test_bytes_by_hand(model):
    """400 tokens: the bits of the channels and two a run, no more than the ratio allows."""
    stack = filled([KVTC(16)], model)
    found = {part.part: part.nbytes for part in stack.report().parts if "KVTC" in part.payer}
    (store,) = stack.batch.cohorts[0].stores
    expected = {}
    for kind, mine in store.sealed[0].codec.encoders.items():
        expected[f"{kind}: codes"] = 400 * int(mine.bits.sum()) // 8
        expected[f"{kind}: gains"] = 400 * 2 * len(mine.bits.unique()) // 8
    assert found == expected
    dense = 400 * 4 * 2 * 2 * 16 * 2  # tokens, layers, keys and values, heads, channels, bytes of a 16-bit number
    assert 0.97 < 16 * sum(found.values()) / dense <= 1


def test_error_falls_with_the_ratio(model):
    dense = DynamicCache()
    model(ids(1, 410), past_key_values=dense)
    errors = []
    for ratio in (32, 16, 8, 4, 2):
        stack = filled([KVTC(ratio)], model)
        pairs = [
            (getattr(stack.read(i), kind), getattr(dense.layers[i], kind))
            for i in range(4)
            for kind in ("keys", "values")
        ]
        errors.append(
            sum(float((x - y).square().sum()) for x, y in pairs) / sum(float(y.square().sum()) for _, y in pairs)
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.002


def test_dynamic_programming_loses_less_than_cutting_off(model):
    """At equal bits: leading channels in 8 bits each, against channels that compete."""
    bound = KVTC(16).bind(model)
    codes, groups = bound.for_group(range(4)).encoders.values(), bound.calibration.groups
    bits = sum(int(mine.bits.sum()) for mine in codes)
    rank = bits // 8 // 2
    cut = [torch.where(torch.arange(len(g.energy)) < rank, 8, 0) for g in groups]
    spent = [
        torch.nn.functional.pad(m.bits, (0, len(g.energy) - len(m.bits))) for m, g in zip(codes, groups, strict=True)
    ]
    known = [group.energy for group in groups]
    assert error(spent, known) < 0.8 * error(cut, known)


def test_one_group_of_layers_or_several(model):
    """Fewer layers in a group: latents of their own, one budget for all."""
    for layers, stores in ((4, 1), (2, 2), (1, 4)):
        stack = filled([KVTC(8, layers=layers)], model)
        assert len(stack.batch.cohorts[0].stores) == stores
        sealed = [p for store in stack.batch.cohorts[0].stores for p in store.packed.values()]
        assert len(sealed) == 2 * stores
        assert storage_bytes([x for p in sealed for x in p.parts.values()]) <= 400 * 256 * 2 / 8


def test_contract():
    check_stage(KVTC(4))
    check_stage(KVTC(8, layers=2))


STACKS = {
    "alone": [KVTC(8)],
    "evict": [KVTC(8), Evict(0.5)],
    "groups": [KVTC(8, layers=2), Evict(0.5)],
}
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("compress", [False, True])
def test_rows_crop_copy_and_disk(name, compress, model, tmp_path):
    """A left-padded batch goes on after a crop exactly as its saved copy does; beams run."""
    padded = ids(2, 300)
    mask = torch.ones_like(padded)
    padded[0, :60] = mask[0, :60] = 0
    stack = KVStack(STACKS[name], **SETTINGS)
    out = model.generate(padded, attention_mask=mask, past_key_values=stack, **GREEDY)
    assert out.shape == (2, 324)
    assert stack.nbytes == storage_bytes(stack.tensors())
    assert stack.nbytes < 0.5 * stack.dense_nbytes
    stack.crop(-50)  # through a granule
    stack.save(tmp_path / "cache.safetensors", compress=compress)
    again = KVStack.load(tmp_path / "cache.safetensors", model=model)
    assert (again.seen, again.held, repr(again)) == (stack.seen, stack.held, repr(stack))
    for step in range(20):
        new, mask = torch.full((2, 1), 5 + step), torch.ones(2, stack.seen + 1, dtype=torch.long)
        mask[0, :60] = 0
        found, expected = (model(new, attention_mask=mask, past_key_values=cache).logits for cache in (again, stack))
        assert torch.equal(found, expected)
    beams = KVStack(STACKS[name], **SETTINGS)
    assert model.generate(ids(), past_key_values=beams, num_beams=3, **GREEDY).shape == (1, 324)


@pytest.mark.parametrize("name", STACKS)
def test_a_padded_row_equals_the_row_alone(name):
    model = tiny_model().double()
    padded = ids(2, 300)
    mask = torch.ones_like(padded)
    padded[0, :60] = mask[0, :60] = 0
    together, alone = KVStack(STACKS[name], **SETTINGS), KVStack(STACKS[name], **SETTINGS)
    model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=together)
    model(padded[:1, 60:], past_key_values=alone)
    for layer in range(4):
        found, expected = together.read(layer, 0), alone.read(layer)
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.values, expected.values, atol=1e-4, rtol=1e-4)


def test_both_ways_to_read_agree(model):
    new = torch.tensor([[7]])
    found = [
        model(new, past_key_values=filled([KVTC(4, exact=None)], model, fused=fused)).logits for fused in (True, False)
    ]
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


# ---- names and mistakes


def test_it_is_found_by_its_name():
    check_registered(KVTC(32, layers=2))
    assert repr(KVStack.from_spec("kvtc:32+evict:0.5")) == "KVStack([KVTC(ratio=32), Evict(keep=0.5)])"


def test_it_is_in_the_catalogue():
    from typer.testing import CliRunner

    from kvstack.cli.commands import app

    done = CliRunner().invoke(app, ["stages"])
    (row,) = (line for line in done.stdout.splitlines() if "│ kvtc" in line)
    found = [cell.strip() for cell in row.strip("│").split("│")]
    assert found[1:3] == ["KVTC", "transform"]


def test_an_encoder_beside_it():
    with pytest.raises(StageError, match=r"KVTC\(\) packs its numbers itself, and Quant\(bits=4\) has none left"):
        KVStack([KVTC(), Quant(4)])


def test_bad_settings():
    for ratio in (1, 0.5, -16, "16", True):
        with pytest.raises(
            StageError, match=r"ratio is how many times smaller the codes are, more than 1\. Use ratio=16"
        ):
            KVTC(ratio)
    for layers in (0, -1, 2.0, True):
        with pytest.raises(StageError, match=r"layers counts layers\. Use 1 or more, or leave it out for all"):
            KVTC(layers=layers)


def test_a_path_is_quoted_in_a_spec():
    with pytest.raises(StageError, match=r"calibration is not a path\. Quote it in a spec: calibration='out/axes'"):
        KVStack.from_spec("kvtc:16,calibration=out/axes")
    assert KVStack.from_spec("kvtc:16,calibration='out/axes'").stages == (KVTC(16, calibration="out/axes"),)


def test_a_ratio_that_leaves_nothing(model):
    with pytest.raises(
        BindError, match=r"KVTC\(ratio=2000\): 2 bits a token are too few for 2 latents\. Use a smaller"
    ):
        KVStack([KVTC(2000)], model=model)


def test_a_model_writes_as_much_as_its_axes_need(monkeypatch):
    monkeypatch.setattr("kvstack.calibration.windows.SAMPLED_TOKENS", 100)
    bound = KVTC().bind(tiny_model(num_hidden_layers=8))
    assert int(bound.calibration.manifest["tokens"]) > 256


def test_more_axes_than_tokens_are_refused():
    with pytest.raises(CalibrationError, match=r"cache 256 numbers .* Use layers= one of \[1, 2, 4\]"):
        calibrate(tiny_model(num_hidden_layers=8), tokens=100, metric="variance")


def test_layers_that_do_not_divide(model):
    with pytest.raises(BindError, match=r"LlamaForCausalLM has 4 full-attention layers, which do not divide"):
        KVStack([KVTC(layers=3)], model=model)


def test_layers_that_hold_something(model):
    """Latents of those alone, and bits for those alone."""
    bound = KVTC(16).bind(model, [0, 1, 3])
    assert (bound.layers, bound.groups.groups) == (3, [[0, 1, 3]])
    codec = bound.for_group([0, 1, 3])
    kvs = group(layers=3)
    assert codec.inverse({name: latent.data for name, latent in codec.forward(kvs).items()}, 2).keys.shape == (
        2,
        2,
        16,
        16,
    )
    numbers = 3 * 2 * 2 * 16  # layers, keys and values, heads, channels
    bits = sum(int(codes.bits.sum()) + 2 * len(codes.runs) for codes in codec.encoders.values())
    assert 0.9 * numbers < bits <= numbers
    with pytest.raises(CalibrationError, match=r"has 3 full-attention layers that hold keys and values, which do not"):
        KVTC(layers=2).bind(model, [0, 1, 3])


def test_calibrations_of_the_other_kind(model, tmp_path):
    fisher = calibrate(model, tokens=400, layers=4)
    with pytest.raises(CalibrationError, match=r"metric='fisher', and 'variance' is needed\. .* layers=2, metric="):
        KVStack([KVTC(layers=2, calibration=fisher)], model=model)
    variance = calibrate(model, tokens=400, layers=4, metric="variance")
    with pytest.raises(CalibrationError, match=r"was made with metric='variance', and 'fisher' is needed"):
        KVStack([CommonKV(layers=4, calibration=variance)], model=model)
    variance.save(tmp_path / "axes.safetensors")
    stack = filled([KVTC(calibration=tmp_path / "axes.safetensors")], model)
    stack.save(tmp_path / "cache.safetensors")
    calibrate(model, tokens=900, layers=4, metric="variance").save(tmp_path / "axes.safetensors")
    with pytest.raises(UseError, match="saved with another calibration"):
        KVStack.load(tmp_path / "cache.safetensors", model=model)
