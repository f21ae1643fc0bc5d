"""Kv heads that keep different numbers of tokens: each is held, and read, as if it were alone."""

import pytest
import torch

from kvstack import BindError, CommonKV, Evict, KVStack, Quant, StageError, UseError
from kvstack.model.ranks import whole_shapes
from kvstack.store import split
from kvstack.store.budget import GRID, Profile
from kvstack.testing import tiny_model
from tests import tiny
from tests.matrix.architectures import attentions, build

SMALL = {"sinks": 2, "window": 8, "block": 8}
STACKS = {
    "plain": (Evict(0.4, "keydiff"),),
    "queries": (Evict(0.4, "snapkv(window=8)"),),
    "tracks": (Evict(0.4, "h2o"),),
    "rereads": (Evict(0.4, "kvzip"),),
    "count": (Evict(24, "knorm"),),
    "refit": (Evict(0.4, "knorm", refit=True),),
    "sealed": (Evict(0.4, "random"), Quant(8, group=8)),
}


def apart(stages):
    """The same stages, with heads held apart."""
    evict, *others = stages
    settings = {name: getattr(evict, name) for name in ("keep", "score", "refit")}
    return [Evict(**settings, budgets="heads"), *others]


def together(stages):
    evict, *others = stages
    return [Evict(evict.keep, evict.score, refit=evict.refit, layers=1), *others]


@pytest.fixture
def equal_budgets(monkeypatch):
    """Every head has the same budget, and a store of its own."""

    def same(model, layers, evict, ranking):
        return {layer: torch.tensor([GRID] * whole_shapes(model)[layer][0]) for layer in layers}

    def alone(shares, keep):
        return [((head,), Profile(own.tolist())) for head, own in enumerate(shares)]

    monkeypatch.setattr("kvstack.binding.shares_of", same)
    monkeypatch.setattr("kvstack.binding.alike", alone)


# ---- budgets


@pytest.mark.parametrize("budgets", ["heads", "layers"])
@pytest.mark.parametrize("keep", [0.3, 0.05, 40])
def test_no_more_than_the_budget_is_held(budgets, keep):
    """Of real bytes, too: as many tokens as with equal budgets, give or take what rounding leaves out."""
    model = tiny.model("llama")
    stack = KVStack([Evict(keep, "knorm", budgets=budgets)], model=model, **SMALL)
    model(tiny.tokens(1, 300), past_key_values=stack)
    held = [len(head) for layer in range(4) for head in tiny.positions_by_head(stack, layer)]
    most = keep if isinstance(keep, int) else keep * 290
    assert len(set(held)) > 1
    assert most * 0.7 - 4 <= sum(held) / len(held) - 10 <= most + 1e-6
    raw = sum(x.numel() for _, name, x in stack.parts() if name == "raw")
    assert raw >= sum(held) * 2 * 16  # keys and values of 16 numbers
    assert raw <= sum(held) * 2 * 16 * 1.3


# ---- the same as heads that are held together


def same(one, other, tolerance=1e-9):
    assert one.seen == other.seen
    for layer in one.compressed_layers:
        for row in range(one.batch_size):
            for head in range(2):
                assert torch.equal(one.positions(layer, row, head), other.positions(layer, row, head))
                for x, y in zip(
                    (one.read(layer, row, head).keys, one.read(layer, row, head).values),
                    (other.read(layer, row, head).keys, other.read(layer, row, head).values),
                    strict=True,
                ):
                    torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fused", [True, False])
def test_equal_budgets_change_nothing(equal_budgets, stages, attention, fused):
    """Padding, turns, decoding, crops and other rows: what is held and what is answered are those of one store."""
    model = tiny.model("llama", attention, torch.float64)
    stacks = [KVStack(make(stages), model=model, fused=fused, **SMALL) for make in (apart, together)]
    for layer in stacks[0].batch.cohorts[0].stores:
        assert isinstance(layer, split.SplitStore)
    ids, mask = tiny.left_padded([70, 41, 70])

    def feed(new, mask):
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        options = {"attention_mask": mask, "position_ids": places, "output_attentions": attention == "eager"}
        one, other = (model(new, past_key_values=stack, **options) for stack in stacks)
        torch.testing.assert_close(one.logits[:, -1], other.logits[:, -1], atol=1e-4, rtol=1e-4)
        for x, y in zip(one.attentions or (), other.attentions or (), strict=True):
            torch.testing.assert_close(x[:, :, -1], y[:, :, -1], atol=1e-5, rtol=1e-5)
        same(*stacks, tolerance=1e-5)

    feed(ids, mask)
    for step in range(10):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        feed(tiny.tokens(3, 1, seed=step), mask)
    mask = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    feed(tiny.tokens(3, 5, seed=20), mask)
    for stack in stacks:
        stack.crop(-7)
        stack.reorder_cache(torch.tensor([2, 1, 1]))
    mask = mask[:, :-7][[2, 1, 1]]
    mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    feed(tiny.tokens(3, 1, seed=30), mask)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equal_budgets_change_nothing_on_any_model(equal_budgets, name):
    model = tiny.model(name, dtype=torch.float64)
    stages = STACKS["sealed"]
    try:
        together_, apart_ = (KVStack(make(stages), model=model, **SMALL) for make in (together, apart))
    except BindError:
        pytest.skip("this model does not take it")
    for new in (tiny.tokens(1, 90), tiny.tokens(1, 1), tiny.tokens(1, 6)):
        one, other = (model(new, past_key_values=stack).logits for stack in (apart_, together_))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# ---- who cannot


