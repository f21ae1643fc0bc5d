"""Invariants, for whatever sizes hypothesis thinks of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack import Evict, KVStack, Quant, SnapKV
from kvstack.encode.bits import PLANES, multiple, pack, unpack
from kvstack.encode.kivi import Kivi
from kvstack.store.budget import allowance, choose, how_many

from . import tiny

LAYERS = 2


def model():
    return tiny.model("llama", num_hidden_layers=LAYERS)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(stages, length, decode=0, **settings):
    stack = KVStack(stages, **settings)
    ids = tiny.tokens(1, length + decode)
    model()(ids[:, :length], past_key_values=stack)
    for i in range(length, length + decode):
        model()(ids[:, i : i + 1], past_key_values=stack)
    return stack


# ---- bits


@given(
    bits=st.sampled_from(sorted(PLANES)), runs=st.integers(1, 9), dim=st.sampled_from([1, 2]), seed=st.integers(0, 99)
)
def test_pack_and_unpack(bits, runs, dim, seed):
    n = runs * multiple(bits)
    shape = [3, n, 4] if dim == 1 else [3, 4, n]
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits, dim)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits, dim, n), codes)


# ---- quantizer

KIVI = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group": st.sampled_from([8, 16]),
    "role": st.sampled_from(["keys", "values"]),
    "granules": st.integers(1, 4),
    "scale": st.sampled_from([1e-6, 1e-2, 1.0, 300.0, 2e5]),
    "offset": st.sampled_from([0.0, -3.0, 1000.0]),
    "seed": st.integers(0, 99),
}


def steps(kivi, packed, role):
    """The step of every number, shaped like the decoded tensor."""
    step = packed.parts["scale"].float()
    return step.repeat_interleave(kivi.group, dim=3 if role == "values" else 2)


@given(**KIVI)
def test_within_half_a_step_and_stable(bits, group, role, granules, scale, offset, seed):
    kivi = Kivi(bits, group)
    x = numbers(seed, 1, 2, granules * group, 16) * scale + offset
    packed = kivi.encode(x, role)
    once = kivi.decode(packed, role)
    # float32 arithmetic on numbers of this size
    rounding = (abs(offset) + 8 * scale) * 2**-20
    half = steps(kivi, packed, role) / 2
    assert bool(((once - x).abs() <= half * 1.001 + rounding).all())
    again = kivi.decode(kivi.encode(once, role), role)
    size = x.abs().max()
    exact = size * 2**-10 < half.min() or size > 6e4  # halves are fine enough, or too small and not used
    assert bool(((again - once).abs() <= half * (0.02 if exact else 1.001) + rounding * 2).all())


@given(bits=st.sampled_from([2, 3, 4, 8]), role=st.sampled_from(["keys", "values"]), seed=st.integers(0, 99))
def test_numbers_on_the_grid_survive_exactly(bits, role, seed):
    kivi = Kivi(bits, 8)
    codes = torch.randint(0, 2**bits, (1, 2, 16, 16), generator=torch.Generator().manual_seed(seed)).float()
    grouped = codes.unflatten(3 if role == "values" else 2, (2, 8))
    axis = 4 if role == "values" else 3
    grouped.select(axis, 0).fill_(0)
    grouped.select(axis, 1).fill_(2**bits - 1)  # every group spans its grid
    x = (grouped * 0.25 - 3).reshape(1, 2, 16, 16)
    assert torch.equal(kivi.decode(kivi.encode(x, role), role), x)


@pytest.mark.parametrize("value", [0.0, 5.0, -7.25, 1e-8, 123456.0])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_groups_that_do_not_vary(role, value):
    x = torch.full((1, 1, 16, 16), value)
    kivi = Kivi(2, 8)
    torch.testing.assert_close(kivi.decode(kivi.encode(x, role), role), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", ["kivi", "nf4", "int8"])
def test_dtypes_come_back(codec, dtype):
    stage = Quant(8 if codec == "int8" else 4, codec=codec)
    x = numbers(0, 1, 2, 128, 64).to(dtype)
    for role in ("keys", "values"):
        back = stage.decode(stage.encode(x, role), role)
        assert back.dtype == dtype
        assert float((back.float() - x.float()).norm() / x.float().norm()) < 0.15


@given(seed=st.integers(0, 20), role=st.sampled_from(["keys", "values"]))
def test_more_bits_lose_less(seed, role):
    x = numbers(seed, 1, 2, 64, 32)
    errors = [float((Kivi(b, 32).decode(Kivi(b, 32).encode(x, role), role) - x).norm()) for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


# ---- budgets

COUNTS = {
    "middle": st.integers(0, 500),
    "keep": st.one_of(st.floats(0.01, 1.0), st.integers(1, 400)),
    "granule": st.sampled_from([1, 8, 32]),
    "block": st.sampled_from([1, 8, 32]),
}


@given(**COUNTS, fresh=st.integers(0, 500))
def test_never_more_than_the_budget(middle, keep, granule, block, fresh):
    budget = allowance(keep, middle + 12, 4, 8)
    gone = how_many(middle, min(fresh, middle), budget, granule, block)
    assert 0 <= gone <= middle
    assert middle - gone <= max(budget, 0)
    if middle <= budget:
        assert gone == 0


@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    granules=st.integers(0, 6),
    singles=st.integers(0, 40),
    granule=st.sampled_from([1, 4, 8]),
    data=st.data(),
)
def test_what_stays_is_ascending_and_of_one_length(rows, heads, granules, singles, granule, data):
    packed = granules * granule
    # the numbers that how_many can ask for: up to all raw tokens, or whole granules
    most = (packed + singles) // granule * granule
    drop = data.draw(st.one_of(st.integers(0, singles), st.integers(0, most // granule).map(lambda n: n * granule)))
    scores = numbers(1, rows, heads, packed + singles)
    cut = choose(scores, packed, granule, drop)
    left = cut.granules.shape[-1] * granule + cut.raw.shape[-1]
    assert left == packed + singles - drop
    for index in (cut.granules, cut.raw):
        assert bool((index.diff(dim=-1) > 0).all())


@given(singles=st.integers(1, 60), drop=st.integers(0, 60), seed=st.integers(0, 50))
def test_the_best_stay(singles, drop, seed):
    drop = min(drop, singles)
    scores = numbers(seed, 1, 1, singles)
    cut = choose(scores, 0, 1, drop)
    expected = scores[0, 0].topk(singles - drop).indices.sort().values
    assert torch.equal(cut.raw[0, 0], expected)


# ---- stacks


@given(
    length=st.integers(1, 150),
    decode=st.integers(0, 30),
    keep=st.one_of(st.sampled_from([0.05, 0.3, 0.9]), st.integers(1, 60)),
    quant=st.booleans(),
    layers=st.sampled_from([1, 2]),
    sinks=st.integers(0, 5),
    window=st.integers(0, 20),
)
def test_budget_sinks_window_positions(length, decode, keep, quant, layers, sinks, window):
    stages = [Evict(keep, SnapKV(window=8), layers=layers)] + [Quant(4, group=8)] * quant
    stack = filled(stages, length, decode, sinks=sinks, window=window, block=8)
    seen = length + decode
    middle = max(0, seen - sinks - window)
    budget = min(middle, keep) if isinstance(keep, int) else keep * middle
    assert stack.held <= budget + sinks + window + 1e-6
    assert stack.seen == seen
    ends = torch.cat([torch.arange(min(sinks, seen)), torch.arange(max(0, seen - window), seen)])
    for layer in range(LAYERS):
        for held in stack.positions(layer).long():
            assert bool((held.diff() > 0).all())
            assert bool(torch.isin(ends, held).all())
            assert held.numel() == stack.held


@pytest.mark.parametrize("quant", [[], [Quant(4)]])
def test_bytes_fall_with_keep(quant):
    sizes = [filled([Evict(keep), *quant], 600).nbytes for keep in (0.1, 0.3, 0.5, 0.8, 1.0)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("evict", [[], [Evict(0.5)]])
def test_bytes_fall_with_bits(evict):
    sizes = [filled([Quant(bits), *evict], 600).nbytes for bits in (2, 3, 4, 8)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < filled(evict, 600).nbytes


@given(length=st.integers(2, 80), cut=st.integers(1, 79))
def test_no_later_token_changes_an_earlier_logit(length, cut):
    cut = min(cut, length - 1)
    stages = [Evict(0.3), Quant(4, group=8)]
    one, other = (KVStack(stages, sinks=1, window=4, block=8) for _ in range(2))
    prompt = tiny.tokens(1, 60)
    for stack in (one, other):
        model()(prompt, past_key_values=stack)
    ids, changed = tiny.tokens(1, length, seed=1), tiny.tokens(1, length, seed=1)
    changed[:, cut:] = tiny.tokens(1, length - cut, seed=2)
    found = [model()(x, past_key_values=stack).logits[:, :cut] for x, stack in ((ids, one), (changed, other))]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


STAGES = st.one_of(
    st.builds(Quant, st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([None, 8, 64])),
    st.builds(Quant, st.just(4), codec=st.sampled_from(["nf4", "fp4"])),
    st.builds(
        Evict,
        st.one_of(st.floats(0.01, 1.0), st.integers(1, 10_000)),
        st.one_of(
            st.sampled_from(["h2o", "tova", "knorm", "streaming"]),
            st.builds(
                SnapKV, window=st.integers(1, 99), kernel=st.sampled_from([1, 5]), over=st.sampled_from(["mean"])
            ),
        ),
        layers=st.one_of(st.none(), st.integers(1, 9)),
        pool=st.sampled_from(["mean", "max"]),
    ),
)


@given(stages=st.lists(STAGES, max_size=2, unique_by=lambda stage: stage.kind), window=st.integers(0, 99))
def test_spec_dict_and_repr_build_the_same_stack(stages, window):
    import json

    import kvstack
    from kvstack import select

    stack = KVStack(stages, window=window)
    assert KVStack.from_spec(stack.spec).stages == stack.stages
    again = KVStack.from_spec(json.loads(json.dumps(stack.to_dict())))
    assert (again.stages, again.to_dict()) == (stack.stages, stack.to_dict())
    assert repr(eval(repr(stack), vars(kvstack) | vars(select))) == repr(stack)


@given(
    length=st.integers(90, 140),
    bits=st.sampled_from([2, 3, 4, 8]),
    evict=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager"]),
)
def test_fused_agrees_with_plain(length, bits, evict, attention):
    stages = [Quant(bits, group=8), *([Evict(0.5)] * evict)]
    ids = tiny.tokens(2, length + 6)
    lm = tiny.model("llama", attention, num_hidden_layers=LAYERS)
    found = []
    for fused in (True, False):
        stack = KVStack(stages, sinks=2, window=8, block=8, fused=fused)
        lm(ids[:, :length], past_key_values=stack)
        steps_ = [lm(ids[:, i : i + 1], past_key_values=stack).logits for i in range(length, length + 6)]
        found.append(torch.cat(steps_, 1))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


def test_the_fused_path_reads_codes(monkeypatch):
    """Otherwise the test above compares one path with itself."""
    calls = []
    monkeypatch.setattr(Kivi, "dot", lambda *a, dot=Kivi.dot: calls.append(1) or dot(*a))
    for fused, expected in ((True, LAYERS), (False, 0)):
        calls.clear()
        stack = filled([Quant(4, group=8)], 60, sinks=2, window=8, block=8, fused=fused)
        model()(tiny.tokens(1, 1), past_key_values=stack)
        assert len(calls) == expected
