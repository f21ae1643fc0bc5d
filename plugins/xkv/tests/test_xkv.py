"""xKV beside torch.linalg.svd on the concatenated, un-rotated keys of a dense cache."""

import copy
import dataclasses
import doctest

import kvstack_xkv
import pytest
import torch
from kvstack_xkv import XKV
from kvstack_xkv.factors import Factors
from kvstack_xkv.svd import leading
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
)
from typer.testing import CliRunner

from kvstack import KV, BindError, CalibrationError, Evict, KVStack, Quant, StageError, UseError, registry
from kvstack.cli.commands import app
from kvstack.testing import check_registered, check_stage, tiny_model

SINKS, WINDOW, BLOCK = 2, 8, 8
SETTINGS = {"sinks": SINKS, "window": WINDOW, "block": BLOCK}
FLOAT = 4
FULL = XKV((10_000, 10_000), refit=1e-9)
"""Nothing is left out, once there are twice as many tokens as channels (128): fewer stay raw."""


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def tokens(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def filled(stages, model, ids, **settings):
    stack = KVStack(stages, model=model, **(SETTINGS | settings))
    model(ids, past_key_values=stack)
    return stack


def dense(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def codecs(stack):
    return [sealed.codec for store in stack.batch.cohorts[0].stores for sealed in store.sealed]


def codec_of(stage):
    bound = stage.bind(tiny_model())
    return bound.for_group(range(bound.layers))


def sealed_tokens(stack):
    return stack.batch.cohorts[0].stores[0].sealed_tokens


# ---- its name, its settings


@pytest.mark.parametrize(
    "stage",
    [
        XKV(),
        XKV(keep=0.5, layers=2),
        XKV(exact=None, rough=64),
        XKV((20, 30), svd="full", refit=None),
        XKV(decode="dense"),
        XKV(refit=1e-6),
    ],
    ids=repr,
)
def test_contract(stage):
    check_stage(stage)
    check_registered(stage)


def test_it_is_found_by_its_name():
    assert KVStack.from_spec("xkv:512/768+quant:4").stages == (XKV((512, 768)), Quant(4))
    assert KVStack.from_spec("xkv:keep=0.5,refit=None").spec == "xkv:keep=0.5,refit=None"
    assert "xkv" in registry.stage_names()
    assert "XKV" in CliRunner().invoke(app, ["stages"]).output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 512}, r"XKV\(rank=512\): rank is a pair, of keys and of values\. Use rank=\(512, 768\)\."),
        ({"rank": (512, 0)}, "rank is a pair"),
        ({"keep": 0.0}, r"keep is the share of the numbers that stays, in \(0, 1\]\. Use keep=0\.25\."),
        ({"keep": 1.5}, "keep is the share"),
        ({"rank": (8, 8), "keep": 0.5}, r"rank and keep both say how much stays\. Give one of them\."),
        ({"layers": 0}, r"layers counts layers\. Use 1 or more\."),
        ({"decode": "sparse"}, r"'sparse' is not a way to go on\. Use \"fold\"\."),
        ({"refit": 0}, r"refit is a share of energy above 0\. Use refit=0\.1, or None for never\."),
        ({"exact": 0}, r"exact counts tokens\. Use exact=384, or None for all\."),
        ({"rough": 0}, r"rough counts channels\. Use rough=512\."),
        ({"svd": "half"}, r"'half' decomposes nothing\. Use \"randomized\"\."),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(StageError, match=message):
        XKV(**settings)


def test_the_example_of_the_docstring():
    found = doctest.testmod(kvstack_xkv)
    assert found.attempted == 2
    assert not found.failed


def test_layers_must_divide():
    with pytest.raises(BindError, match=r"XKV\(layers=3\) stores 3 layers together, and LlamaForCausalLM has 4 "):
        KVStack([XKV(layers=3)], model=tiny_model())


