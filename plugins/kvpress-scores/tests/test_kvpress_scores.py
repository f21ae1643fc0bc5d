"""Presses as scores: the adapter on presses made here, and kvpress' own where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import pytest
import torch
from kvstack_kvpress_scores import KVPressScore

from kvstack import KV, Context, Evict, KeyDiff, KNorm, KVStack, StageError, registry
from kvstack.testing import check_registered, check_score, check_settings, tiny_model

installed = pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="kvpress is not installed")
NEEDS_NOTHING_ELSE = ["KnormPress", "KeyDiffPress", "LagKVPress", "CURPress", "LeverageScorePress"]


@dataclass
class Press:
    """As kvpress' presses are."""

    compression_ratio: float = 0.0


class ValueNorm(Press):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return values.norm(dim=-1)


class BeforeRotation(Press):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        rows, tokens, _ = hidden_states.shape
        keys = module.k_proj(hidden_states).view(rows, tokens, -1, module.head_dim).transpose(1, 2)
        return keys[..., 0]


class Chance(Press):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return torch.rand(keys.shape[:3])


class AsksHidden(Press):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return hidden_states.mean(-1)[:, None].expand(keys.shape[:3])


class AsksModule(Press):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return (values @ module.o_proj.weight).norm(dim=-1)


class AsksAttention(Press):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is not None, "eager attention only"
        return attentions.sum(2)


class Flat(Press):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys.norm(dim=(1, 3))


class SnapKVPress(ValueNorm):
    pass


def some(tokens=40):
    draw = torch.Generator().manual_seed(0)
    kv = KV(*(torch.randn(2, 2, tokens, 16, generator=draw) for _ in range(2)))
    return kv, Context(layer=1, seen=tokens, positions=torch.arange(tokens)[None, None])


@pytest.mark.parametrize("press", [ValueNorm(), BeforeRotation(), Chance()], ids=lambda press: type(press).__name__)
def test_a_press_meets_the_contract_of_a_score(press):
    check_score(KVPressScore(press))
    check_settings(KVPressScore(press))


def test_a_score_is_what_the_press_says():
    kv, context = some()
    found = KVPressScore(ValueNorm()).score(kv, context)
    for place in ((0, 0, 0), (1, 1, 39)):
        norm = sum(float(number) ** 2 for number in kv.values[place]) ** 0.5
        assert float(found[place]) == pytest.approx(norm)


