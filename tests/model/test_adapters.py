"""Adapters (PEFT): each has fingerprints and calibrations of its own, and tokens of one are not read with another."""

import pytest
import torch
from torch import nn

from kvstack import BindError, CommonKV, Evict, KVStack, Quant, UseError, calibrate
from kvstack.model.adapters import AdapterWatch, unwrapped
from kvstack.model.fingerprint import fingerprint, kv_fingerprint
from kvstack.testing import tiny_model
from tests import tiny

STACKS = {"empty": [], "quant": [Quant(4)], "evict": [Evict(0.5)], "commonkv": [CommonKV(0.5), Quant(4)]}


class Adapted(nn.Module):
    """Stands for a layer of peft: a linear layer, and adapters by name."""

    def __init__(self, base_layer, names="ab"):
        super().__init__()
        self.base_layer = base_layer
        self.extra = nn.ModuleDict({name: nn.Linear(base_layer.in_features, base_layer.out_features) for name in names})
        self.scaling = dict.fromkeys(names, 1.0)
        self.active_adapters, self.merged_adapters, self.disable_adapters = ["a"], [], False

    @property
    def merged(self):
        return bool(self.merged_adapters)

    def forward(self, x):
        y = self.base_layer(x)
        for name in [] if self.disable_adapters or self.merged else self.active_adapters:
            y = y + self.scaling[name] * self.extra[name](x)
        return y


