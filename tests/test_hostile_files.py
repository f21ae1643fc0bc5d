"""A file of which anything was changed, with a valid checksum, gives one `UseError` that names it, or a cache whose
parts fit together: it goes on with finite logits.

`make fuzz` tries thousands of changes; a few of each stack run with all tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random

import pytest
import torch

from kvstack import KVStack, UseError, disk
from kvstack.errors import KVStackError
from kvstack.files import read_tensors
from tests import tiny
from tests.mutations import mutated

COUNT = int(os.environ.get("KVSTACK_FUZZ", "20"))
"""Changes of each stack."""


def plugin(name):
    return importlib.util.find_spec(f"kvstack_{name}") is not None


STACKS = {
    "empty": ("llama", "", {}),
    "quant2": ("llama", "quant:2,group=8", {}),
    "quant3-deflated": ("llama", "quant:3,group=8", {"compress": True}),
    "quant8-evict-padded": ("llama", "quant:8,group=8+evict:0.5,score=keydiff", {"padded": True}),
    "nf4": ("llama", "quant:4,codec=nf4+evict:0.5,score=keydiff", {}),
    "int8": ("llama", "quant:8,codec=int8", {}),
    "snapkv": ("llama", "evict:0.4,layers=2", {"padded": True}),
    "snapkv-heads": ("llama", "evict:0.4,score=tova", {}),
    "h2o-quant": ("llama", "quant:4,group=8+evict:0.4,score=h2o", {"padded": True}),
    "weights": ("llama", "commonkv:0.5,basis=weights,layers=2+quant:4,group=8", {}),
    "mean": ("llama", "commonkv:0.5,basis=weights,merge=mean,layers=2", {}),
    "apart": ("llama", "commonkv:0.5,basis=weights,unmerged=0.3,layers=2+quant:4", {"tokens": 700}),
    "calibrated": ("llama", "commonkv:0.5,layers=2+quant:2+evict:0.5", {"compress": True}),
    "sliding": ("gemma3", "quant:4,group=8", {}),
    "sliding-empty": ("gemma3", "", {"compress": True}),
    "linear": ("qwen3_next", "quant:4,group=8", {}),
    "bfloat16": ("llama", "quant:4,group=8+evict:0.5", {"dtype": torch.bfloat16}),
}
if plugin("xkv"):
    STACKS["xkv"] = ("llama", "xkv:8/8,layers=2+quant:4,group=8", {"tokens": 120})
    STACKS["xkv-rough"] = ("llama", "xkv:8/8,layers=2,exact=4", {"tokens": 120})
if plugin("kvtc"):
    STACKS["kvtc"] = ("llama", "kvtc:4+evict:0.5", {})
if plugin("minicache"):
    STACKS["minicache"] = ("llama", "minicache+quant:4,group=8", {"tokens": 300, "padded": True})
if plugin("kvsharer"):
    STACKS["kvsharer"] = ("llama", "kvsharer:0.25+quant:4,group=8", {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Description and tensors of the file of each stack."""
    made = {}

    def make(name):
        if name not in made:
            architecture, spec, how = STACKS[name]
            model = tiny.model(architecture, dtype=how.get("dtype", torch.float32))
            stack = KVStack.from_spec(spec, model=model) if not spec else KVStack.from_spec(f"{spec}{AT}", model=model)
            tokens = how.get("tokens", 90)
            ids, mask = tiny.left_padded([tokens - 29, tokens]) if how.get("padded") else (tiny.tokens(2, tokens), None)
            with torch.no_grad():
                model(ids, attention_mask=mask, past_key_values=stack)
                model(ids[:, :1], attention_mask=tiny.mask_for(stack, 1), past_key_values=stack)
            path = tmp_path_factory.mktemp("saved") / name
            stack.save(path, compress=how.get("compress", False))
            metadata, tensors = read_tensors(path, UseError, "cache", "")
            made[name] = model, json.loads(metadata["cache"]), tensors
        return made[name]

    return make


AT = "@sinks=2,window=8,block=8"


def checked(error):
    """An error names the file, and comes from a check: nothing is left to what torch may say."""
    assert "'the file'" in str(error)
    assert len(str(error)) < 1500
    assert error.__cause__ is None or isinstance(error.__cause__, KVStackError), repr(error)
    return error


def attempt(model, described, tensors, monkeypatch):
    """Load it, and go on: the stack, or the error that refused it."""
    metadata = {"format": disk.FORMAT, "cache": json.dumps(described)}
    monkeypatch.setattr(disk, "read_tensors", lambda *args: (metadata, dict(tensors)))
    try:
        stack = KVStack.load("the file", model=model)
    except UseError as error:
        return checked(error)
    rows = max(1, stack.batch_size)
    for new in (1, 1, 24, 1):
        mask = tiny.mask_for(stack, new)
        logits = model(tiny.tokens(rows, new, seed=new), attention_mask=mask, past_key_values=stack).logits
        assert bool(torch.isfinite(logits).all())
    if len(stack.compressed_layers) == len(stack.layers):  # layers with a window cannot be cropped once it is full
        stack.crop(-3)
    for layer in stack.compressed_layers:
        stack.read(layer)
    return stack


@pytest.mark.parametrize("name", STACKS)
def test_any_change_is_refused_or_fits(name, saved, monkeypatch):
    model, described, tensors = saved(name)
    assert isinstance(attempt(model, described, tensors, monkeypatch), KVStack)
    chance = random.Random(name)
    refused, faults = 0, []
    for _ in range(COUNT):
        what, file = mutated((described, tensors), chance)
        try:
            refused += isinstance(attempt(model, *file, monkeypatch), UseError)
        except Exception as error:
            faults.append(f"{what}: {error!r}"[:700])
    assert not faults, "\n".join([f"{len(faults)} of {COUNT}", *faults[:30]])
    assert refused > COUNT / 2