def test_a_press_chooses_as_the_built_in_score_of_the_same_rule():
    class Norm(Press):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return -keys.norm(dim=-1)

    model, ids = tiny_model(), torch.randint(3, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    found = []
    for score in (KVPressScore(Norm()), KNorm()):
        stack = KVStack([Evict(0.3, score)], sinks=2, window=8)
        model.generate(ids, past_key_values=stack, max_new_tokens=40, do_sample=False)
        found.append([stack.positions(layer) for layer in range(4)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_keys_come_un_rotated_where_a_press_projects_hidden_states():
    model = tiny_model()
    seen = {}

    class Look(BeforeRotation):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            scores = super().score(module, hidden_states, keys, values, attentions, kwargs)
            seen[module.layer_idx] = scores
            return scores

    ids = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    embedded = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    expected = model.model.layers[0].self_attn.k_proj(embedded).view(1, 60, 2, 16).transpose(1, 2)
    model(ids, past_key_values=KVStack([Evict(0.3, KVPressScore(Look()))], sinks=2, window=8))
    torch.testing.assert_close(seen[0], expected[..., 0], atol=1e-4, rtol=1e-4)


def test_random_numbers_of_others_go_on_as_they_were():
    kv, context = some()
    score = KVPressScore(Chance())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = score.score(kv, context)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, score.score(kv, context))


REFUSED = [
    (AsksHidden(), r"does not work on keys and values alone \(AttributeError: .*mean.*\)\. Use \"KnormPress\""),
    (AsksModule(), "it asks the attention module for 'o_proj', which a score does not get"),
    (AsksAttention(), "AssertionError: eager attention only"),
    (Flat(), r"it gave \(1, 320\) for 320 tokens of 2 heads"),
    (ValueNorm(compression_ratio=0.5), r"compression_ratio=0.5 has no say here. Leave it out: Evict\(keep\) cuts."),
    (SnapKVPress(), 'this press needs what kvstack gives to scores of its own. Use score="snapkv".'),
    ("StreamingLLMPress", 'Use score="streaming".'),
    (ValueNorm, r"a press has a method score. Use a press that ranks tokens"),
]


@pytest.mark.parametrize(("press", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(press, message):
    with pytest.raises(StageError, match=message):
        KVPressScore(press)


def test_arguments_are_for_a_press_that_is_named():
    with pytest.raises(StageError, match=r"arguments build a press that is named\. Give them to the press"):
        KVPressScore(ValueNorm(), lag_size=3)


def test_without_kvpress(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "kvpress" else there(name))
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    with pytest.raises(StageError, match=r"kvpress is not installed\. Run: pip install --no-deps kvpress"):
        KVPressScore("KnormPress")


# ---- with a package that looks like kvpress, and with kvpress itself

FILES = {
    "__init__.py": "raise RuntimeError('the package itself ran')",
    "presses/__init__.py": "",
    "presses/norm_press.py": "from dataclasses import dataclass\n\n@dataclass\nclass NormPress:\n"
    "    power: int = 2\n\n    def score(self, module, hidden, keys, values, attentions, kwargs):\n"
    "        return keys.norm(dim=-1) ** self.power\n",
    "presses/odd_press.py": "import no_such_module\n\nclass OddPress: ...\n",
}


@pytest.fixture
def kvpress(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / "kvpress" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)


@pytest.mark.usefixtures("kvpress")
def test_a_press_is_found_by_its_name_and_its_package_is_not_run():
    kv, context = some()
    score = KVPressScore("NormPress", power=3)
    assert repr(score) == "KVPressScore(press='NormPress', power=3)"
    assert torch.equal(score.score(kv, context), kv.keys.norm(dim=-1) ** 3)
    assert not [name for name in sys.modules if name.startswith("kvpress")]


@pytest.mark.usefixtures("kvpress")
@pytest.mark.skipif("kvpress" not in registry.score_names(), reason="the plugin is not installed")
def test_it_travels_in_a_spec():
    stack = KVStack.from_spec("evict:0.3,score=kvpress(NormPress,power=3)")
    assert stack.spec == "evict:keep=0.3,score=kvpress(press=NormPress,power=3)"
    check_registered(stack.stages[0])


def test_a_press_of_ones_own_cannot_be_written_down():
    with pytest.raises(StageError, match="so it has no name to be stored under"):
        KVStack([Evict(0.3, KVPressScore(ValueNorm()))]).to_dict()


@pytest.mark.usefixtures("kvpress")
@pytest.mark.parametrize(
    ("press", "arguments", "message"),
    [
        ("NoPress", {}, "kvpress has no press called 'NoPress'. Use its class name, such as"),
        ("NormPress", {"size": 3}, "the press cannot be built: .*'size'.*See its arguments in kvpress"),
        ("OddPress", {}, "OddPress of kvpress cannot be imported: No module named 'no_such_module'. Update"),
    ],
)
def test_a_name_that_builds_nothing(press, arguments, message):
    with pytest.raises(StageError, match=message):
        KVPressScore(press, **arguments)


@installed
@pytest.mark.parametrize("press", NEEDS_NOTHING_ELSE)
def test_kvpress(press):
    check_score(KVPressScore(press))
    assert Evict(0.2, KVPressScore(press)) == Evict(0.2, KVPressScore(press))


@installed
@pytest.mark.parametrize(("press", "same"), [("KnormPress", KNorm()), ("KeyDiffPress", KeyDiff())])
def test_kvpress_says_what_kvstack_says(press, same):
    kv, context = some()
    torch.testing.assert_close(KVPressScore(press).score(kv, context), same.score(kv, context))


@installed
@pytest.mark.parametrize("press", ["NonCausalAttnPress", "CompactorPress", "QFilterPress", "KVzapPress", "CapPress"])
def test_kvpress_that_needs_more(press):
    with pytest.raises(StageError, match="does not work on keys and values alone"):
        KVPressScore(press)
