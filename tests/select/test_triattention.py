"""TriAttention: mean queries turned to positions ahead, against plain loops over complex numbers."""

import cmath
import math

import pytest
import torch
from transformers import DynamicCache

from kvstack import Context, TriAttention
from kvstack.calibration.listening import listening
from kvstack.model.layers import LayerGroups
from kvstack.select import triattention
from kvstack.types import KV
from tests import tiny

BASE = 10_000.0
"""Of the frequencies of a tiny Llama, heads of 16."""


def as_complex(x):
    """A head (16 numbers) as one complex number for each of its 8 frequencies."""
    return [complex(x[f], x[f + 8]) for f in range(8)]


def queries_of(model, ids):
    """Layer -> un-rotated queries (4, T, 16), from the projections."""
    hidden, found = {}, {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.__setitem__(module.layer_idx, kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(model.model.layers):
        found[i] = layer.self_attn.q_proj(hidden[i])[0].unflatten(-1, (4, 16)).transpose(0, 1)
    return found


def statistics(model, texts):
    """Layer -> for each query head and frequency, (mean, mean of norms), token by token."""
    each = {i: [[[] for _ in range(8)] for _ in range(4)] for i in range(4)}
    for ids in texts:
        for i, queries in queries_of(model, ids).items():
            for head in range(4):
                for query in queries[head, 4:].tolist():
                    for f, x in enumerate(as_complex(query)):
                        each[i][head][f].append(x)
    return {
        i: [[(sum(xs) / len(xs), sum(map(abs, xs)) / len(xs)) for xs in head] for head in heads]
        for i, heads in each.items()
    }


TEXTS = [tiny.tokens(1, 40, seed=seed) for seed in range(2)]


def test_mean_queries():
    model = tiny.model()
    groups, expected = LayerGroups(model, 1), statistics(model, TEXTS)
    with listening(model, groups.full) as read:
        found = triattention.find(read, TEXTS, groups)
    for i in range(4):
        mean, loose = found[i]["mean"].flatten(0, 1), found[i]["loose"].flatten(0, 1)
        assert (mean.shape, loose.shape) == ((4, 16), (4, 8))
        for head in range(4):
            for f, x in enumerate(as_complex(mean[head].tolist())):
                average, norm = expected[i][head][f]
                assert x == pytest.approx(average, abs=1e-4)
                assert float(loose[head, f]) == pytest.approx(norm - abs(average), abs=1e-4)


def plain_scores(statistics, keys, positions, seen, horizon, over):
    """One kv head: (T,) by loops; `keys` (T, 16) are un-rotated."""
    by_head = []
    for head in statistics:
        logits = []
        for key, at in zip(keys.tolist(), positions.tolist(), strict=True):
            total, distance, count = 0.0, 1, 0
            while distance <= horizon:
                for f, k in enumerate(as_complex(key)):
                    mean, _ = head[f]
                    speed = BASE ** (-2 * f / 16)
                    gap = seen - 1 + distance - at
                    total += abs(mean) * abs(k) * math.cos(speed * gap + cmath.phase(mean) - cmath.phase(k))
                distance, count = 2 * distance, count + 1
            total /= count
            total += sum((norm - abs(mean)) * abs(k) for (mean, norm), k in zip(head, as_complex(key), strict=True))
            logits.append(total)
        logits = torch.tensor(logits, dtype=torch.float64)
        by_head.append((logits - logits.mean()) / logits.std(correction=0))
    both = torch.stack(by_head)
    return both.amax(0) if over == "max" else both.mean(0)


@pytest.mark.parametrize("over", ["max", "mean"])
@pytest.mark.parametrize("horizon", [1, 100, 4096])
def test_score_by_hand(horizon, over, monkeypatch):
    """Of tokens that are held, some of those before them gone."""
    model, ids = tiny.model(), tiny.tokens(1, 60, seed=9)
    groups, expected = LayerGroups(model, 1), statistics(model, TEXTS)
    with listening(model, groups.full) as read:
        found = triattention.find(read, TEXTS, groups)
    monkeypatch.setattr(triattention, "fitted_to", lambda *given: triattention.ByLayer(found, {}))
    ranking = TriAttention(horizon=horizon, over=over).bind(model, range(4))
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    for layer in range(4):
        held = torch.tensor([0, 3, 4, 10, 11, 30, 31, 50, 58, 59])
        kv = KV(cache.layers[layer].keys[:, :, held], cache.layers[layer].values[:, :, held])
        scores = ranking.score(kv, Context(layer, 60, held[None, None], rope=groups.ropes[layer]))
        keys = groups.unrotated(layer, cache.layers[layer].keys)[0]
        for head in range(2):
            plain = plain_scores(expected[layer][2 * head : 2 * head + 2], keys[head, held], held, 60, horizon, over)
            torch.testing.assert_close(scores[0, head].double(), plain, atol=2e-3, rtol=2e-3)
