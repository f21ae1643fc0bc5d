"""What is fitted to a model is kept where it can be, and made for the process alone elsewhere."""

import logging

import pytest
from filelock import FileLock

from kvstack import CommonKV, KVStack
from kvstack.calibration import keep
from kvstack.models import cache_dir
from kvstack.testing import tiny_model


@pytest.mark.parametrize("place", ["n" * 300, "~nosuchuser/x", "file/x"])
def test_a_folder_that_cannot_be_looked_at(place, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    where = place if place.startswith("~") else str(tmp_path / place)
    monkeypatch.setattr(keep, "folder", lambda: cache_dir() / "calibrations")
    monkeypatch.setenv("KVSTACK_CACHE", where)
    model = tiny_model()
    with caplog.at_level(logging.WARNING, "kvstack"):
        KVStack([CommonKV()], model=model)
    assert "cannot be kept, and is made for this process alone" in caplog.text


def test_an_error_of_the_maker_is_not_taken_for_one_of_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(keep, "folder", lambda: tmp_path)

    def fails():
        raise FileNotFoundError("a text")

    model = tiny_model()
    with pytest.raises(FileNotFoundError, match="a text"):
        keep.load_or_make(model, "x.bin", lambda path: None, fails, "made")
    FileLock(tmp_path / "x.lock").acquire(timeout=1)