def adapted(**changes):
    """A model with an adapter `a` that is at work and one `b` that is not, in two layers; and these layers."""
    model = tiny_model(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in model.model.layers[1:3]:
            layer.self_attn.k_proj = Adapted(layer.self_attn.k_proj)
            layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
    return model.eval(), [module for module in model.modules() if isinstance(module, Adapted)]


def setting(layers, name, value):
    for layer in layers:
        setattr(layer, name, value)


CHANGES = {
    "another": lambda layers: setting(layers, "active_adapters", ["b"]),
    "another, as a word": lambda layers: setting(layers, "active_adapters", "b"),
    "both": lambda layers: setting(layers, "active_adapters", ["a", "b"]),
    "none": lambda layers: setting(layers, "active_adapters", []),
    "disabled": lambda layers: setting(layers, "disable_adapters", True),
    "another factor": lambda layers: setting(layers, "scaling", {"a": 0.5, "b": 1.0}),
    "in one layer": lambda layers: setting(layers[-1:], "disable_adapters", True),
}


@pytest.mark.parametrize("of", [fingerprint, kv_fingerprint])
def test_what_is_at_work_is_told_apart(of):
    model, layers = adapted()
    prints = [of(tiny_model()), of(model)]
    for name in ("another", "both", "another factor", "in one layer"):
        _, layers = changed = adapted()
        CHANGES[name](layers)
        prints.append(of(changed[0]))
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("change", ["none", "disabled"])
def test_without_adapters_it_is_the_model_it_was(change):
    model, layers = adapted()
    CHANGES[change](layers)
    assert fingerprint(model) == fingerprint(tiny_model())
    assert kv_fingerprint(model) == kv_fingerprint(tiny_model())


def test_the_name_of_an_adapter_does_not_matter():
    one, other = adapted()[0], adapted()[0]
    for layer in other.modules():
        if isinstance(layer, Adapted):
            layer.extra = nn.ModuleDict({"mine": layer.extra["a"], "z": layer.extra["b"]})
            layer.scaling, layer.active_adapters = {"mine": 1.0, "z": 1.0}, "mine"
    assert fingerprint(one) == fingerprint(other)


def test_merged_adapters_are_in_the_weights():
    model, layers = adapted()
    for layer in layers:
        with torch.no_grad():
            layer.base_layer.weight += layer.extra["a"].weight
        layer.merged_adapters = ["a"]
    expected = fingerprint(model)
    for layer in model.model.layers[1:3]:
        layer.self_attn.k_proj, layer.mlp.up_proj = layer.self_attn.k_proj.base_layer, layer.mlp.up_proj.base_layer
    assert fingerprint(model) == expected


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stages", STACKS)
def test_a_switch_while_tokens_are_held(stages, change, tmp_path):
    """Refused, nothing lost; after the switch back all goes on as if nothing had been."""
    model, layers = adapted()
    ids, new = tiny.tokens(1, 150), tiny.tokens(1, 2, seed=1)
    before = [dict(vars(layer)) for layer in layers]
    stack, other = (KVStack(STACKS[stages], sinks=2, window=8, model=model) for _ in range(2))
    for each in (stack, other):
        model(ids, past_key_values=each)
    CHANGES[change](layers)
    for use in (lambda: model(new, past_key_values=stack), lambda: model.model(new, past_key_values=stack)):
        with pytest.raises(
            UseError, match=r"holds tokens that LlamaForCausalLM computed with 'a', and .*, so it cannot be continued"
        ):
            use()
    with pytest.raises(UseError, match=r"so it cannot be saved\. Switch back"):
        stack.save(tmp_path / "cache")
    assert stack.seen == 150
    for layer, was in zip(layers, before, strict=True):
        vars(layer).update(was)
    assert torch.equal(model(new, past_key_values=stack).logits, model(new, past_key_values=other).logits)
    assert stack.seen == 152


def test_after_reset_the_axes_are_those_of_the_adapter():
    model, layers = adapted()
    ids = tiny.tokens(1, 100)
    stack = KVStack([CommonKV(0.5), Quant(4)], sinks=2, window=8)
    model(ids, past_key_values=stack)
    first = stack.batch.binding.plan.codecs[0].fingerprint
    stack.reset()
    CHANGES["another"](layers)
    model(ids, past_key_values=stack)
    assert stack.batch.binding.plan.codecs[0].fingerprint != first
    other = KVStack([CommonKV(0.5), Quant(4)], sinks=2, window=8)
    model(ids, past_key_values=other)
    new = tiny.tokens(1, 1)
    assert torch.equal(model(new, past_key_values=stack).logits, model(new, past_key_values=other).logits)


def test_a_switch_between_binding_and_the_first_forward():
    model, layers = adapted()
    given = calibrate(model, tokens=400)
    stack = KVStack([CommonKV(calibration=given)], model=model)
    CHANGES["another"](layers)
    with pytest.raises(ValueError, match="was made for another model than this LlamaForCausalLM"):
        model(tiny.tokens(1, 20), past_key_values=stack)
    layers[0].active_adapters = ["a"]
    setting(layers, "active_adapters", ["a"])
    model(tiny.tokens(1, 20), past_key_values=stack)
    assert stack.seen == 20


def test_adapters_that_come_while_tokens_are_held():
    model = tiny_model()
    stack = KVStack([Quant(4)])
    model(tiny.tokens(1, 20), past_key_values=stack)
    attention = model.model.layers[2].self_attn
    attention.v_proj = Adapted(attention.v_proj)
    with pytest.raises(UseError, match="computed with no adapter, and 'a' is active now"):
        model(tiny.tokens(1, 1), past_key_values=stack)


def test_watching_costs_little():
    """It is asked in every forward: no hash, no walk through modules that stay as they are."""
    model, _ = adapted()
    watch = AdapterWatch(model)
    assert len(watch.state()) == 4
    model.modules = lambda: pytest.fail("walked")
    assert watch.state() == watch.state()


# ---- with peft itself


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


KINDS = {
    "lora": lambda peft: peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False),
    "dora": lambda peft: peft.LoraConfig(
        r=4, target_modules=["v_proj", "up_proj"], use_dora=True, init_lora_weights=False
    ),
    "ia3": lambda peft: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "whole layers": lambda peft: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(peft, kind):
    """On, off, one or another: each is told apart, with the wrapper around the model and without."""
    plain, model = tiny_model(), tiny_model()
    wrapped = peft.get_peft_model(model, KINDS[kind](peft))
    wrapped.add_adapter("b", KINDS[kind](peft))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "b" in name.split("."):
                parameter.add_(0.5)
    assert unwrapped(wrapped) is model
    ids, new = tiny.tokens(1, 100), tiny.tokens(1, 1)
    for of in (fingerprint, kv_fingerprint):
        first = of(wrapped)
        wrapped.set_adapter("b")
        second = of(wrapped)
        with wrapped.disable_adapter():
            assert of(wrapped) == of(plain) == of(model)
        wrapped.set_adapter("default")
        assert first == of(wrapped) == of(model)
        assert len({first, second, of(plain)}) == 3
    stack = KVStack([CommonKV(0.5), Quant(4)])
    wrapped(ids, past_key_values=stack)
    with wrapped.disable_adapter(), pytest.raises(UseError, match="computed with 'default', and no adapter"):
        wrapped(new, past_key_values=stack)
    wrapped.set_adapter("b")
    with pytest.raises(UseError, match="computed with 'default', and 'b' is active now"):
        wrapped.generate(ids[:, :3], past_key_values=stack, max_new_tokens=1)
    stack.reset()
    wrapped(ids, past_key_values=stack)
    assert stack.seen == 100


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_for_each_row(peft):
    wrapped = peft.get_peft_model(tiny_model(), KINDS["lora"](peft)).eval()
    wrapped.add_adapter("b", KINDS["lora"](peft))
    ids, names = tiny.tokens(2, 20), ["default", "b"]
    stack = KVStack([Quant(4)])
    wrapped(ids, past_key_values=stack, adapter_names=names)
    wrapped(ids[:, :1], past_key_values=stack, adapter_names=names)
    with pytest.raises(UseError, match="computed with 'default' and 'b'"):
        wrapped(ids[:, :1], past_key_values=stack, adapter_names=names[::-1])
    with pytest.raises(BindError, match=r"have an adapter each \('default' and 'b'\), and KVStack\(\[CommonKV\(\)\]\)"):
        wrapped(ids, past_key_values=KVStack([CommonKV()]), adapter_names=names)