def test_layers_that_hold_something_must_divide():
    model = tiny_model()
    message = r"layers=4: LlamaForCausalLM has 3 full-attention layers that hold keys and values, .* one of \[1, 3\]"
    with pytest.raises(CalibrationError, match=message):
        XKV(layers=4).bind(model, [0, 1, 3])
    assert XKV(layers=3).bind(model, [0, 1, 3]).layers == 3
    assert XKV().bind(model, [0, 1, 3]).layers == 3


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 3), (7, 7), (12, 4), (30, 5)])
def test_layers_by_default(count, size):
    assert XKV().bind(tiny_model(num_hidden_layers=count)).layers == size


def test_ranks_of_keep():
    # two fifths of the numbers go to keys, three to values
    assert XKV(keep=0.25).ranks([1000, 1000]) == [200, 300]
    assert XKV().ranks([1000, 1000]) == [200, 300]
    # values have no use for more than all their channels
    assert XKV(keep=0.9).ranks([1000, 1000]) == [800, 1000]
    assert XKV(keep=1.0).ranks([1000, 1000]) == [1000, 1000]
    assert XKV(keep=1.0).ranks([1000]) == [1000]
    assert XKV(keep=1e-9).ranks([1000, 1000]) == [1, 1]


# ---- the decomposition


