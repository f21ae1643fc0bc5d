"""MiniCache: directions of two layers in one, lengths of both, divergent tokens apart."""

import copy
import math

import pytest
import torch
from kvstack_minicache import Merged, MiniCache, parted, slerp
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from kvstack import KV, BindError, Evict, KVStack, Quant, StageError
from kvstack.authoring import storage_bytes
from kvstack.testing import check_registered, check_stage, tiny_model

SETTINGS = {"sinks": 2, "window": 8, "block": 8}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group(tokens=128, rows=2, heads=2, width=16):
    return [KV(*(numbers(rows, heads, tokens, width, seed=2 * i + j) for j in range(2))) for i in range(2)]


def fitted(**settings):
    """The codec that merges the layers 2 and 3."""
    return MiniCache(**settings).bind(tiny_model()).for_group([2, 3])


def back(codec, group):
    latents = {name: latent.data for name, latent in codec.forward(group).items()}
    return [codec.inverse(latents, i) for i in range(2)]


def ids(rows=1, length=300, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- against plain loops


def between(a, b, t):
    """The unit vector between two lists, by the formula, and the angle."""
    la, lb = (math.sqrt(sum(x * x for x in v)) for v in (a, b))
    a, b = [x / la for x in a], [x / lb for x in b]
    angle = math.acos(sum(x * y for x, y in zip(a, b, strict=True)))
    one, two = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [one * x + two * y for x, y in zip(a, b, strict=True)], angle, la, lb


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_slerp_is_the_formula(t):
    a, b = numbers(20, 8), numbers(20, 8, seed=1)
    found, angles = slerp(parted(a)[0], parted(b)[0], t)
    for i in range(20):
        expected, angle, *_ = between(a[i].tolist(), b[i].tolist(), t)
        torch.testing.assert_close(found[i], torch.tensor(expected), atol=1e-5, rtol=0)
        assert abs(float(angles[i]) - angle) < 1e-5


def test_forward_and_inverse_are_the_loops():
    """Every token and head, keys and values: the most divergent of every 64 tokens as they were, the rest merged."""
    both, codec = group(tokens=128), fitted(retain=0.05)
    found = back(codec, both)
    for role in ("keys", "values"):
        pair = [getattr(kv, role) for kv in both]
        for row, head in ((0, 0), (1, 1)):
            tokens = [between(*(x[row, head, i].tolist() for x in pair), 0.6) for i in range(128)]
            for start in (0, 64):
                order = sorted(range(start, start + 64), key=lambda i: tokens[i][1], reverse=True)
                for i in order:
                    merged, _, *lengths = tokens[i]
                    for layer in range(2):
                        now = getattr(found[layer], role)[row, head, i]
                        expected = torch.tensor(merged) * lengths[layer]
                        if i in order[:3]:  # 0.05 of 64
                            expected = pair[layer][row, head, i]
                        torch.testing.assert_close(now, expected, atol=1e-5, rtol=0)


def test_rotation_makes_no_difference():
    """Two vectors turned by one rotation: their interpolation is turned with them, so keys are merged as cached."""
    turn, _ = torch.linalg.qr(numbers(16, 16))
    a, b = (parted(numbers(50, 16, seed=i))[0] for i in (1, 2))
    turned, angle = slerp(a @ turn, b @ turn, 0.6)
    plain, same = slerp(a, b, 0.6)
    torch.testing.assert_close(turned, plain @ turn, atol=1e-5, rtol=0)
    torch.testing.assert_close(angle, same, atol=1e-5, rtol=0)


# ---- exactness


def assert_same(found, exact):
    for now, then in zip(found, exact, strict=True):
        torch.testing.assert_close(now.keys, then.keys, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(now.values, then.values, atol=1e-5, rtol=1e-6)


def test_identical_layers_lose_nothing():
    one, _ = group()
    both = [one, KV(3 * one.keys, 0.5 * one.values)]  # the same directions, other lengths
    assert_same(back(fitted(retain=0.0), both), both)


def test_all_tokens_retained_lose_nothing():
    both = group()
    assert_same(back(fitted(retain=1.0), both), both)


def test_lengths_are_kept():
    both = group()
    for now, then in zip(back(fitted(retain=0.0), both), both, strict=True):
        torch.testing.assert_close(now.keys.norm(dim=-1), then.keys.norm(dim=-1))
        torch.testing.assert_close(now.values.norm(dim=-1), then.values.norm(dim=-1))


def test_the_divergent_tokens_are_retained():
    """Not the similar ones: three tokens whose layers disagree, two of them opposite, among 61 that agree."""
    one, other = group(tokens=64)
    deep = KV(one.keys + 0.1 * other.keys, one.values + 0.1 * other.values)
    odd = [5, 20, 63]
    deep.keys[:, :, odd] = torch.stack([-one.keys[:, :, 5], -2 * one.keys[:, :, 20], other.keys[:, :, 63]], dim=2)
    codec = fitted(retain=0.05)
    latents = codec.forward([one, deep])
    assert latents["places of keys"].data[..., 0].tolist() == [[odd] * 2] * 2
    assert torch.equal(latents["unmerged keys"].data, one.keys[:, :, odd])
    assert latents["unmerged keys"].exact
    first, second = back(codec, [one, deep])
    assert torch.equal(first.keys[:, :, odd], one.keys[:, :, odd])
    torch.testing.assert_close(second.keys[:, :, odd], deep.keys[:, :, odd])
    assert not torch.allclose(first.keys[:, :, 6], one.keys[:, :, 6], atol=1e-3)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.001, 1), (0.05, 3), (0.5, 32), (1.0, 64)])
