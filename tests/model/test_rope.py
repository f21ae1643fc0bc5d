"""Rotary embedding: which layers have it, forwards, backwards, its transpose, and by which positions."""

import contextlib
import copy
import sys
from dataclasses import dataclass
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given
from transformers import AutoConfig, DynamicCache

from kvstack import KV, BindError, Evict, KVStack, Latent, Quant, Transform, UseError
from kvstack.authoring import Score
from kvstack.model.attention import attention_modules, expands
from kvstack.model.rest import at_rest
from kvstack.model.rope import find_ropes
from kvstack.store.given import Given
from tests import tiny
from tests.matrix import architectures
from tests.stages import Pairs


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=12, unique=True), st.sampled_from(["llama", "phi3", "gpt_neox"])
)
def test_unrotating_and_rotating_is_the_identity(positions, name):
    model = tiny.model(name)
    rope = find_ropes(model, attention_modules(model))[0]
    where = torch.tensor(sorted(positions), dtype=torch.int32)[None, None]
    keys = random(2, 2, len(positions), 16)
    torch.testing.assert_close(rope.rotate(rope.unrotate(keys, where), where), keys, atol=1e-4, rtol=1e-4)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
SCALED = [("llama", {}), ("llama", {"rope_parameters": YARN}), ("stablelm", {})]


@pytest.mark.parametrize(("name", "changes"), SCALED, ids=str)
def test_a_gradient_is_pulled_back_by_the_transpose(name, changes):
    """Also where attention is scaled, or a part of each head is not rotated."""
    config_type, model_type, own = tiny.MODELS[name]
    model = model_type(config_type(**(tiny.SHAPE | own | changes))).eval()
    rope = find_ropes(model, attention_modules(model))[0]
    where = torch.arange(5, 11)[None, None]
    keys, gradient = random(1, 2, 6, 16), random(1, 2, 6, 16, seed=1)
    here, there = (gradient * rope.rotate(keys, where)).sum(), (rope.pull(gradient, where) * keys).sum()
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-4)


# ---- a transform gets the keys that the model's own rotary function was given


@dataclass(frozen=True, repr=False)
class Witness(Transform):
    """Stores what it gets, and keeps it for the test."""

    layers: int = 1
    unrotated: bool = True
    name = "witness"

    def __post_init__(self):
        object.__setattr__(self, "got", [])

    def forward(self, group):
        (kv,) = group
        self.got.append(kv.keys)
        return {"keys": Latent(kv.keys), "values": Latent(kv.values)}

    def inverse(self, latents, layer):
        return KV(latents["keys"], latents["values"])

    def keys(self, layers):
        """Layer -> (B, H, tokens, D), where all rows are of one cohort."""
        return {layer: torch.cat(self.got[number :: len(layers)], dim=2) for number, layer in enumerate(layers)}


def witnessed(model):
    """A stack that lets a `Witness` see every token, and the witness."""
    stage = Witness()
    return KVStack([stage], model=model, sinks=0, window=0, block=4), stage


@contextlib.contextmanager
def watching(model, monkeypatch):
    """Layer -> the keys (B, H, new, D) that the modelling file's function was given, forward after forward."""
    seen, running = {}, []
    modules = attention_modules(model)
    layers = {module: layer for layer, module in modules.items()}

    def enter(module, args):
        running.append(layers[module])

    def leave(module, args, output):
        running.pop()

    def recorder(function):
        def record(*args, **kwargs):
            made = function(*args, **kwargs)
            if running:
                keys = args[1] if isinstance(made, tuple) else args[0]
                heads_last = kwargs.get("unsqueeze_dim") == 2 or function.__name__ == "apply_rotary_emb"
                seen.setdefault(running[-1], []).append((keys.transpose(1, 2) if heads_last else keys).clone())
            return made

        return record

    handles = []
    with monkeypatch.context() as patch:
        for file in {sys.modules[type(module).__module__] for module in modules.values()}:
            for name in ("apply_rotary_pos_emb", "apply_rotary_emb"):
                if hasattr(file, name):
                    patch.setattr(file, name, recorder(getattr(file, name)))
        for module in modules.values():
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def check(model, stack, stage, seen, real=slice(None)):
    """Compare what the witness got with what was rotated."""
    modules = attention_modules(model)
    ropes, keys = find_ropes(model, modules), stage.keys(stack.compressed_layers)
    for layer in stack.compressed_layers:
        rope, calls = ropes[layer], seen.get(layer, [])
        if rope is None:  # latents are not rotated, though a key beside them is
            assert not calls or expands(modules[layer])
            continue
        # a function of one tensor is called for queries too
        true = torch.cat(calls[1::2] if rope.form.takes == "single" else calls, dim=2)[:, :, real]
        if type(model).__name__ == "NanoChatForCausalLM":  # its norm comes after the rotation, and has no weights
            true = modules[layer].k_norm(true)
        width = true.shape[-1]
        mine = keys[layer][..., -width:] if rope.form.part == "last" else keys[layer][..., :width]
        torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-4)


