"""Positions inside the cache: what a model makes of a plain cache of the kept tokens, moved together by hand.

The oracle is transformers' own cache. After each forward it is left with the tokens that the stack kept, whose keys are
turned to their new places by the angles of the model. The model then counts positions from what is left, as it does for
any cache.
"""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvstack import BindError, CommonKV, Evict, KVStack, Quant, SnapKV, StageError, UseError
from tests import tiny
from tests.stages import Centred, Pairs, Third

SMALL = {"sinks": 2, "window": 6, "block": 4}
LAYERS = 4
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
"""Of logits near 5: angles of rotary tables are computed in float32."""


def evict(keep, score="streaming", **more):
    return Evict(keep, score, positions="cache", **more)


STACKS = {
    "streaming": [evict(12)],
    "share": [evict(0.4, "keydiff")],
    "queries": [evict(16, SnapKV(window=4, kernel=1), layers=2)],
    "mass": [evict(16, "h2o")],
    "expected": [evict(16, "expected")],
    "lookahead": [evict(16, "lookahead")],
    "again": [evict(16, "kvzip")],
    "refit": [evict(16, "keydiff", refit=True)],
    "rotated_late": [Pairs(), evict(0.5, "keydiff")],
    "as_cached": [Pairs(unrotated=False), evict(0.5, "keydiff")],
    "fitted": [Centred(far=1.0), evict(16, "keydiff")],
    "shares": [Third(3, 1), evict(16, "keydiff")],
}
"""Without loss, but for the tokens that go."""


def rotary_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def turned(model, keys, steps):
    """Keys (1, H, T, D), each rotated by as many positions as `steps` (H, T) says."""
    speed = rotary_of(model).inv_freq.double()
    half = len(speed)
    angles = steps[None, ..., None] * speed
    one, other, still = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin, still], dim=-1)


class Oracle:
    """A dense cache of the tokens that a stack keeps."""

    def __init__(self, model, still=()):
        self.model, self.still = model, still
        self.cache = DynamicCache(config=model.config)
        self.index = {}  # layer -> (H, T)

    def feed(self, ids, seen):
        logits = self.model(ids, past_key_values=self.cache).logits
        new = torch.arange(seen, seen + ids.shape[1]).expand(self.cache.layers[0].keys.shape[1], -1)
        self.index = {i: torch.cat([self.index.get(i, new[:, :0]), new], 1) for i in range(len(self.cache.layers))}
        return logits

    def follow(self, stack):
        """Keep what `stack` holds, at the places 0, 1, 2 and so on."""
        for i, layer in enumerate(self.cache.layers):
            stays = stack.positions(i).long().expand(len(self.index[i]), -1).contiguous()
            at = torch.searchsorted(self.index[i].contiguous(), stays)
            assert torch.equal(self.index[i].gather(1, at), stays)
            take = at[None, ..., None].expand(-1, -1, -1, layer.keys.shape[-1])
            keys, values = layer.keys.gather(2, take), layer.values.gather(2, take)
            steps = torch.arange(stays.shape[1]) - at
            layer.keys = keys if i in self.still else turned(self.model, keys, steps).to(keys)
            layer.values, self.index[i] = values, stays
        # what stands in for others is no token of the text
        if stack.binding.plan.refits:
            for i, layer in enumerate(self.cache.layers):
                layer.values = stack.read(i).values


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(1, 40), st.just(1), st.integers(-7, -1)), min_size=4, max_size=16),
    first=st.integers(2, 60),
    window=st.integers(0, 9),
    sinks=st.integers(0, 4),
    block=st.integers(1, 9),
)
@pytest.mark.parametrize("name", sorted(STACKS.keys() - {"refit", "shares"}))
def test_logits_are_those_of_a_plain_cache_of_the_kept_tokens(name, counts, first, window, sinks, block):
    model = tiny.model(dtype=torch.float64)
    stack = KVStack(STACKS[name], model=model, sinks=sinks, window=window, block=block)
    oracle, ids, seen = Oracle(model), tiny.tokens(1, 800), 0
    for count in [first, *counts]:
        if count < 0:
            fewer = min(-count, seen - 2)
            stack.crop(-fewer)
            seen -= fewer
            oracle.follow(stack)
            continue
        new = ids[:, seen : seen + count]
        found, expected = model(new, past_key_values=stack).logits, oracle.feed(new, seen)
        torch.testing.assert_close(found, expected, **CLOSE)
        seen += count
        oracle.follow(stack)
    assert stack.seen == seen


