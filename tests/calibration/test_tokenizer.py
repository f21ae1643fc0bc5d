"""Scores and budgets take no calibration as a setting: what their warning says can be done, and helps."""

import logging

import pytest

from kvstack import Evict, KVStack
from kvstack.calibration import keep
from kvstack.calibration.windows import OWN_TEXT
from kvstack.testing import tiny_model


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(code): number for number, code in enumerate(range(32, 127))} | {"?": 95}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.mark.parametrize("settings", [{"score": "kvzap"}, {"score": "triattention"}, {"budgets": "heads"}], ids=str)
@pytest.mark.parametrize("restart", [False, True])
def test_the_warning_of_a_score_says_what_helps(settings, restart, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(keep, "folder", lambda: tmp_path / "cache")
    model = tiny_model(num_hidden_layers=2)
    with caplog.at_level(logging.WARNING, "kvstack"):
        KVStack([Evict(0.5, **settings)], model=model)
    (warning,) = caplog.messages
    assert "calibration=" not in warning
    assert "tokenizer.save_pretrained(folder); model.name_or_path = folder" in warning
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    assert OWN_TEXT.encode() in kept.read_bytes()
    # as the warning says
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = tiny_model(num_hidden_layers=2) if restart else model
    model.name_or_path = str(tmp_path / "tokenizer")
    KVStack([Evict(0.5, **settings)], model=model)
    assert OWN_TEXT.encode() not in kept.read_bytes()
