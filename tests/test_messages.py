"""Every error a user can meet says what was given, what is needed and what to write instead."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache

from kvstack import (
    BindError,
    Evict,
    KVStack,
    KVStackWarning,
    LookAhead,
    Quant,
    SnapKV,
    SpecError,
    Stage,
    StageError,
    TriAttention,
    UseError,
)
from kvstack.registry import PLUGINS, type_of
from kvstack.select.expected import ExpectedAttention
from tests import tiny
from tests.stages import Pairs


class Chooser(Stage):
    """Of a kind whose class it is not."""

    kind = "select"


BUILD = [
    (lambda: Evict(0.0), "Evict(keep=0.0): keep is what stays: a share in (0, 1]"),
    (lambda: Evict(1.5), "keep is what stays: a share in (0, 1] or a count of tokens, an int of 1 or more. Use keep="),
    (lambda: Evict(0), "keep is what stays"),
    (lambda: Evict(-3), "keep is what stays"),
    (lambda: Evict(True), "keep is what stays"),
    (lambda: Evict("0.2"), "keep is what stays"),
    (lambda: Evict(0.2, layers=0), "layers counts layers. Use 1 or more."),
    (lambda: Evict(0.2, pool="median"), '\'median\' is not a way to pool. Use "mean" or "max".'),
    (lambda: Evict(0.2, score=SnapKV), "an object with a method score(kv, context). Use one of: expected, h2o,"),
    (lambda: Evict(0.2, score=3), "a score is a name or an object with a method score(kv, context)"),
    (lambda: SnapKV(window=0), "SnapKV(window=0): window counts queries. Use 1 or more."),
    (lambda: SnapKV(kernel=4), "kernel must be an odd number of tokens. Use 5, or 1 for no smoothing."),
    (lambda: SnapKV(over="sum"), "'sum' is not a way to reduce"),
    (lambda: ExpectedAttention(future=0), "window and future count tokens. Use 1 or more."),
    (lambda: LookAhead(ahead=0), "LookAhead(ahead=0): ahead counts positions. Use 1 or more."),
    (lambda: LookAhead(over="sum"), '\'sum\' is not a way to reduce. Use "mean" or "max".'),
    (lambda: TriAttention(horizon=0), "TriAttention(horizon=0): horizon counts tokens. Use 1 or more."),
    (lambda: TriAttention(over="sum"), '\'sum\' is not a way to reduce. Use "mean" or "max".'),
    (lambda: Quant(7), "Quant(bits=7): kivi packs codes of 2, 3, 4, 8 bits. Use one of these."),
    (lambda: Quant(2.0), "kivi packs codes of 2, 3, 4, 8 bits"),
    (lambda: Quant(2, codec="nf4"), "nf4 packs codes of 4 bits. Use Quant(4, codec='nf4')."),
    (lambda: Quant(4, codec="zip"), "no codec is called 'zip'. Use one of: kivi, nf4, fp4, int8."),
    (lambda: Quant(4, group=20), "a group must be a multiple of 8, so that its codes fill whole bytes. Use group=32."),
    (lambda: Quant(4, group=32, codec="nf4"), "bitsandbytes knows blocks of 64, 128,"),
    (lambda: KVStack([Quant(2), Quant(4)]), "Quant(bits=2) and Quant(bits=4) are both of the kind 'encode'"),
    (lambda: KVStack([Evict(0.2), Evict(5)]), "are both of the kind 'select': a stack has one place for each kind."),
    (lambda: KVStack([3]), "3 is not a stage. See `kvstack stages` for the catalogue."),
    (lambda: KVStack([Quant]), "is not a stage. Use Quant(...)."),
    (lambda: KVStack([Chooser()]), "Chooser() is not a stage. See `kvstack stages` for the catalogue."),
    (lambda: KVStack(Quant(2)), "stages is a list. Use KVStack([Quant(bits=2)])."),
    (lambda: KVStack(Evict(0.2), Quant(2)), "stages is one list. Use KVStack([Evict(keep=0.2), Quant(bits=2)])."),
    (lambda: KVStack(["evict:0.2", "quant:2"]), "For a spec, use KVStack.from_spec('evict:0.2+quant:2')."),
    (lambda: KVStack("quant:2"), "stages is a list. Use KVStack.from_spec('quant:2')."),
    (lambda: KVStack(sinks=-1), "KVStack(sinks=-1): sinks is a number of tokens, 0 or more."),
    (lambda: KVStack(window=1.5), "KVStack(window=1.5): window is a number of tokens"),
    (lambda: KVStack(block=0), "KVStack(block=0): block is a number of tokens, 1 or more."),
    (lambda: KVStack([Pairs(), Evict(0.2, layers=3)]), "2 and 3 layers do not nest. Use layers= a divisor or multiple"),
]


@pytest.mark.parametrize(("make", "message"), BUILD, ids=[message[:40] for _, message in BUILD])
def test_bad_settings(make, message):
    with pytest.raises(StageError, match=re.escape(message)):
        make()


SPECS = [
    ("quanty:2", "no stage is called 'quanty'. Use one of: commonkv, evict"),
    ("evict:0.2,score=best", "no score is called 'best'. Use one of: expected, h2o"),
    ("quant:2,speed=3", "'quant' cannot be built with (2, speed=3)"),
    ("quant", "'quant' cannot be built with (). Its settings: bits (needed), group, codec"),
    ("quant:4,grup=32", "grup=32). Its settings: bits (needed), group, codec"),
    ("evict", "Its settings: keep (needed), score, layers"),
    ("evict:20%", "'20%' are no settings. Write a share as a number"),
    (
        "evict:0.2;quant:4",
        "'0.2;quant:4' are no settings. Write a share as a number, a comma between settings and + between",
    ),
    (["quant:4", "evict:0.2"], "it is a list. Give one string: 'quant:4+evict:0.2'."),
    ("quant:(", "is not a valid spec"),
    ("2", "'2' is not a stage. Write 'quant:2+evict:0.2'."),
    ("quant:2+", "is not a stage"),
    ("quant:[x for x in y]", "is not a number and not a word"),
    ("commonkv:calibration=out/axes.safetensors", "not a number and not a word. Quote a path: 'out/file'"),
    ({"quant": 2}, "is not a valid spec. Give a string such as 'quant:2+evict:0.2' or the dict of to_dict()."),
    ({"stages": [{"bits": 2}]}, "describes no stage: it needs a name and its settings."),
    ({"stages": [], "speed": 3}, "a stack has no setting speed. It has: sinks, window, block, device, fused."),
]


@pytest.mark.parametrize(("spec", "message"), SPECS, ids=[str(spec) for spec, _ in SPECS])
def test_bad_specs(spec, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        KVStack.from_spec(spec)


def test_a_score_without_a_name_cannot_be_written_down():
    class Mine:
        def score(self, kv, context):
            return kv.keys.norm(dim=-1)

    with pytest.raises(StageError, match=r"not a kvstack Score, so it has no name .* Subclass Score"):
        KVStack([Evict(0.2, Mine())]).to_dict()


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in PLUGINS for name in PLUGINS[family]])
def test_a_plugin_that_is_not_installed_is_named(family, name, monkeypatch):
    import importlib.metadata

    folder = Path(__file__).parents[1] / "plugins" / PLUGINS[family][name]
    assert name in (folder / "pyproject.toml").read_text()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    with pytest.raises(SpecError, match=f"{name!r} is in a plugin that is not .*pip install -e plugins/{folder.name}"):
        type_of(family, name)


def test_a_broken_plugin_is_named(monkeypatch):
    import importlib.metadata

    broken = importlib.metadata.EntryPoint("broken", "no_such_module:Stage", "kvstack.stages")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken] * (group == "kvstack.stages"))
    assert KVStack.from_spec("quant:2").spec == "quant:bits=2"
    with pytest.raises(SpecError, match=r"the plugin 'broken' \(no_such_module:Stage\) cannot be loaded: .* Update or"):
        KVStack.from_spec("broken:2")


def forward(model, stack, ids=None, **kwargs):
    return model(tiny.tokens(1, 40) if ids is None else ids, past_key_values=stack, **kwargs)


def test_encoder_decoder():
    shape = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).eval()
    with pytest.raises(BindError, match="T5ForConditionalGeneration is an encoder-decoder"):
        KVStack([Quant(4)], model=model)
    cache = EncoderDecoderCache(KVStack([Quant(4)]), DynamicCache())
    with pytest.raises(BindError, match="sits in an EncoderDecoderCache: kvstack compresses decoder-only models"):
        model(tiny.tokens(1, 5), decoder_input_ids=tiny.tokens(1, 5), past_key_values=cache)


def test_a_model_without_kv_cache():
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(BindError, match="MambaForCausalLM has no kv cache that kvstack can find"):
        KVStack([Quant(4)], model=model)


def test_a_model_whose_layers_all_slide():
    model = tiny.model("mistral", sliding_window=16)
    with pytest.warns(
        KVStackWarning, match=r"nothing to compress in MistralForCausalLM and works as transformers' own"
    ):
        KVStack([Quant(4)], model=model)
    assert KVStack(model=model).seen == 0


def test_a_group_of_layers_that_does_not_divide():
    with pytest.raises(BindError, match=r"stores 3 layers together, and LlamaForCausalLM has 4 .* Use layers= one of"):
        KVStack([Pairs(layers=3)], model=tiny.model("llama"))


def test_a_group_that_does_not_divide_the_head():
    model = tiny.model("llama", num_attention_heads=2, num_key_value_heads=2, head_dim=20)
    with pytest.raises(BindError, match=r"Quant\(bits=2, group=8\) does not fit .* 20 channels, which do not divide"):
        KVStack([Quant(2, group=8)], model=model)


def test_a_model_whose_attention_gives_no_queries():
    from transformers import GPTJConfig, GPTJForCausalLM

    shape = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 256}
    model = GPTJForCausalLM(GPTJConfig(**shape)).eval()
    with pytest.raises(
        BindError, match=r"needs the queries, and the attention of GPTJForCausalLM \(layer 0\) does not"
    ):
        KVStack([Evict(0.2)], model=model)
    with pytest.raises(BindError, match="drops tokens, and the attention of GPTJForCausalLM"):
        forward(model, KVStack([Evict(0.2, "keydiff"), Quant(4, group=8)], sinks=2, window=8))
    stack = KVStack([Quant(4, group=8)], sinks=2, window=8)
    forward(model, stack)
    assert stack.held == 40


def test_another_batch_size():
    stack = KVStack([Quant(4)])
    forward(tiny.model(), stack)
    with pytest.raises(UseError, match=r"holds 1 rows and was given 2. Use reset\(\) or a new stack"):
        forward(tiny.model(), stack, tiny.tokens(2, 5))


def test_nan_keys():
    model = tiny.model()
    broken = torch.full((1, 2, 90, 16), float("nan"))
    for stage, message in ((Quant(4), "keys hold NaN or infinity"), (Evict(0.2, "knorm"), "scores hold NaN")):
        stack = KVStack([stage], sinks=2, window=8)
        for layer in range(model.config.num_hidden_layers):
            stack.update(broken, broken, layer)
        with pytest.raises(UseError, match=rf"{re.escape(repr(stage))} on layer 0: {message}"):
            stack.get_mask_sizes(1, 0)


def test_cache_implementation_given_as_well():
    with pytest.raises(ValueError, match="cache_implementation"):
        tiny.model().generate(
            tiny.tokens(1, 5), past_key_values=KVStack([Quant(4)]), cache_implementation="static", max_new_tokens=2
        )


def test_assisted_decoding_on_a_used_stack():
    stack = KVStack([Quant(4)])
    forward(tiny.model(), stack)
    with pytest.raises(UseError, match="assisted decoding or prompt lookup starts on a cache"):
        tiny.model().generate(tiny.tokens(1, 60), past_key_values=stack, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_crop_beyond_what_was_seen():
    stack = KVStack([Quant(4)])
    forward(tiny.model(), stack)
    with pytest.raises(UseError, match=r"crop\(5\): pass a negative number"):
        stack.crop(5)
    with pytest.raises(UseError, match=r"crop\(-41\): the cache has seen 40 tokens"):
        stack.crop(-41)


def test_an_unbound_stack_that_needs_its_model():
    keys = torch.zeros(1, 2, 5, 16)
    with pytest.raises(UseError, match=r"does not know its model.*Pass model="):
        KVStack([Evict(0.2)]).update(keys, keys, 0)


def test_update_of_a_bound_stack_by_hand():
    stack = KVStack([Quant(4)], model=tiny.model())
    keys = torch.zeros(1, 2, 5, 16)
    with pytest.raises(UseError, match="something else called its update"):
        stack.update(keys, keys, 0)


def test_pickle():
    with pytest.raises(UseError, match=r"cannot be pickled\. copy\.deepcopy works"):
        pickle.dumps(KVStack([Quant(4)]))


def test_a_row_that_is_not_there():
    stack = KVStack([Quant(4)])
    forward(tiny.model(), stack)
    with pytest.raises(UseError, match="row 3 is not in this cache, which has 1 rows"):
        stack.positions(0, row=3)


def test_a_score_of_the_wrong_shape():
    class Flat:
        def score(self, kv, context):
            return kv.keys.sum((1, 3))

    with pytest.raises(UseError, match=r"on layer 0: score gave \(1, 40\), one number per row, kv head and token"):
        forward(tiny.model(), KVStack([Evict(0.2, Flat())], sinks=2, window=4))
