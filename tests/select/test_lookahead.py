"""Looking ahead: queries of the whole text, moved behind it, against plain loops."""

import math

import pytest
import torch

from kvstack import KV, BindError, Context, Evict, KVStack, LookAhead
from kvstack.store.tracks import REFERENCES, References
from tests import tiny


class Turns:
    """Rotates the first two channels of a head by an angle for each position."""

    def rotate(self, x, positions, sign=1):
        angle = sign * 0.1 * positions.float()[..., None]
        one, other = x[..., :1], x[..., 1:2]
        turned = one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos()
        return torch.cat([*turned, x[..., 2:]], dim=-1)

    def unrotate(self, x, positions):
        return self.rotate(x, positions, -1)


@pytest.mark.parametrize("over", ["mean", "max"])
def test_it_is_attention_of_moved_queries(over):
    draw, seen, at, ahead = torch.Generator().manual_seed(0), 20, [3, 9, 17], 7
    keys, queries = torch.randn(2, 2, 20, 4, generator=draw), torch.randn(2, 6, 3, 4, generator=draw)
    context = Context(
        layer=0, seen=seen, positions=torch.arange(20)[None, None], scaling=0.5, rope=Turns(),
        references=(queries, torch.tensor(at)),
    )  # fmt: skip
    found = LookAhead(ahead=ahead, over=over).score(KV(keys, keys), context)
    for row in range(2):
        for head in range(2):
            weights = []
            for group in range(3):
                for number, (place, target) in enumerate(zip(at, [20, 23, 26], strict=True)):
                    q = queries[row, 3 * head + group, number].tolist()
                    angle = 0.1 * (target - place)
                    q[0], q[1] = (
                        q[0] * math.cos(angle) - q[1] * math.sin(angle),
                        q[0] * math.sin(angle) + q[1] * math.cos(angle),
                    )
                    dots = [0.5 * sum(a * b for a, b in zip(q, k, strict=True)) for k in keys[row, head].tolist()]
                    whole = sum(math.exp(dot) for dot in dots)
                    weights.append([math.exp(dot) / whole for dot in dots])
            each = zip(*weights, strict=True)
            expected = [max(x) if over == "max" else sum(x) / len(x) for x in each]
            torch.testing.assert_close(found[row, head], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_whole_texts_are_asked_evenly():
    known = References()
    for length in (2, 300, 384, 385, 1000, 5000):
        queries = torch.arange(length, dtype=torch.float32)[None, None, :, None]
        known.add(queries, length + 7, 0)
        asked, at = known.asked()
        assert min(length, REFERENCES / 2) <= asked.shape[2] <= REFERENCES
        assert (asked.flatten() + 7).tolist() == at.tolist()
        assert set(at.diff().tolist()) <= {int(at[1] - at[0])}
        assert length + 7 - at[-1] <= at[1] - at[0]


def test_no_queries_are_held_after_a_prompt():
    model = tiny.model("llama")
    stack = KVStack([Evict(0.4, "lookahead")], model=model, sinks=2, window=8, block=8)
    model(tiny.tokens(1, 90), past_key_values=stack)
    assert not [part for part in stack.report().parts if "quer" in part.part]
    for i in range(20):  # the last few are held while decoding
        model(tiny.tokens(1, 1, seed=i), past_key_values=stack)
    assert stack.held < 60


def test_latent_attention_is_refused():
    with pytest.raises(BindError, match="moves queries"):
        KVStack([Evict(0.4, "lookahead")], model=tiny.model("deepseek_v3"))
