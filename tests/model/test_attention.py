"""What attention modules can do: their classes are asked, not the files that they are in."""

import importlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvstack import BindError, Evict, KVStack, Quant
from kvstack.model.attention import gives_queries, interface
from tests import tiny

ATTENDS = {
    ("git", "GitSelfAttention"): False,
    ("git", "GitVisionAttention"): True,
    ("bigbird_pegasus", "BigBirdPegasusSelfAttention"): False,
    ("bigbird_pegasus", "BigBirdPegasusDecoderAttention"): True,
    ("informer", "InformerProbSparseAttention"): False,
    ("informer", "InformerAttention"): True,
    ("bloom", "BloomAttention"): False,
    ("falcon", "FalconAttention"): False,
    ("gpt2", "GPT2Attention"): True,
    ("llama", "LlamaAttention"): True,
    ("deepseek_v3", "DeepseekV3Attention"): True,
}
TINY = {
    "git": {"num_hidden_layers": 2},
    "inkling_text": {
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": ["dense"] * 4,
    },
}
SETTINGS = {"sinks": 2, "window": 8}


@pytest.mark.parametrize(("name", "kind"), ATTENDS)
def test_the_class_is_asked_and_not_its_file(name, kind):
    modelling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    module = object.__new__(getattr(modelling, kind))
    assert gives_queries(module) is ATTENDS[name, kind]
    if ATTENDS[name, kind]:
        assert interface(module) is modelling.ALL_ATTENTION_FUNCTIONS


def test_a_class_that_inherits_its_forward_or_calls_another_function():
    modelling = importlib.import_module("transformers.models.llama.modeling_llama")

    class Inherits(modelling.LlamaAttention):
        pass

    class Passes(modelling.LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Attends(modelling.LlamaAttention):
        def forward(self, hidden_states, past_key_values=None):
            return past_key_values.update(hidden_states, hidden_states, self.layer_idx)

    found = [gives_queries(object.__new__(kind)) for kind in (Inherits, Passes, Attends)]
    assert found == [True, True, False]


def built(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(tiny.SHAPE | TINY[name]))
    return AutoModelForCausalLM.from_config(config).eval()


def padded(form):
    """A mask of two rows, of which the second one begins with padding."""
    if form == "2D":
        mask = torch.ones(2, 96, dtype=torch.long)
        mask[1, :40] = 0
        return mask
    seen = torch.ones(2, 1, 96, 96, dtype=torch.bool).tril()
    seen[1, :, :, :40] = False
    seen |= torch.eye(96, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def read(model, cache, mask):
    """Logits of a prompt and of steps. GIT places a mask of two dimensions wrongly where there is no picture."""
    found, ids = [], tiny.tokens(2, 96)
    for first, last in ((0, 90), *((i, i + 1) for i in range(90, 96))):
        mine = mask[:, :last] if mask.dim() == 2 else mask[:, :, first:last, :last]
        found.append(model(ids[:, first:last], attention_mask=mine, past_key_values=cache).logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize(("name", "form"), [("git", "4D"), ("inkling_text", "2D")])
def test_padding_is_held_where_nobody_can_leave_it_out(name, form):
    """GIT multiplies by itself, and Inkling counts tokens for a bias of its own."""
    model, mask = built(name), padded(form)
    dense = read(model, DynamicCache(config=model.config), mask)
    whole = KVStack([Quant(8, group=8)], sinks=2, window=200)  # nothing is sealed
    assert torch.equal(read(model, whole, mask), dense)
    found = read(model, KVStack([Quant(8, group=8)], **SETTINGS), mask)
    assert float((found - dense).norm() / dense.norm()) < 0.02
    for score in ("keydiff", "snapkv"):
        with pytest.raises(BindError, match=r"counts? every token it has seen.*stages that keep all tokens work"):
            KVStack([Evict(0.5, score)], model=model)
