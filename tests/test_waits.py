"""How often a stack waits for its device: where Python asks for a number, a GPU has to finish all it was given before.

Counted on the meta device, which has no numbers: whoever asks for one is seen, and gets a made-up answer.
"""

import copy
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvstack
from kvstack import Evict, KVStack, Quant, attend
from tests import tiny
from tests.stages import Pairs

LAYERS = 4
OURS = str(Path(kvstack.__file__).parent)
ASKING = {torch.ops.aten._local_scalar_dense: 1, torch.ops.aten.equal: True}


class Waits(TorchDispatchMode):
    """Counts who asks, by file; a file of ours where one is behind it."""

    def __init__(self):
        super().__init__()
        self.by = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in ASKING:
            self.by[_asking()] += 1
            return ASKING[function.overloadpacket]
        return function(*args, **(kwargs or {}))


def _asking():
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return "elsewhere" if frame is None else Path(frame.f_code.co_filename).name


@pytest.fixture
def waits(monkeypatch):
    """Who waits in a forward of so many tokens, one after the other of one text."""
    monkeypatch.setattr(attend, "exactly", lambda call: nullcontext())  # torch knows no autocast there

    def run(stages, *lengths):
        model, counted = copy.deepcopy(tiny.model("llama")), []
        stack = KVStack(stages, model=model)  # looks at rotated keys
        model.to("meta")
        for length in lengths:
            with Waits() as waits, torch.no_grad():
                ids = torch.zeros(1, length, dtype=torch.long, device="meta")
                model(ids, past_key_values=stack, logits_to_keep=1)
            counted.append(dict(waits.by))
        return counted

    return run


STACKS = {
    "none": [],
    "quant": [Quant(4)],
    "evict": [Evict(0.5)],
    "keydiff": [Evict(0.5, score="keydiff")],
    "both": [Quant(4), Evict(0.5)],
    "transform": [Pairs()],
    "three": [Pairs(), Quant(4), Evict(0.5)],
}


def test_waiting_is_seen(waits, monkeypatch):
    plain = Quant.encode
    monkeypatch.setattr(Quant, "encode", lambda self, x, role: (bool(x.sum() > 0), plain(self, x, role))[1])
    assert sum(waits([Quant(4)], 300)[0].values()) > 2 * LAYERS


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
def test_a_step_waits_for_nothing(stages, waits):
    """But for those that evict or seal: a token in ten, or in thirty."""
    _, *steps = waits(stages, 300, *[1] * 40)
    quiet = [step for step in steps if not step]
    assert not steps[0]
    assert len(quiet) >= 30


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
def test_compressing_waits_once_for_each_tensor(stages, waits):
    """Numbers are looked at before they are stored: keys and values of every layer, and scores; and positions once.
    Before tokens are evicted, or merged and not encoded, those of all layers of a group are looked at together."""
    (prompt,) = waits(stages, 300)
    scores = LAYERS * any(isinstance(stage, Evict) for stage in stages)
    tensors = 2 * LAYERS * any(isinstance(stage, Quant) for stage in stages)
    groups = len(KVStack(stages, model=tiny.model("llama")).binding.groups)
    groups *= any(isinstance(stage, Evict | Pairs) for stage in stages)
    assert prompt.pop("store.py", 0) <= scores + groups
    assert prompt.pop("kivi.py", 0) <= tensors
    assert prompt.pop("given.py", 0) <= 1
    assert not prompt