def odd(first, last):
    """Positions of four rows: shifted, packed texts, with gaps, plain."""
    count = torch.arange(first, last)
    return torch.stack([count + 1000, count % 7, count * 3, count])


def shaken(model):
    """`model` with norms that are not all ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def built(name):
    try:
        return shaken(architectures.build(name))
    except ValueError:  # some have eager attention only
        return shaken(architectures.build(name, "eager"))


REFUSED = {
    "codegen": "no rotary tables are handed to it",
    "gptj": "no rotary tables are handed to it",
    "hunyuan_v1_dense": "some models norm keys after it",
    "hunyuan_v1_moe": "some models norm keys after it",
    "llama-dynamic": "rope type 'dynamic'",
    "minimax": "uses cache of its own",
}
"""Architectures on which keys cannot be un-rotated, and why."""
TURNS = ((0, 16), (16, 24), (24, 25), (25, 26), (26, 27), (27, 28))


@pytest.mark.filterwarnings("ignore::kvstack.errors.KVStackWarning")  # layers that are left to transformers
@pytest.mark.parametrize("name", sorted(architectures.MODELS))
def test_a_transform_gets_keys_as_they_were_before_rotation(name, monkeypatch):
    """With odd positions in a first turn, in a second one, and while decoding."""
    model = built(name)
    try:
        stack, stage = witnessed(model)
    except BindError as refusal:
        reason = str(refusal)
    else:
        reason = ""
    assert REFUSED.get(name, "") in reason
    if reason:  # or there is nothing to compress
        assert name in REFUSED or "rotary" not in reason
        return
    ids = tiny.tokens(4, TURNS[-1][1])
    with torch.no_grad(), watching(model, monkeypatch) as seen:
        for first, last in TURNS:
            mask = torch.ones(4, last)
            model(ids[:, first:last], attention_mask=mask, position_ids=odd(first, last), past_key_values=stack)
    check(model, stack, stage, seen)


@pytest.mark.parametrize("name", sorted(architectures.MODELS))
def test_a_move_is_both_rotations_at_once(name):
    """For heads and rows that share positions, and for those that do not."""
    model = built(name)
    modules, draw = attention_modules(model), torch.Generator().manual_seed(0)
    for layer, rope in find_ropes(model, modules).items():
        if rope is None or rope.refusal:
            continue
        for heads, rows in ((1, 1), (1, 3), (2, 1), (2, 3)):
            was = torch.randint(0, 900, (rows, heads, 7), generator=draw, dtype=torch.int32)
            now = torch.randint(0, 900, (rows, 1, 7), generator=draw, dtype=torch.int32)
            width = rope.tables(was[:, :1])[0].shape[-1] * (2 if rope.form.takes == "complex" else 1)
            keys = random(3, 2, 7, max(width, getattr(modules[layer], "head_dim", 0)))
            expected = rope.rotate(rope.unrotate(keys, was), now)
            torch.testing.assert_close(rope.move(was, now)(keys), expected, atol=1e-4, rtol=1e-4)


VISION = {"depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
VISION |= {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "image_size": 32}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
IMAGES = {
    "glm4v": "Glm4vForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def sees_images(kind):
    text = tiny.SHAPE | {"head_dim": 16, "rope_parameters": SECTIONS, "vocab_size": 200}
    vision = VISION | ({"hidden_size": 64} if kind == "qwen2_vl" else {})
    tokens = {"image_token_id": 151, "video_token_id": 152, "vision_start_token_id": 153, "vision_end_token_id": 154}
    tokens |= {"image_start_token_id": 153, "image_end_token_id": 154}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens)
    model = getattr(transformers, IMAGES[kind])(config).eval()
    model.generation_config.eos_token_id = None
    return model


def image_positions(before, height, width, last):
    """(3, 1, last): text, an image whose tokens have a row and a column, and text behind the larger of them."""
    grid = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(height), torch.arange(width), indexing="ij"))
    image = grid.flatten(1) + before
    text = torch.arange(before).expand(3, -1)
    after = torch.arange(last - before - height * width).expand(3, -1) + before + max(height, width)
    return torch.cat([text, image, after], dim=1)[:, None]


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_positions_of_several_dimensions_are_those_that_were_given(kind, text_first, monkeypatch):
    model = shaken(sees_images(kind))
    stack, stage = witnessed(model)
    ids, places = tiny.tokens(1, 28), image_positions(5, 2, 4, 28)
    if text_first:
        places = torch.cat([torch.arange(28)[None, None], places])
    with torch.no_grad(), watching(model, monkeypatch) as seen:
        for first, last in TURNS:
            model(ids[:, first:last], position_ids=places[..., first:last], past_key_values=stack)
    check(model, stack, stage, seen)
    (told,) = (x for _, part, x in stack.parts() if part == "positions given")
    assert torch.equal(told[0].long(), places[-3:, 0])


def test_generating_from_an_image_is_as_with_a_dense_cache():
    model = sees_images("qwen2_vl")
    ids = torch.cat([tiny.tokens(1, 17), torch.tensor([[153, 151, 151, 151, 151, 154]]), tiny.tokens(1, 20)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= {"pixel_values": random(16, 3 * 2 * 4 * 4), "mm_token_type_ids": (ids == 151).int()}
    asked = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense, stacked = (
        torch.stack(model.generate(**inputs, **asked, past_key_values=cache).logits)
        for cache in (DynamicCache(), KVStack([Witness()], sinks=0, window=0, block=4))  # binds itself in a forward
    )
    torch.testing.assert_close(stacked, dense, atol=1e-3, rtol=1e-3)


def test_reading_of_our_own_leaves_what_a_model_remembers_of_its_text():
    model = sees_images("qwen2_vl")
    model.model.rope_deltas = before = torch.tensor([[-7]])
    with at_rest(model):
        model.model.rope_deltas = None
    assert model.model.rope_deltas is before


# ---- padding, rows, crops, copies, files


def dense_and_stacked(model, stack, turns):
    """Logits of the same turns (keyword arguments of the model) with a dense cache and with `stack`."""
    with torch.no_grad():
        return [
            torch.cat([model(**turn, past_key_values=cache).logits for turn in turns], dim=1)
            for cache in (DynamicCache(config=model.config), stack)
        ]


def test_left_padding_without_position_ids_shifts_the_positions_of_a_row():
    """Such a forward numbers padding too, and later ones go on from there."""
    model = tiny.model()
    stack, _ = witnessed(model)
    ids, mask = tiny.left_padded([20, 13])
    more = torch.ones(2, 1, dtype=mask.dtype)
    turns = [{"input_ids": ids, "attention_mask": mask}]
    for n in range(1, 4):
        turns.append({"input_ids": tiny.tokens(2, 1, n), "attention_mask": torch.cat([mask] + [more] * n, dim=1)})
    dense, stacked = dense_and_stacked(model, stack, turns)
    real = torch.cat([mask] + [more] * 3, dim=1).bool()
    torch.testing.assert_close(stacked[real], dense[real], atol=1e-3, rtol=1e-3)
    told = [cohort.given.told for cohort in stack.batch.cohorts]
    assert [None if x is None else x[0, 0, 0].item() for x in told] in ([None, 7], [7, None])


def test_padding_that_generate_numbers_needs_no_record():
    model = tiny.model()
    stack, _ = witnessed(model)
    ids, mask = tiny.left_padded([20, 13, 9])
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(), **asked)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=stack, **asked), dense)
    assert all(cohort.given.told is None for cohort in stack.batch.cohorts)


def odd_turns(cuts, rows=4):
    ids = tiny.tokens(rows, cuts[-1])
    return [
        {"input_ids": ids[:, first:last], "attention_mask": torch.ones(rows, last), "position_ids": odd(first, last)}
        for first, last in pairwise(cuts)
    ]


@pytest.mark.parametrize("move", ["copy", "rows", "crop"])
def test_given_positions_go_where_the_tokens_go(move):
    model = tiny.model()
    stack, _ = witnessed(model)
    dense = DynamicCache(config=model.config)
    before, after = odd_turns([0, 16, 24]), odd_turns([24, 25, 26])
    with torch.no_grad():
        for turn in before:
            for cache in (dense, stack):
                model(**turn, past_key_values=cache)
    if move == "copy":
        stack, old = copy.deepcopy(stack), stack
        old.reset()
    elif move == "rows":
        order = torch.tensor([2, 0, 0, 1])
        for cache in (dense, stack):
            cache.reorder_cache(order)
        after = [turn | {"position_ids": turn["position_ids"][order]} for turn in after]
    else:
        for cache in (dense, stack):
            cache.crop(-5)
        after = odd_turns([19, 21, 22])
    with torch.no_grad():
        for turn in after:
            one, other = (model(**turn, past_key_values=cache).logits for cache in (dense, stack))
            torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
    told = stack.batch.cohorts[0].given.told
    assert told.shape[-1] == stack.seen


def test_a_file_keeps_given_positions(tmp_path):
    model = tiny.model()
    stack = KVStack.from_spec("commonkv:keep=0.9,layers=2,basis=weights@window=4,block=4", model=model)
    before, after = odd_turns([0, 16, 24]), odd_turns([24, 25])
    with torch.no_grad():
        for turn in before:
            model(**turn, past_key_values=stack)
    stack.save(tmp_path / "cache")
    again = KVStack.load(tmp_path / "cache", model=model)
    assert torch.equal(again.batch.cohorts[0].given.told, stack.batch.cohorts[0].given.told)
    with torch.no_grad():
        one, other = (model(**after[0], past_key_values=cache).logits for cache in (stack, again))
    assert torch.equal(one, other)


def test_plain_positions_are_not_held_and_odd_ones_only_until_they_are_cropped():
    model = tiny.model()
    stack, _ = witnessed(model)
    ids = tiny.tokens(1, 16)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=stack)
        assert stack.batch.cohorts[0].given.told is None
        model(ids[:, 10:], position_ids=torch.arange(100, 106)[None], past_key_values=stack)
    assert stack.batch.cohorts[0].given.told[0, 0].tolist() == [*range(10), *range(100, 106)]
    assert any(part == "positions given" for _, part, _ in stack.parts())
    stack.crop(-6)
    assert stack.batch.cohorts[0].given.told is None


def test_a_stack_that_does_not_ask_for_rotation_records_nothing():
    model = tiny.model()
    stack = KVStack([Evict(0.5), Quant(8)], model=model)
    with torch.no_grad():
        model(tiny.tokens(1, 9), position_ids=torch.arange(50, 59)[None], past_key_values=stack)
    assert stack.batch.cohorts[0].given.told is None


places = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@given(st.lists(st.tuples(places, st.sampled_from([1, 3]), st.booleans()), min_size=1, max_size=5), st.data())
def test_given_positions_are_told_for_any_index(turns, data):
    """Like a list of what was given, whatever came plain, in several dimensions, or was cropped."""
    given_to, model = Given(), []
    for turn, axes, plain in turns:
        numbers = list(range(len(model), len(model) + len(turn))) if plain else turn
        given_to.append(torch.tensor(numbers).expand(2, axes, -1), len(model))
        model += numbers
        if data.draw(st.booleans()):
            stay = data.draw(st.integers(0, len(model)))
            model = model[:stay]
            given_to.crop(stay)
        if data.draw(st.booleans()):
            given_to = given_to.rows(torch.tensor([1, 0]))
        if model:
            index = torch.tensor(data.draw(st.lists(st.integers(0, len(model) + 4), min_size=1, max_size=5)))
            told = given_to.at(index[None, None]).long()
            wanted = [model[i] if i < len(model) else model[-1] + i - len(model) + 1 for i in index]
            assert (told.flatten(0, -2) == torch.tensor(wanted)).all()
            assert (given_to.told is None) == (model == list(range(len(model))))


# ---- tables

fresh = tiny.model.__wrapped__  # settings that are no keys of a dictionary

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize("cuts", [[0, 20, *range(21, 44)], [0, 25, 40, 41, 42], [0, 40, 41]], ids=str)
def test_longrope_stays_right_across_the_switch(cuts):
    """Tokens that were rotated before the text got long keep the angles of short texts."""
    model = fresh(rope_parameters=LONG, max_position_embeddings=256)
    stack, _ = witnessed(model)
    ids = tiny.tokens(1, cuts[-1])
    turns = [{"input_ids": ids[:, first:last]} for first, last in pairwise(cuts)]
    dense, stacked = dense_and_stacked(model, stack, turns)
    torch.testing.assert_close(stacked, dense, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spec", ["commonkv:basis=weights,layers=2", "evict:0.5,score=expected"])
def test_tables_that_change_with_the_text_are_refused_by_whom_they_matter_to(spec):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = fresh(rope_parameters=dynamic, max_position_embeddings=128)
    with pytest.raises(BindError, match=r"layer 0 .*rope type 'dynamic'"):
        KVStack.from_spec(spec, model=model)
    KVStack.from_spec("evict:0.5+quant:2", model=model)


def test_layers_without_rotation_are_left_alone_in_a_group_with_others():
    model = fresh("smollm3", no_rope_layers=[1, 0, 1, 0])
    ropes = find_ropes(model, attention_modules(model))
    assert [ropes[layer] is None for layer in range(4)] == [False, True, False, True]
    stack = KVStack([Pairs()], model=model, sinks=0, window=0, block=4)
    dense, stacked = dense_and_stacked(model, stack, odd_turns([0, 16, 17, 18]))
    torch.testing.assert_close(stacked, dense, atol=1e-3, rtol=1e-3)


def test_tables_that_are_not_those_of_the_positions_are_refused(monkeypatch):
    model = tiny.model()
    stack, _ = witnessed(model)
    ids = tiny.tokens(1, 9)

    def twisted(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (sin, cos)}

    with torch.no_grad():
        model(ids, past_key_values=stack)
        handle = model.model.layers[0].register_forward_pre_hook(twisted, with_kwargs=True)
        try:
            with pytest.raises(UseError, match="layer 0 of LlamaForCausalLM was handed rotary tables"):
                model(ids, past_key_values=stack)
        finally:
            handle.remove()
        assert stack.seen == stack.held == 9
        model(ids, past_key_values=stack)  # nothing was stored, so it goes on
    assert stack.seen == 18


def test_tables_that_were_copied_are_compared():
    """As where layers live on several devices."""
    model = tiny.model()
    stack, _ = witnessed(model)

    def copied(module, args, kwargs):
        return args, kwargs | {"position_embeddings": tuple(x.clone() for x in kwargs["position_embeddings"])}

    handles = [x.register_forward_pre_hook(copied, with_kwargs=True) for x in model.model.layers]
    try:
        dense, stacked = dense_and_stacked(model, stack, odd_turns([0, 16, 17]))
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(stacked, dense, atol=1e-3, rtol=1e-3)
    assert stack.batch.cohorts[0].given.told is not None


# ---- scores


@dataclass(frozen=True, repr=False)
class Unrotated(Score):
    """Keeps tokens at random, and the keys before rotation."""

    name = "unrotated"

    def __post_init__(self):
        object.__setattr__(self, "got", {})

    def score(self, kv, context):
        self.got[context.layer] = context.rope.unrotate(kv.keys, context.positions)
        return kv.keys.norm(dim=-1)


def test_a_score_unrotates_by_the_positions_that_were_given(monkeypatch):
    model, score = tiny.model(), Unrotated()
    stack = KVStack([Evict(0.5, score=score)], model=model, sinks=0, window=0, block=1)
    with torch.no_grad(), watching(model, monkeypatch) as seen:
        model(**odd_turns([0, 16])[0], past_key_values=stack)
    for layer, keys in score.got.items():
        torch.testing.assert_close(keys, seen[layer][0], atol=1e-4, rtol=1e-4)


def test_expected_attention_looks_ahead_from_the_positions_that_were_given():
    """Scores of a text do not depend on where it starts."""
    kept = []
    for shift in (0, 300):
        stack = KVStack([Evict(0.4, score="expected")], model=tiny.model(), sinks=2, window=2, block=1)
        with torch.no_grad():
            places = torch.arange(30).expand(2, -1) + torch.tensor([[shift], [0]])
            tiny.model()(tiny.tokens(2, 30), position_ids=places, past_key_values=stack)
        kept.append([stack.positions(layer, row) for layer in range(4) for row in range(2)])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
