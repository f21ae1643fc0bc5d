"""Every stage and score meets the contract that is shipped for anyone's own."""

from dataclasses import dataclass

import pytest
import torch

from kvstack import CommonKV, Encode, Evict, KVStack, Packed, Quant, Score, registry
from kvstack.authoring import NeedsHidden
from kvstack.spec import make_score
from kvstack.testing import check_registered, check_score, check_settings, check_stage, check_transform, tiny_model
from kvstack.types import KV
from tests.stages import Pairs

STAGES = [Quant(bits) for bits in (2, 3, 4, 8)]
STAGES += [Quant(4, group=8), Quant(4, codec="nf4"), Quant(4, codec="fp4"), Quant(8, codec="int8")]
STAGES += [Evict(0.2), Evict(50), Evict(0.5, "h2o", layers=1), Evict(0.5, "knorm", share_heads=True, pool="max")]
STAGES += [Evict(0.2, "streaming", positions="cache")]
STAGES += [CommonKV(), CommonKV(0.25, layers=2), CommonKV(50, layers=1)]


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_stage(stage):
    check_stage(stage)
    check_registered(stage)


@pytest.mark.parametrize("name", registry.BUILT_IN["scores"])
def test_score(name):
    score = make_score(name)
    check_score(score)
    check_settings(score)
    check_registered(Evict(0.2, score))


def test_transform():
    check_stage(Pairs())


def test_transform_under_another_model():
    """The shapes are the model's, and hidden states are there for a transform that asks for them."""

    class AsksCodec(NeedsHidden):
        def forward(self, group):
            assert [kv.hidden.shape[3] for kv in group] == [128, 128]
            assert group[0].keys.shape[1:] == (2, group[0].tokens, 32)
            return Pairs().forward(group)

        def inverse(self, latents, layer):
            return Pairs().inverse(latents, layer)

    class Asks(Pairs):
        def codec(self):
            return AsksCodec()

    model = tiny_model(hidden_size=128)
    check_transform(Asks(), model)


@pytest.mark.parametrize("unrotated", [True, False])
def test_a_lossless_transform_loses_nothing(unrotated):
    model = tiny_model()
    ids = torch.randint(3, 97, (2, 150), generator=torch.Generator().manual_seed(0))
    plain, stack = KVStack(), KVStack([Pairs(unrotated=unrotated)], sinks=2, window=8, block=16)
    for chunk in ids.split([100, 1, 1, 48], dim=1):
        expected = model(chunk, past_key_values=plain).logits
        torch.testing.assert_close(model(chunk, past_key_values=stack).logits, expected, atol=1e-3, rtol=1e-3)
    assert {role for _, role in stack.batch.cohorts[0].stores[0].packed} == {"mean", "half"}


def test_three_kinds_in_any_order():
    """Evicted tokens go in all layers of the transform's group, and the latents are what is quantized."""
    model = tiny_model()
    ids = torch.randint(3, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    stages = [Pairs(), Quant(8), Evict(0.5)]
    found = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        stack = KVStack([stages[i] for i in order], sinks=2, window=8)
        model(ids, past_key_values=stack)
        found.append(model(ids[:, :1], past_key_values=stack).logits)
        assert stack.held < 120
        assert torch.equal(stack.positions(0), stack.positions(1))
        assert not torch.equal(stack.positions(0), stack.positions(2))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_checks_can_fail():
    """The contract notices a stage that breaks it."""

    @dataclass(frozen=True, repr=False)
    class Forgetful(Encode):
        name = "forgetful"

        def encode(self, x, role):
            return Packed({"data": x}, tokens=x.shape[2], width=x.shape[3], dtype=x.dtype)

        def decode(self, packed, role, out=None):
            return packed.parts["data"] * 0.5

    class Flat(Score):
        def score(self, kv, context):
            return kv.keys.sum((1, 3))

    class Drifting(Pairs):
        def inverse(self, latents, layer):
            kv = super().inverse(latents, layer)
            return KV(kv.keys, kv.values - kv.values.mean(2, keepdim=True))

    with pytest.raises(AssertionError, match="values of layer 0 change when latents of later granules stand behind"):
        check_stage(Drifting())
    with pytest.raises(AssertionError, match="wrote something else"):
        check_stage(Forgetful())
    with pytest.raises(AssertionError, match=r"score gave \(2, 48\)"):
        check_score(Flat())