def test_reading_all_heads_at_once_names_the_way():
    model = tiny.model("llama")
    stack = KVStack([Evict(0.3, "knorm", budgets="heads")], model=model, **SMALL)
    model(tiny.tokens(1, 200), past_key_values=stack)
    uneven = next(i for i in range(4) if len(set(map(len, tiny.positions_by_head(stack, i)))) > 1)
    with pytest.raises(UseError, match=r"hold \d+ to \d+ tokens.*read\(layer, row, head\)"):
        stack.read(uneven)
    with pytest.raises(UseError, match="no kv head 2: it has 2"):
        stack.read(uneven, 0, 2)
    with pytest.raises(UseError, match=r"hold \d+ to \d+ tokens"):
        list(stack)


def test_a_file_with_other_budgets_is_refused(tmp_path, monkeypatch):
    model = tiny.model("llama")
    stack = KVStack([Evict(0.3, "knorm", budgets="heads")], model=model, **SMALL)
    model(tiny.tokens(1, 200), past_key_values=stack)
    stack.save(tmp_path / "cache.safetensors")
    monkeypatch.setattr("kvstack.binding.alike", lambda shares, keep: [((0, 1), Profile(shares.mean(0).tolist()))])
    with pytest.raises(UseError, match=r"other budgets|not a list of"):
        KVStack.load(tmp_path / "cache.safetensors", model=model)


def test_what_shares_heads_is_refused():
    with pytest.raises(StageError, match="cannot have budgets of their own"):
        Evict(0.5, budgets="heads", share_heads=True)
    with pytest.raises(StageError, match="cannot have budgets of their own"):
        Evict(0.5, budgets="heads", layers=2)
    with pytest.raises(StageError, match="is not known"):
        Evict(0.5, budgets="rows")
    with pytest.raises(BindError, match=r'stores all heads of a token together.*Use budgets="layers"'):
        KVStack([CommonKV(0.5, layers=2), Evict(0.5, budgets="heads")], model=tiny.model("llama"))
    with pytest.raises(BindError, match=r'caches latents in their place.*Use budgets="equal"'):
        KVStack([Evict(0.5, budgets="layers")], model=tiny.model("deepseek_v3"))
    with pytest.raises(BindError, match=r'attends with more than a softmax.*Use budgets="layers"'):
        KVStack([Evict(0.5, "knorm", budgets="heads")], model=build("gpt_oss", attentions("gpt_oss")[0]))


@pytest.mark.parametrize("score", ["snapkv", "kvzip", "h2o", "kvzap", "lookahead", "tova"])
def test_every_kind_of_score_has_budgets(score):
    """Those that look at queries, keep a memory, read a text twice, or are fitted."""
    model = tiny.model("llama")
    stack = KVStack([Evict(0.3, score, budgets="heads")], model=model, **SMALL)
    model.generate(tiny.tokens(2, 150), past_key_values=stack, max_new_tokens=20, do_sample=False)
    held = [len(head) for layer in range(4) for head in tiny.positions_by_head(stack, layer)]
    assert sum(held) / len(held) - 10 <= 0.3 * 160 + 8


def test_attention_that_mixes_heads_is_refused():
    model = build("diffllama", attentions("diffllama")[0])
    with pytest.raises((UseError, BindError), match="heads"):
        model(tiny.tokens(1, 60) % 50, past_key_values=KVStack([Evict(0.5, "knorm", budgets="heads")], **SMALL))


def test_layers_may_differ_behind_a_transform():
    model = tiny_model()
    stack = KVStack([CommonKV(0.5, layers=2), Evict(0.3, budgets="layers")], model=model, **SMALL)
    model(tiny.tokens(1, 200), past_key_values=stack)
    held = [stack.positions(layer).shape[-1] for layer in range(4)]
    assert held[0] == held[1]
    assert held[2] == held[3]
    assert sum(held) / 4 - 10 <= 0.3 * 190 + 1e-6