@pytest.mark.parametrize(("tall", "wide"), [(400, 96), (96, 400), (300, 300)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_the_range_finder_loses_what_the_exact_one_loses(tall, wide, decay):
    x = torch.randn(2, tall, wide)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.arange(1, s.shape[1] + 1) ** -decay @ v
    rank = 24
    least = torch.linalg.svdvals(x)[:, rank:].square().sum(1).sqrt()
    for exact, more in ((True, 1.0001), (False, 1.01)):
        axes = leading(x, rank, exact)
        assert torch.allclose(axes @ axes.mT, torch.eye(rank), atol=1e-4)
        assert bool(((x - x @ axes.mT @ axes).norm(dim=(1, 2)) <= more * least).all())


def test_the_exact_decomposition_is_that_of_torch():
    for shape in ((2, 50, 20), (2, 20, 50)):
        x = torch.randn(shape)
        _, _, v = torch.linalg.svd(x, full_matrices=False)
        assert torch.allclose((leading(x, 20, exact=True) * v).sum(-1).abs(), torch.ones(2, 20), atol=1e-3)


def test_a_text_of_less_rank_loses_nothing():
    x = torch.randn(1, 30, 6) @ torch.randn(1, 6, 100)
    axes = leading(x, 30)
    torch.testing.assert_close(x @ axes.mT @ axes, x, atol=1e-4, rtol=1e-4)


def unrotated(keys, first):
    """Llama's rotary embedding undone by complex numbers: channel i and i + D/2 are one of them. Keys (B, H, T, D)."""
    half = keys.shape[-1] // 2
    angles = torch.arange(first, first + keys.shape[2])[:, None] * 10000.0 ** -(torch.arange(half) / half)
    turned = torch.complex(*keys.double().split(half, dim=-1)) * torch.polar(torch.ones(()).double(), -angles.double())
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("svd", ["full", "randomized"])
def test_what_is_read_is_the_truncated_decomposition_of_the_text(svd):
    model, ids, ranks = tiny_model(), tokens(2, 300), (9, 14)
    stack = filled([XKV(ranks, layers=2, svd=svd)], model, ids)
    kv, sealed = dense(model, ids), slice(SINKS, -WINDOW)
    for first in (0, 2):  # the groups
        for role, rank in enumerate(ranks):
            layers = [kv[layer][role][:, :, sealed] for layer in (first, first + 1)]
            held = [
                (stack.read(layer, row).keys, stack.read(layer, row).values)
                for layer in (first, first + 1)
                for row in (0, 1)
            ]
            found = [torch.cat([x[role][:, :, sealed] for x in held[at : at + 2]]) for at in (0, 2)]
            if role == 0:
                layers, found = ([unrotated(x, SINKS) for x in xs] for xs in (layers, found))
            x, y = (
                torch.cat([part.transpose(1, 2).flatten(2) for part in xs], dim=-1).double() for xs in (layers, found)
            )
            u, s, v = torch.linalg.svd(x, full_matrices=False)
            by_hand = u[..., :rank] * s[:, None, :rank] @ v[:, :rank]
            if svd == "full":
                torch.testing.assert_close(y, by_hand, atol=1e-3, rtol=1e-3)
            assert (x - y).norm() <= 1.01 * (x - by_hand).norm()
            assert (x - y).norm() > 0.1 * x.norm(), "a random model has no low rank: something must be lost"


@pytest.mark.parametrize("length", [300, 250], ids=["sealed at once", "sealed on the way"])
def test_full_rank_is_dense(length):
    model, ids = tiny_model().double(), tokens(2, length)
    stack, plain = KVStack([FULL], model=model, **SETTINGS), DynamicCache(config=model.config)
    for part in (ids, *tokens(2, 20, seed=1).split(1, dim=1), tokens(2, 40, seed=2), tokens(2, 1, seed=3)):
        found, expected = (model(part, past_key_values=cache).logits for cache in (stack, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # keys are turned in float32
    assert sealed_tokens(stack) > 256


def test_full_rank_is_dense_in_single_precision():
    model, ids = tiny_model(), tokens(2, 300)
    stack = filled([FULL], model, ids)
    for layer, (keys, values) in enumerate(dense(model, ids)):
        for row in (0, 1):
            torch.testing.assert_close(stack.read(layer, row).keys[0], keys[row], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(stack.read(layer, row).values[0], values[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = tiny_model().to(dtype), tokens(2, 300)
    stack = filled([XKV((10_000, 10_000))], model, ids)
    assert all(x.dtype == dtype for name, x in codecs(stack)[0].fitted.items() if name != "left out at most")
    for layer, pair in enumerate(dense(model, ids)):
        for role, x in zip(("keys", "values"), pair, strict=True):
            found = torch.cat([getattr(stack.read(layer, row), role) for row in (0, 1)])
            assert float((found - x).float().norm() / x.float().norm()) < 4 * torch.finfo(dtype).eps


# ---- bytes


def test_bytes_by_hand():
    model, (rk, rv), rows, length = tiny_model(), (20, 30), 2, 300
    stack = filled([XKV((rk, rv), layers=2)], model, tokens(rows, length))
    groups, channels, sealed = 2, 2 * 2 * 16, length - SINKS - WINDOW
    factors = sealed * (rk + rv) * FLOAT
    bases = channels * (rk + rv) * FLOAT + 2 * FLOAT  # and a share of energy for keys and for values
    report = {part.part: part.nbytes for part in stack.report().parts if part.payer == repr(XKV((rk, rv), layers=2))}
    assert report.pop("bases") == rows * groups * bases
    assert report == {
        f"{role} factors: data": rows * groups * sealed * rank * FLOAT for role, rank in (("key", rk), ("value", rv))
    }
    assert stack.nbytes == sum(part.nbytes for part in stack.report().parts)
    raw = sum(part.nbytes for part in stack.report().parts if part.payer == "stack")
    assert stack.nbytes == raw + rows * groups * (factors + bases)


def test_rank_is_cut_to_the_channels():
    stack = filled([XKV((100, 768))], tiny_model(), tokens(1, 256 + SINKS + WINDOW))
    fitted = codecs(stack)[0].fitted
    assert [len(fitted[f"{role} 0"][0]) for role in ("key", "value")] == [100, 4 * 2 * 16]


@pytest.mark.parametrize("settings", [{}, {"decode": "dense"}])
def test_a_text_that_begins_short_stays_raw_and_never_takes_more(settings):
    model, stages = tiny_model(), [XKV((20, 30), **settings)]
    stack, seals = filled(stages, model, tokens(1, 20)), []
    for seed in range(10):
        model(tokens(1, 12, seed), past_key_values=stack)
        beside = sum(part.nbytes for part in stack.report().parts if part.part in ("reserve", "text hash"))
        assert stack.nbytes - beside <= stack.dense_nbytes
        seals.append(sealed_tokens(stack))
    least = 2 * 30
    assert 0 == min(seals) < least <= min(n for n in seals if n)


def test_a_text_that_begins_short_is_not_fitted_anew_for_ever(monkeypatch):
    """Random words, of far more rank than the bases: what these leave out is known after a few blocks."""
    model, fits, fit = tiny_model(), [], Factors.fit
    monkeypatch.setattr(
        Factors, "fit", lambda self, group, *old: fits.append(group[0].tokens) or fit(self, group, *old)
    )
    stack = filled([XKV((20, 30))], model, tokens(1, 20), block=32)
    for seed in range(1, 30):
        model(tokens(1, 32, seed), past_key_values=stack)
    assert sealed_tokens(stack) > 900
    assert len(fits) <= 10


# ---- later tokens


def test_later_tokens_are_projected_on_the_bases():
    """The least squares of numpy's solver, number by number."""
    group = [KV(torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 16)) for _ in range(4)]
    later = [KV(torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)) for _ in range(4)]
    codec = codec_of(XKV((12, 18))).fit(group)
    latents = {name: latent.data for name, latent in codec.forward(later).items()}
    for role in ("key", "value"):
        bases = torch.cat([codec.fitted[f"{role} {i}"].flatten(2)[0] for i in range(4)], dim=-1)  # (r, N)
        x = torch.cat([getattr(kv, f"{role}s")[0].transpose(0, 1).flatten(1) for kv in later], dim=-1)  # (T, N)
        expected = torch.linalg.lstsq(bases.T, x.T).solution.T
        torch.testing.assert_close(latents[f"{role} factors"][0, 0], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("refit", [None, 1e9])
def test_folding_leaves_the_bases_alone(refit):
    model = tiny_model()
    stack = filled([XKV((20, 30), refit=refit)], model, tokens(1, 200))
    before = {name: x.clone() for name, x in codecs(stack)[0].fitted.items()}
    for seed in range(40):
        model(tokens(1, 1, seed), past_key_values=stack)
    assert sealed_tokens(stack) == 200 + 40 - SINKS - WINDOW
    after = codecs(stack)[0].fitted
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_a_text_that_changes_is_fitted_anew():
    """Two turns of words that have nothing in common."""
    model = tiny_model()
    first, second = 3 + tokens(1, 150) % 6, 60 + tokens(1, 150, seed=1) % 6
    errors = {}
    for refit in (0.1, None):
        stack = filled([XKV((20, 30), refit=refit)], model, first)
        before = codecs(stack)[0].fitted["key 0"].clone()
        model(second, past_key_values=stack)
        values = dense(model, torch.cat([first, second], dim=1))[0][1][:, :, 150:-WINDOW]
        errors[refit] = float((stack.read(0).values[:, :, 150:-WINDOW] - values).norm() / values.norm())
        assert torch.equal(codecs(stack)[0].fitted["key 0"], before) == (refit is None)
        assert sealed_tokens(stack) == 300 - SINKS - WINDOW
    assert errors[0.1] < errors[None] / 2


def test_a_refit_is_made_on_decoded_and_new_tokens():
    """By hand: what was read before is decomposed with what is new."""
    model, ranks = tiny_model(), (20, 30)
    first, second = 3 + tokens(1, 150) % 6, 60 + tokens(1, 150, seed=1) % 6
    stack = filled([XKV(ranks, svd="full")], model, first)
    old = [stack.read(layer).values[:, :, SINKS:-WINDOW] for layer in range(4)]
    model(second, past_key_values=stack)
    other = filled([XKV(ranks, svd="full", decode="dense")], model, first)
    model(second, past_key_values=other)  # keeps raw what the second turn cached
    raw = [other.read(layer).values[:, :, -WINDOW - 150 : -WINDOW] for layer in range(4)]
    x = torch.cat([torch.cat(pair, dim=2).transpose(1, 2).flatten(2) for pair in zip(old, raw, strict=True)], dim=-1)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    by_hand = (u[..., : ranks[1]] * s[:, None, : ranks[1]] @ v[:, : ranks[1]]).unflatten(-1, (4, 2, 16))
    for layer in range(4):
        found = stack.read(layer).values[:, :, SINKS:-WINDOW]
        torch.testing.assert_close(found, by_hand[:, :, layer].transpose(1, 2), atol=1e-3, rtol=1e-3)


def test_what_a_refit_leaves_out_is_not_judged_by_decoded_tokens():
    group = [KV(torch.randn(1, 2, 200, 16), torch.randn(1, 2, 200, 16)) for _ in range(4)]
    new = [KV(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)) for _ in range(4)]
    codec = codec_of(XKV((12, 18), svd="full")).fit(group)
    latents = {name: latent.data for name, latent in codec.forward(group).items()}
    decoded = [codec.inverse(latents, i) for i in range(4)]
    both = [
        KV(torch.cat([old.keys, kv.keys], dim=2), torch.cat([old.values, kv.values], dim=2))
        for old, kv in zip(decoded, new, strict=True)
    ]
    again = codec.fit(both, 200)
    for role, rank in enumerate((12, 18)):
        # by hand: what the new tokens lose, and a tenth of the variance of all
        x, y = (
            torch.cat([(kv.keys, kv.values)[role][0].transpose(0, 1).flatten(1) for kv in kvs], dim=-1)
            for kvs in (both, new)
        )
        axes = torch.linalg.svd(x).Vh[:rank]
        lost = (y - y @ axes.T @ axes).square().sum(1).mean()
        most = lost + 0.1 * (x - x.mean(0)).square().sum(1).mean()
        assert most > codec.fitted["left out at most"][0, role]
        torch.testing.assert_close(again.fitted["left out at most"][0, role], most)
    assert not again.needs_refit(new)


def test_what_all_tokens_have_in_common_does_not_hide_what_is_new():
    """Keys with a bias: nearly all of their energy is in one direction."""
    bias = 30 * torch.randn(1, 2, 1, 16)
    axes = torch.linalg.qr(torch.randn(32, 32)).Q[:24].unflatten(1, (2, 16))

    def text(length, directions):
        x = bias + torch.einsum("tr,rhd->htd", torch.randn(length, 12), axes[directions])
        return [KV(x, torch.randn(1, 2, length, 16))]

    codec = codec_of(XKV((14, 32), layers=1)).fit(text(200, slice(12)))
    assert not codec.needs_refit(text(32, slice(12)))
    assert codec.needs_refit(text(32, slice(12, 24)))


def test_dense_leaves_later_tokens_raw():
    model, ids = tiny_model(), tokens(1, 200)
    stack = filled([XKV((20, 30), decode="dense")], model, ids)
    held = sealed_tokens(stack)
    model(tokens(1, 60, seed=1), past_key_values=stack)
    assert sealed_tokens(stack) == held == 200 - SINKS - WINDOW
    assert stack.batch.cohorts[0].stores[0].raw_tokens == SINKS + WINDOW + 60


# ---- everything a cache is asked


STACKS = {
    "alone": [XKV((20, 30))],
    "refit at once": [XKV((20, 30), refit=1e-6)],
    "quant, evict": [XKV((20, 30), layers=2), Quant(4, group=8), Evict(0.5)],
    "dense, quant": [XKV((20, 30), decode="dense"), Quant(8, group=8)],
    "rough": [XKV((20, 30), exact=8, rough=12), Quant(4, group=8), Evict(0.5)],
}
every = pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)


@every
def test_generate(stages):
    model, ids = tiny_model(), tokens(2, 150)
    stack = KVStack(stages, **SETTINGS)
    model.generate(ids, past_key_values=stack, max_new_tokens=40, do_sample=False)
    assert (stack.seen, stack.compression > 0.2) == (189, True)
    assert stack.nbytes == sum(part.nbytes for part in stack.report().parts)


def test_greedy_and_beams_of_full_rank_are_those_of_a_dense_cache():
    model, ids = tiny_model().double(), tokens(2, 300)
    for beams in (1, 3):
        settings = {"max_new_tokens": 30, "do_sample": False, "num_beams": beams}
        found = model.generate(ids, past_key_values=KVStack([FULL], **SETTINGS), **settings)
        assert torch.equal(found, model.generate(ids, **settings))


@every
def test_beams_run(stages):
    model, ids = tiny_model(), tokens(1, 120)
    stack = KVStack(stages, **SETTINGS)
    model.generate(ids, past_key_values=stack, max_new_tokens=30, do_sample=False, num_beams=3)
    assert stack.batch_size == 3
    assert all(len(x) == 3 for codec in codecs(stack) for x in codec.fitted.values())


@every
def test_a_padded_row_equals_the_row_alone(stages):
    # float64: in float32 rounding can move a number to the next code
    model, lengths = tiny_model().double(), (120, 75)
    ids, mask = tokens(2, 120), torch.ones(2, 120, dtype=torch.long)
    ids[1, :45], mask[1, :45] = 0, 0
    steps, settings = 30, {"max_new_tokens": 30, "do_sample": False}
    stack = KVStack(stages, **SETTINGS)
    found = model.generate(ids, attention_mask=mask, past_key_values=stack, **settings)[:, -steps:]
    for row, length in enumerate(lengths):
        alone = KVStack(stages, **SETTINGS)
        expected = model.generate(ids[row : row + 1, -length:], past_key_values=alone, **settings)[:, -steps:]
        assert torch.equal(found[row : row + 1], expected)
        torch.testing.assert_close(stack.read(0, row).keys, alone.read(0).keys, atol=1e-5, rtol=1e-5)


@every
def test_one_query_read_from_factors_equals_rebuilding(stages):
    stages = [dataclasses.replace(stages[0], exact=None), *stages[1:]]
    model, ids = tiny_model(), tokens(2, 150)
    fused, rebuilt = (filled(stages, model, ids, fused=fused) for fused in (True, False))
    for seed in range(BLOCK + 2):
        new = tokens(2, 1, seed)
        found, expected = (model(new, past_key_values=cache).logits for cache in (fused, rebuilt))
        if seed < BLOCK - 1:  # until codes of new tokens may differ by a step
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert fused.held == rebuilt.held


@every
def test_rows(stages):
    stack = filled(stages, tiny_model(), tokens(3, 150))
    before = [stack.read(1, row).keys for row in range(3)]
    stack.reorder_cache(torch.tensor([2, 0, 1]))
    stack.batch_repeat_interleave(2)
    stack.batch_select_indices(torch.tensor([0, 3, 5]))
    assert all(torch.equal(stack.read(1, row).keys, before[old]) for row, old in enumerate([2, 0, 1]))


@every
def test_crop_and_reset(stages):
    model, ids = tiny_model(), tokens(2, 150)
    stack = filled(stages, model, ids)
    before = stack.read(3)
    stack.crop(-60)  # into the sealed part
    assert stack.seen == 90
    n = sealed_tokens(stack)
    assert 0 < n <= 88
    torch.testing.assert_close(stack.read(3).keys[:, :, : SINKS + n], before.keys[:, :, : SINKS + n])
    model(tokens(2, 30, seed=1), past_key_values=stack)
    stack.crop(-119)  # to one token
    assert sealed_tokens(stack) == 0
    assert all(not codec.fitted for codec in codecs(stack))
    stack.crop(-1)
    again, fresh = stack, KVStack(stages, model=model, **SETTINGS)
    for _ in range(2):
        found, expected = (
            (model(ids, past_key_values=c), model(tokens(2, 1), past_key_values=c))[1].logits for c in (again, fresh)
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        again.reset()
        fresh.reset()
    assert stack.nbytes == 0


@every
def test_a_saved_cache_and_a_copy_go_on_bit_for_bit(stages, tmp_path):
    model = tiny_model()
    stack = filled(stages, model, tokens(2, 150))
    stack.save(tmp_path / "cache.safetensors")
    others = [KVStack.load(tmp_path / "cache.safetensors", model=model), copy.deepcopy(stack)]
    assert all(other.nbytes <= stack.nbytes for other in others)
    for seed, length in enumerate((1, 40, 1, 1)):
        new = tokens(2, length, seed)
        expected = model(new, past_key_values=stack).logits
        assert all(torch.equal(model(new, past_key_values=other).logits, expected) for other in others)


def test_eviction_drops_rows_of_factors():
    model, ids = tiny_model(), tokens(1, 300)
    stack = filled([XKV((20, 30)), Quant(4, group=8), Evict(0.5)], model, ids)
    n = sealed_tokens(stack)
    assert n <= 145
    model(tokens(1, 100, seed=1), past_key_values=stack)
    assert stack.held <= 0.5 * (400 - SINKS - WINDOW) + SINKS + WINDOW
    packed = stack.batch.cohorts[0].stores[0].packed[0, "key factors"]
    assert packed.tokens == sealed_tokens(stack)
    assert packed.width == 20


@pytest.mark.parametrize("turns", [(200, 300), (400, 600)])
def test_a_second_turn_that_drops_all_that_is_sealed(turns):
    model = tiny_model()
    stack = KVStack([XKV(), Evict(0.3, "streaming")], model=model)
    for turn in turns:
        model(tokens(1, turn), past_key_values=stack)
    kept = stack.positions(0)[0]
    assert sealed_tokens(stack) == len(kept) - 4 - 64
    assert int(kept[4]) > turns[0]


def test_chunked_prefill_of_full_rank_is_dense():
    model, ids = tiny_model().double(), tokens(1, 400)
    stack = KVStack([FULL], model=model, **SETTINGS)
    found = torch.cat([model(part, past_key_values=stack).logits for part in ids.split(30, dim=1)], dim=1)
    torch.testing.assert_close(found, model(ids).logits, atol=1e-3, rtol=1e-3)


def test_channels_of_equal_strength_bear_a_shared_step_better():
    """Why the strength goes with the bases: 4 bits, one step for all channels of a token."""
    x = torch.randn(200, 64) @ torch.diag(2.0 ** -torch.arange(64).div(8)) @ torch.randn(64, 64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)

    def error(z, b):
        step = z.abs().amax(1, keepdim=True) / 7
        return float(((z / step).round() * step @ b - x).norm() / x.norm())

    assert error(u, s[:, None] * v) < error(u * s, v)


def test_factors_of_later_tokens_fit_into_half_precision():
    """A text of one direction, then one that lies across it."""
    line = torch.randn(1, 2, 1, 16)
    group = [KV(line * torch.randn(1, 1, 80, 1), line * torch.randn(1, 1, 80, 1)) for _ in range(4)]
    group = [KV(kv.keys.half() * 50, kv.values.half() * 50) for kv in group]
    other = [KV(torch.randn(1, 2, 8, 16).half() * 50, torch.randn(1, 2, 8, 16).half() * 50) for _ in range(4)]
    latents = codec_of(FULL).fit(group).forward(other)
    assert all(bool(torch.isfinite(latent.data).all()) for latent in latents.values())
    assert all(latent.data.dtype == torch.float16 for latent in latents.values())


def test_a_text_of_nothing_but_zeros():
    group = [KV(torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16)) for _ in range(4)]
    codec = codec_of(XKV((8, 8))).fit(group)
    assert not codec.needs_refit(group)
    back = codec.inverse({name: latent.data for name, latent in codec.forward(group).items()}, 0)
    assert torch.equal(back.keys, group[0].keys)


def test_keys_that_are_no_numbers():
    group = [KV(torch.full((1, 2, 40, 16), torch.nan), torch.zeros(1, 2, 40, 16)) for _ in range(4)]
    with pytest.raises(UseError, match=r"XKV\(\): keys hold NaN or infinity\. Check the model's dtype"):
        codec_of(XKV()).fit(group)


# ---- models that cache latents

SMALL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
SMALL |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
SMALL |= {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
SMALL |= {"first_k_dense_replace": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
DEEPSEEK = {"v2": (DeepseekV2Config, DeepseekV2ForCausalLM), "v3": (DeepseekV3Config, DeepseekV3ForCausalLM)}
deepseeks = pytest.mark.parametrize("version", DEEPSEEK)


def deepseek(version):
    config, model = DEEPSEEK[version]
    torch.manual_seed(0)
    return model(config(**SMALL, initializer_range=0.2, eos_token_id=None)).eval()


@deepseeks
def test_latents_are_decomposed_and_rotary_keys_left_alone(version):
    model, ids, rank = deepseek(version), tokens(1, 200), 24
    stack = filled([XKV((rank, 999), svd="full"), Quant(8, group=8)], model, ids)
    alone = filled([XKV((rank, 999), svd="full")], model, ids)
    kv, sealed = dense(model, ids), slice(SINKS, -WINDOW)
    x = torch.cat([keys[:, 0, sealed] for keys, _ in kv], dim=-1)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    by_hand = (u[..., :rank] * s[:, None, :rank] @ v[:, :rank]).split(32, dim=-1)
    for layer in range(4):
        assert torch.equal(stack.read(layer).values, kv[layer][1]), "the rotary key is stored as it is"
        torch.testing.assert_close(alone.read(layer).keys[:, 0, sealed], by_hand[layer], atol=1e-3, rtol=1e-3)
    assert alone.nbytes == sum(part.nbytes for part in alone.report().parts)
    parts = {part.part: part.nbytes for part in alone.report().parts}
    assert [parts[f"rotary key {i}: data"] for i in range(4)] == [190 * 16 * FLOAT] * 4
    assert stack.compression > alone.compression > 0.3


@deepseeks
def test_full_rank_is_dense_with_latents_too(version):
    model, ids = deepseek(version).double(), tokens(1, 300)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    stack = KVStack([FULL], **SETTINGS)
    assert torch.equal(model.generate(ids, past_key_values=stack, max_new_tokens=30, do_sample=False), expected)


@deepseeks
def test_latents_with_eviction_and_rows(version):
    model, ids = deepseek(version), tokens(2, 150)
    stack = KVStack([XKV(keep=0.5, layers=2), Quant(4, group=8), Evict(0.5, "keydiff")], **SETTINGS)
    model.generate(ids, past_key_values=stack, max_new_tokens=20, do_sample=False)
    before = stack.read(0, 1).keys
    stack.batch_select_indices(torch.tensor([1]))
    assert torch.equal(stack.read(0).keys, before)


# ---- rough scores


def test_rough_scores_change_the_answer_and_not_the_prompt():
    model, ids = tiny_model(), tokens(1, 8 * 24 + SINKS + WINDOW)
    some, all_of_them = (filled([XKV((40, 60), exact=n, rough=36)], model, ids) for n in (64, None))
    new = tokens(1, 1)
    one, other = (model(new, past_key_values=cache).logits for cache in (some, all_of_them))
    assert 1e-4 < float((one - other).abs().max()) < 0.5 * float(other.abs().max())
    ids = tokens(1, 5, seed=1)
    for cache in (some, all_of_them):
        cache.crop(-1)
    one, other = (model(ids, past_key_values=cache).logits for cache in (some, all_of_them))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)  # several queries read all


def test_how_a_layer_reads_linearly():
    """Factors times bases are what `inverse` gives."""
    group = [KV(torch.randn(2, 2, 80, 16), torch.randn(2, 2, 80, 16)) for _ in range(4)]
    codec = codec_of(XKV((12, 18))).fit(group)
    latents = {name: latent.data for name, latent in codec.forward(group).items()}
    for layer in range(len(group)):
        kv = codec.inverse(latents, layer)
        for kind, expected in (("keys", kv.keys), ("values", kv.values)):
            linear = codec.linear(kind, layer)
            found = torch.einsum("btr,brhd->bhtd", latents[linear.latent][:, 0], linear.axes)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


# ---- its cost


def test_its_share_of_the_prefill_can_be_measured():
    options = ["--tiny", "--threads", "1", "--rounds", "1", "--steps", "8", "--contexts", "128"]
    done = CliRunner().invoke(
        app, ["bench", "decode", *options, "--stack", "xkv:keep=0.25,layers=2"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert "xkv:keep=0.25,layers=2" in done.output
