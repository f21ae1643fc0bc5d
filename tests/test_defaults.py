"""Every stage binds as it stands, on any number of layers, and so does every spec that the documentation shows."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

from kvstack import KVStack, KVStackWarning, registry
from kvstack.calibration import windows
from kvstack.cli.commands import EXAMPLE
from kvstack.testing import tiny_model

ROOT = Path(__file__).parent.parent
WRITTEN = {"evict": "evict:0.2", "quant": "quant:4", "tiers": "commonkv+quant:2+tiers"}
"""How to write stages that have no default for what they need most, or need others."""
NOT_HERE = ("vnorm", "kvpress", "out/", "'FILE'")
"""What a page writes or asks to be installed first: a score of its own, another package, a file."""

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}


def specs_shown():
    """Specs between backticks or quotes in the documentation; lists of specs for `kvstack bench` are none."""
    names = "|".join(registry.stage_names())
    stage = rf"(?:{names})(?::[^`\"\s+@{{;]+)?"
    shown = re.compile(rf"[`\"]({stage}(?:\+{stage})*(?:@[\w=,]+)?)[`\"]")
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")]
    found = {spec for page in pages for spec in shown.findall(page.read_text(encoding="utf-8"))}
    lists = re.compile(rf",(?:{names})\b")
    single = (spec for spec in found if re.search(r"[:+]", spec) and not lists.search(spec))
    return sorted(spec for spec in single if not any(word in spec for word in NOT_HERE))


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch):
    """A calibration of one short text is as good as any here, where only its shape counts."""
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(windows, "written_by", lambda model, tokens: [(ids, 30)])
    if importlib.util.find_spec("kvstack_kvsharer"):
        monkeypatch.setattr("kvstack_kvsharer.strategy._last_hidden", lambda *args: [torch.ones(1, 4)])  # all alike
    monkeypatch.setattr("kvstack.calibration.calibrate.check_tokens", lambda *args: None)


def model_of(layers):
    # so small that layers hardly change what they read: any two of them may share
    return tiny_model(**SMALL, num_hidden_layers=layers, initializer_range=0.02)


def bind(spec, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KVStackWarning)
        return KVStack.from_spec(spec, model=model).binding


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6, 7, 12, 30])
def test_every_stage_binds_as_it_stands(layers):
    model = model_of(layers)
    for name in registry.stage_names():
        binding = bind(WRITTEN.get(name, name), model)
        held = sorted(layer for group in binding.groups for layer in group)
        assert held + sorted(binding.shares) == list(range(layers)) or binding.shares, name


def test_every_spec_of_the_documentation_binds():
    model = model_of(30)
    specs = specs_shown()
    assert len(specs) > 40
    for spec in [EXAMPLE, *specs]:
        assert bind(spec, model).groups, spec