@functools.cache
def yarn():
    """Angles and lengths of keys are scaled, alike for all texts."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, rope_parameters=rope)).double().eval()


@pytest.mark.parametrize("name", ["yarn", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "stablelm", "smollm3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_architectures(name, attention):
    """Some rotate a part of each head, some layers do not rotate."""
    model = yarn() if name == "yarn" else tiny.model(name, attention, torch.float64)
    stack = KVStack([evict(12, "keydiff")], **SMALL)
    still = [i for i, no in enumerate(getattr(model.config, "no_rope_layers", [])) if not no]
    oracle, ids, seen = Oracle(model, still), tiny.tokens(1, 400), 0
    for count in [40, 1, 1, 1, 1, 1, 20, 1, 1, 1]:
        new = ids[:, seen : seen + count]
        found, expected = model(new, past_key_values=stack).logits, oracle.feed(new, seen)
        torch.testing.assert_close(found, expected, **CLOSE)
        seen += count
        oracle.follow(stack)


def test_the_oracle_tells_places_from_positions_in_the_text():
    model = tiny.model(dtype=torch.float64)
    stack, oracle, ids = KVStack([Evict(12, "keydiff")], **SMALL), Oracle(model), tiny.tokens(1, 41)
    for new, seen in ((ids[:, :40], 0), (ids[:, 40:], 40)):
        found, expected = model(new, past_key_values=stack).logits, oracle.feed(new, seen)
        oracle.follow(stack)
    assert not torch.allclose(found, expected, atol=0.1, rtol=0)


def decoded(model, ids, stack, mask=None):
    """Logits of `ids` (rows, n), token by token."""
    mask = torch.ones_like(ids) if mask is None else mask
    found = []
    for i in range(ids.shape[1]):
        seen = mask[:, : mask.shape[1] - ids.shape[1] + i + 1]
        found.append(model(ids[:, i : i + 1], attention_mask=seen, past_key_values=stack).logits[:, -1])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_of_rounding_do_not_add_up(dtype):
    """Keys of the first layer are those of a token and its place alone. Each of these was moved 64 times."""
    model, ids = tiny.model(dtype=dtype), tiny.tokens(1, 400)
    keys = []
    for each in (model, copy.deepcopy(model).float()):
        stack = KVStack([evict(64)], sinks=2, window=2, block=1)
        for chunk in ids.split(1, dim=1):
            each(chunk, past_key_values=stack)
        keys.append(stack.read(0).keys.float())
    assert stack.positions(0)[0, 2:].tolist() == list(range(400 - 66, 400))
    apart = (keys[0] - keys[1]).norm(dim=-1) / keys[1].norm(dim=-1)
    # the model's own key, its tables, and the turned key are rounded
    assert float(apart.max()) < 4 * torch.finfo(dtype).eps


def test_nothing_moves_before_the_first_token_goes():
    model, ids = tiny.model(), tiny.tokens(2, 60)
    made = [KVStack([Evict(60, positions=which)], **SMALL) for which in ("text", "cache")]
    found = [[model(new, past_key_values=stack).logits for new in ids.split([40, 1, 19], 1)] for stack in made]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert made[0].nbytes == made[1].nbytes


def test_bytes_count_the_positions_that_tokens_came_with():
    model, ids = tiny.model(), tiny.tokens(2, 90)
    stack = KVStack([evict(12)], **SMALL)
    for new in ids.split(30, dim=1):
        model(new, past_key_values=stack)
    given = sum(x.nbytes for _, what, x in stack.parts() if what == "positions given")
    assert given == 2 * 90 * 4


def test_no_position_is_larger_than_what_is_held():
    """Chunks of a prompt and decoded tokens that come to more than the model was made for."""
    model, ids = tiny.model(max_position_embeddings=64), tiny.tokens(2, 150)
    told = []
    handle = rotary_of(model).register_forward_hook(
        lambda module, args, kwargs, out: told.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    stack = KVStack([evict(24)], model=model, **SMALL)
    told.clear()
    try:
        model.generate(ids, past_key_values=stack, max_new_tokens=40, prefill_chunk_size=16, do_sample=False)
    finally:
        handle.remove()
    assert stack.seen == 189
    assert max(int(positions.max()) for positions in told) < 2 + 6 + 24 + 16
    assert min(int(positions.min()) for positions in told) == 0


def test_weights_of_eager_attention_stand_in_the_columns_of_the_text():
    model, ids = tiny.model(attention="eager", dtype=torch.float64), tiny.tokens(1, 61)
    stack, oracle = KVStack([evict(12, "keydiff")], **SMALL), Oracle(model)
    model(ids[:, :60], past_key_values=stack)
    oracle.feed(ids[:, :60], 0)
    oracle.follow(stack)
    held = [stack.positions(layer).long() for layer in range(LAYERS)]
    found = model(ids[:, 60:], past_key_values=stack, output_attentions=True).attentions
    expected = model(ids[:, 60:], past_key_values=oracle.cache, output_attentions=True).attentions
    for layer, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        columns = torch.cat([held[layer], torch.full((2, 1), 60)], dim=1).repeat_interleave(2, 0)[None, :, None]
        torch.testing.assert_close(mine, torch.zeros_like(mine).scatter(3, columns, theirs), **CLOSE)


def test_a_single_query_reads_packed_latents_as_decoded_ones():
    """Keys that are held without rotation are read in place, those that were packed with it are decoded and turned."""
    model, ids = tiny.model(), tiny.tokens(2, 130)
    late = [CommonKV(0.5, layers=2), Quant(4), evict(64, "keydiff")]
    for stages, fuses in ((late, True), ([Quant(4, group=8), evict(64, "keydiff")], False)):
        made = [KVStack(stages, model=model, fused=fused, **SMALL) for fused in (True, False)]
        assert bool(made[0].binding.reads_with) == fuses
        found = [[model(new, past_key_values=stack).logits for new in ids.split([120, *[1] * 10], 1)] for stack in made]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("transform", [[], [Pairs()], [Pairs(unrotated=False)]], ids=str)
def test_a_crop_through_packed_tokens_leaves_them_where_they_are(transform):
    model, ids = tiny.model(dtype=torch.float64), tiny.tokens(1, 120)
    stack = KVStack([*transform, Quant(8, group=8), evict(40, "streaming")], sinks=2, window=4, block=8)
    for new in ids[:, :100].split(20, dim=1):
        model(new, past_key_values=stack)
    before = stack.read(0)
    at = stack.positions(0)[0] < 85
    stack.crop(-15)
    after = stack.read(0)
    assert stack.positions(0)[0].tolist() == [*range(2), *range(100 - 44, 85)] == before_positions(at, 100)
    # counted back from the newest one: turned by as many places as the newest is moved
    steps = torch.zeros(2, int(at.sum()))
    torch.testing.assert_close(after.keys, turned(model, before.keys[:, :, at], steps), atol=0.05, rtol=0.05)
    torch.testing.assert_close(after.values, before.values[:, :, at], atol=0.05, rtol=0.05)


def before_positions(at, seen):
    return [*range(2), *range(seen - 44, seen)][: int(at.sum())]


# ---- refused


def test_settings():
    with pytest.raises(StageError, match="positions='there' is not known"):
        Evict(12, positions="there")
    for budgets in ("heads", "layers"):
        with pytest.raises(StageError, match="must hold equally many tokens"):
            Evict(12, positions="cache", budgets=budgets)
    assert KVStack.from_spec("evict:12,positions=cache").stages == (Evict(12, positions="cache"),)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("opt", {}, "does not rotate its keys"),
        ("gemma3", {}, "layer 0 of Gemma3ForCausalLM is left to transformers' own cache"),
        ("deepseek_v3", {}, "caches latents"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_told(name, changes, words):
    with pytest.raises(BindError, match=words):
        KVStack([evict(12)], model=tiny.model(name, **changes))


def test_rotations_that_change_with_the_length_of_a_text():
    shape = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    long = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    for kind, more, words in (
        ("dynamic", {}, "the angle of a position changes with the length of the text"),
        ("longrope", long, "other angles for a text of 64 tokens or more"),
    ):
        config = LlamaConfig(**tiny.SHAPE, rope_parameters={"rope_type": kind, **shape, **more})
        with pytest.raises(BindError, match=words):
            KVStack([evict(12)], model=LlamaForCausalLM(config).eval())


def test_without_a_model():
    stack = KVStack([evict(12)])
    with pytest.raises(UseError, match="does not know its model"):
        stack.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)


def test_position_ids_of_another_kind_are_refused_and_nothing_is_lost():
    model, ids = tiny.model(), tiny.tokens(1, 40)
    stack, other = (KVStack([evict(12)], model=model, **SMALL) for _ in range(2))
    for each in (stack, other):
        model(ids[:, :30], past_key_values=each)
    packed, gap, axes = torch.tensor([[30, 31, 0, 1, 2]]), torch.tensor([[30, 31, 33, 34, 35]]), torch.zeros(3, 1, 5)
    for wrong in (packed, gap, axes.long(), torch.arange(4)[None]):
        with pytest.raises(UseError, match="position_ids that do not follow each other"):
            model(ids[:, 30:35], past_key_values=stack, position_ids=wrong)
    right = torch.arange(30, 35)[None]
    found = model(ids[:, 30:35], past_key_values=stack, position_ids=right).logits
    assert torch.equal(found, model(ids[:, 30:35], past_key_values=other).logits)


def test_layers_that_are_called_with_positions_in_the_text_are_refused():
    """Whoever calls the layers by themselves goes round the place where positions are told."""
    model, ids = tiny.model(), tiny.tokens(1, 41)
    stack = KVStack([evict(12)], model=model, **SMALL)
    model(ids[:, :40], past_key_values=stack)
    hidden, places = model.model.embed_tokens(ids[:, 40:]), torch.tensor([[40]])
    tables = model.model.rotary_emb(hidden, places)
    with pytest.raises(UseError, match="Call the model itself"):
        model.model.layers[0](hidden, past_key_values=stack, position_ids=places, position_embeddings=tables)
    model(ids[:, 40:], past_key_values=stack)  # nothing was stored


def test_tokens_that_are_taken_back_before_they_are_compressed():
    """Assisted decoding: guesses come behind the tokens held, and those that are wrong go."""
    model, ids, seen = tiny.model(dtype=torch.float64), tiny.tokens(1, 200), 0
    stack, oracle = KVStack([evict(12, "keydiff")], model=model, **SMALL), Oracle(model)
    stack.activate_past_recording()
    for count, wrong in [(40, 0), (5, 3), (5, 4), (6, 0), (1, 0), (9, 8), (9, 2), (3, 0)]:
        new = ids[:, seen : seen + count]
        found, expected = model(new, past_key_values=stack).logits, oracle.feed(new, seen)
        torch.testing.assert_close(found, expected, **CLOSE)
        stack.crop(-wrong)
        seen += count - wrong
        oracle.follow(stack)
    assert stack.held < seen


@pytest.mark.parametrize("told", ["nothing", "columns", "tokens"])
@pytest.mark.parametrize("bound", [True, False])
def test_a_first_forward_may_count_padding(told, bound):
    """A stack that is bound by its first forward cannot change the positions of a decoder that runs already."""
    model = tiny.model(dtype=torch.float64)
    ids, mask = tiny.left_padded([50, 31])
    positions = {
        "nothing": None,
        "columns": torch.arange(50)[None],
        "tokens": (mask.cumsum(1) - 1).clamp_min(0),
    }[told]
    made = [KVStack([evict(12, "expected")], model=model if binds else None, **SMALL) for binds in (bound, True)]
    decoder = model.model
    decoder(ids, attention_mask=mask, past_key_values=made[0], position_ids=positions)
    model(ids, attention_mask=mask, past_key_values=made[1])
    for step in range(12):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        new = torch.full((2, 1), 5 + step)
        found, expected = (model(new, attention_mask=mask, past_key_values=stack).logits for stack in made)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_mask_for_each_type_of_layers_tells_padding_too():
    model = tiny.model("qwen2", dtype=torch.float64)
    ids, mask = tiny.left_padded([40, 25])
    made = [KVStack([evict(12, "keydiff")], model=model, **SMALL) for _ in range(2)]
    for start, end in ((0, 40), (40, 41), (41, 46), (46, 47)):
        mask = torch.nn.functional.pad(mask, (0, max(0, end - mask.shape[1])), value=1)
        new = ids[:, start:end] if end <= 40 else torch.full((2, end - start), 9)
        causal = torch.arange(end)[None] <= torch.arange(start, end)[:, None]
        whole = (causal[None] & mask[:, None, :end].bool())[:, None]
        one = model(new, attention_mask=mask[:, :end], past_key_values=made[0]).logits
        other = model(new, attention_mask={"full_attention": whole}, past_key_values=made[1]).logits
        real = mask[:, start:end].bool()
        torch.testing.assert_close(one[real], other[real], **CLOSE)
