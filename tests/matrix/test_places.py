"""Positions inside the cache, on every architecture: a window of the newest tokens alone is the same at any place.

Without sinks, tokens held follow each other in the text, so their places are their positions less one number. All that
matters to a rotation is how far two tokens are apart. So a model must say the same with both, or be refused.
"""

import warnings

import pytest
import torch

from kvstack import BindError, Evict, KVStack, KVStackWarning, UseError

from .architectures import NAMES, VOCABULARY, attentions, build, pictures

SETTINGS = {"sinks": 0, "window": 8, "block": 4}
TURNS = (60, 1, 1, 1, 30, 1, 1, 1, 1, 20, 1, 20)
REFUSED = (
    "does not rotate its keys",
    "cannot rotate the keys",
    "left to transformers' own cache",
    "other angles for a text",
    "caches latents",
    "does not go through transformers' interface",
    "makes a bias of its own",
)


def stack_for(model, which):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVStackWarning)  # some have nothing to compress
        return KVStack([Evict(16, "streaming", positions=which)], model=model, **SETTINGS)


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
def test_a_window_is_the_same_at_any_place(name):
    model = build(name, attentions(name)[0])
    try:
        stacks = [stack_for(model, which) for which in ("text", "cache")]
    except BindError as error:
        assert any(words in str(error) for words in REFUSED)  # noqa: PT017
        return
    ids = torch.randint(3, VOCABULARY - 10, (2, sum(TURNS)), generator=torch.Generator().manual_seed(1))
    found = [[], []]
    for stack, logits in zip(stacks, found, strict=True):
        for new, places in zip(ids.split(TURNS, 1), torch.arange(sum(TURNS)).split(TURNS), strict=True):
            with torch.no_grad():
                told = {"past_key_values": stack, "position_ids": places.expand(2, -1)}
                logits.append(model(new, **told).logits)
    text, cache = (torch.cat(logits, 1) for logits in found)
    torch.testing.assert_close(cache, text, atol=1e-3 * float(text.abs().max()), rtol=0)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_images_with_positions_of_their_own_are_refused(name):
    model = build(name)
    stack = stack_for(model, "cache")
    ids = torch.randint(3, VOCABULARY - 10, (2, 60), generator=torch.Generator().manual_seed(1))
    with pytest.raises(UseError, match="of images"):
        model(**pictures(model, ids, None), past_key_values=stack)
    assert stack.held == 0