def test_how_many_are_retained(share, count):
    codec = fitted(retain=share)
    assert codec.retained == count
    latents = codec.forward(group(tokens=128))
    held = latents["unmerged keys"].data.shape[2] if count else 0
    assert held == 2 * count
    assert latents["keys"].data.shape[2] == 128, "all tokens have a direction: a retained one has the deeper layer's"


@pytest.mark.parametrize("t", [0.0, 0.4, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("retain", [0.0, 0.05])
def test_no_vectors_make_nan(t, retain):
    """Parallel, opposite, nearly so, zero, huge and tiny ones."""
    a = numbers(1, 1, 64, 16)
    b = a.clone()
    b[:, :, 1:8] *= -1
    b[:, :, 8:16] *= 1 + 1e-7 * numbers(8, 16)
    b[:, :, 16:24] *= -1 + 1e-7 * numbers(8, 16)
    a[:, :, 24:32] = 0
    b[:, :, 28:36] = 0
    a[:, :, 36:40] *= 1e30
    b[:, :, 40:44] *= 1e-30
    both = [KV(a, b), KV(b, a)]
    for now, then in zip(back(fitted(t=t, retain=retain), both), both, strict=True):
        for x, y in ((now.keys, then.keys), (now.values, then.values)):
            assert bool(torch.isfinite(x).all())
            torch.testing.assert_close(x.double().norm(dim=-1), y.double().norm(dim=-1), atol=0, rtol=1e-6)
            torch.testing.assert_close(x[:, :, :1], y[:, :, :1])


def test_a_zero_vector_leaves_the_other_as_it_is():
    a, zero = parted(numbers(3, 8))[0], torch.zeros(3, 8)
    for t in (0.0, 0.6, 1.0):
        torch.testing.assert_close(slerp(a, zero, t)[0], a)
        torch.testing.assert_close(slerp(zero, a, t)[0], a)
        assert torch.equal(slerp(zero, zero, t)[0], zero)


# ---- in a stack


def filled(stages, model=None, tokens=2 + 8 + 192, **settings):
    model = model or tiny_model()
    stack = KVStack(stages, model=model, **(SETTINGS | settings))
    model(ids(1, tokens), past_key_values=stack)
    return stack


@pytest.mark.parametrize("encode", [[], [Quant(4)]], ids=repr)
def test_layers_below_start_are_left_alone(encode):
    """Half the layers are what they are without the stage, bit for bit; the others are not."""
    stack, without = filled([MiniCache(), *encode]), filled(encode)
    same = [torch.equal(stack.read(i).keys, without.read(i).keys) for i in range(4)]
    same_values = [torch.equal(stack.read(i).values, without.read(i).values) for i in range(4)]
    assert same == same_values == [True, True, False, False]


@pytest.mark.parametrize(("start", "left"), [(0.0, 0), (0.3, 2), (0.5, 2), (0.75, 4), (1.0, 4)])
def test_start_counts_whole_pairs(start, left):
    bound = MiniCache(start=start).bind(tiny_model())
    codecs = [bound.for_group([first, first + 1]) for first in (0, 2)]
    assert sum(2 for codec in codecs if not isinstance(codec, Merged)) == left


def test_bytes_by_hand():
    """192 sealed tokens of 4 layers, 2 heads of 16, float32; the upper pair is merged."""
    found = {part.part: part.nbytes for part in filled([MiniCache()]).report().parts if "Mini" in part.payer}
    left_alone = 2 * 2 * 192 * 16 * 4  # layers, heads, tokens, channels, bytes
    merged = 2 * 192 * 16 * 4
    assert found == {
        "keys: data": left_alone + merged,
        "values: data": left_alone + merged,
        "norms: data": 4 * 2 * 192 * 4,  # of keys and values of two layers
        "unmerged keys: data": 2 * 9 * 16 * 4,  # 3 of every 64
        "unmerged values: data": 2 * 9 * 16 * 4,
        "places of keys: data": 2 * 9,
        "places of values: data": 2 * 9,
    }


def test_codes_are_of_half_the_numbers():
    """Above `start`, Quant packs one direction where it packed two keys: in all three quarters of the codes."""
    codes = {
        name: sum(p.nbytes for p in filled(stages).report().parts if p.part.endswith("codes"))
        for name, stages in (("with", [MiniCache(), Quant(2)]), ("without", [Quant(2)]))
    }
    assert codes["with"] / codes["without"] == 3 / 4


def test_keys_that_are_read_are_nearer_with_more_retained():
    model = tiny_model()
    dense = DynamicCache()
    model(ids(1, 202), past_key_values=dense)
    errors = []
    for retain in (0.0, 0.1, 0.5, 1.0):
        stack = filled([MiniCache(start=0.0, retain=retain)], model)
        errors.append(sum(float((stack.read(i).keys - dense.layers[i].keys).square().sum()) for i in range(4)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]


def test_contract():
    check_stage(MiniCache())
    check_stage(MiniCache(start=0.0, t=0.5, retain=0.0))
    check_stage(MiniCache(start=0.0, retain=0.5))


STACKS = {
    "alone": [MiniCache(start=0.0)],
    "quant4": [MiniCache(), Quant(4)],
    "evict": [MiniCache(), Evict(0.5)],
    "all": [MiniCache(), Quant(2), Evict(0.5)],
    "nf4": [MiniCache(0.0, retain=0.2), Quant(4, codec="nf4")],
}
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.mark.parametrize("name", STACKS)
def test_rows_crop_copy_and_disk(name, tmp_path):
    """A left-padded batch goes on after a crop exactly as its saved copy does; beams run."""
    model = tiny_model()
    padded = ids(2, 300)
    mask = torch.ones_like(padded)
    padded[0, :60] = mask[0, :60] = 0
    stack = KVStack(STACKS[name], **SETTINGS)
    out = model.generate(padded, attention_mask=mask, past_key_values=stack, **GREEDY)
    assert out.shape == (2, 324)
    assert stack.nbytes == storage_bytes(stack.tensors())
    assert stack.nbytes < stack.dense_nbytes
    stack.crop(-50)  # through a granule
    stack.save(tmp_path / "cache.safetensors")
    again = KVStack.load(tmp_path / "cache.safetensors", model=model)
    assert (again.seen, again.held, repr(again)) == (stack.seen, stack.held, repr(stack))
    for step in range(40):
        new, mask = torch.full((2, 1), 5 + step), torch.ones(2, stack.seen + 1, dtype=torch.long)
        mask[0, :60] = 0
        found, expected = (model(new, attention_mask=mask, past_key_values=cache).logits for cache in (again, stack))
        assert torch.equal(found, expected)
    beams = KVStack(STACKS[name], **SETTINGS)
    assert model.generate(ids(), past_key_values=beams, num_beams=3, **GREEDY).shape == (1, 324)


@pytest.mark.parametrize("name", [name for name in STACKS if name != "nf4"])  # which has no codes for float64
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


def test_both_ways_to_read_agree():
    model, new = tiny_model(), torch.tensor([[7]])
    found = [model(new, past_key_values=filled(STACKS["quant4"], model, fused=fused)).logits for fused in (True, False)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


# ---- names and mistakes


def test_it_is_found_by_its_name():
    check_registered(MiniCache(start=0.4, retain=0.1))
    assert repr(KVStack.from_spec("minicache:retain=0.1+quant:4")) == "KVStack([MiniCache(retain=0.1), Quant(bits=4)])"


def test_it_is_in_the_catalogue():
    from typer.testing import CliRunner

    from kvstack.cli.commands import app

    done = CliRunner().invoke(app, ["stages"])
    (row,) = (line for line in done.stdout.splitlines() if "│ minicache" in line)
    found = [cell.strip() for cell in row.strip("│").split("│")]
    assert found[1:3] == ["MiniCache", "transform"]


@pytest.mark.parametrize("name", ["start", "t", "retain"])
@pytest.mark.parametrize("value", [-0.1, 1.5, "half", True])
def test_settings_that_are_no_share(name, value):
    with pytest.raises(StageError, match=rf"MiniCache\({name}=.*{name} is .* from 0 to 1\. Use {name}=0\.\d"):
        MiniCache(**{name: value})


def test_an_odd_number_of_layers():
    """The last is left alone, and goes on as it would without the stage."""
    model = tiny_model(num_hidden_layers=5)
    stack, plain = (KVStack([*stages, Quant(4, group=8)], model=model) for stages in ([MiniCache(start=0.0)], []))
    for cache in (stack, plain):
        model(ids(2, 200), past_key_values=cache)
        model(ids(2, 1), past_key_values=cache)
    codecs = stack.binding.plan.codecs
    assert [isinstance(codec, Merged) for codec in codecs] == [True, True, False]
    assert stack.read(4).keys.shape == plain.read(4).keys.shape
    assert stack.nbytes < plain.nbytes


def test_layers_that_hold_something():
    """Neighbours among those are paired."""
    model = tiny_model()
    bound = MiniCache().bind(model, [0, 3])
    assert isinstance(MiniCache(start=0.0).bind(model, [0, 3]).for_group([0, 3]), Merged)
    assert not isinstance(bound.for_group([0, 3]), Merged), "half of one pair is a pair"
    bound = MiniCache(start=0.0).bind(model, [0, 1, 3])
    assert isinstance(bound.for_group([0, 1]), Merged)
    assert not isinstance(bound.for_group([3]), Merged), "nothing is left to pair it with"


def test_layers_that_hold_other_shapes():
    model = tiny_model()
    wide = copy.deepcopy(model.config)
    wide.num_key_value_heads = 4
    model.model.layers[3].self_attn = LlamaAttention(wide, 3).eval()
    message = r"pairs layers 2 and 3 of LlamaForCausalLM, and they hold 2 heads of 16 \+ 16 numbers and 4 heads of"
    with pytest.raises(BindError, match=message):
        KVStack([MiniCache()], model=model)
