"""A calibration file of which anything was changed, with a valid checksum, is refused or fits.

In the cache folder it is made again.
"""

import json
import logging
import os
import random

import pytest
import torch

from kvstack import Calibration, CalibrationError, CommonKV, KVStack, Quant, calibrate
from kvstack.calibration import calibrate as calibrating
from kvstack.calibration import calibration as reading
from kvstack.calibration import keep
from kvstack.files import read_tensors, write_tensors
from tests import tiny
from tests.mutations import mutated

COUNT = 10 * int(os.environ.get("KVSTACK_FUZZ", "4"))


@pytest.fixture(scope="module")
def made():
    with torch.no_grad():
        model, every = tiny.model("llama"), {"tokens": 400, "layers": 2, "keep_axes": 1.0}
        return {
            "fisher": calibrate(model, **every),
            "variance": calibrate(model, tokens=400, layers=2, metric="variance"),
            "fisher by heads": calibrate(model, block=64, **every),
        }


KINDS = ("fisher", "variance", "fisher by heads")


@pytest.mark.parametrize("kind", KINDS)
def test_any_change_is_refused_or_fits(kind, made, tmp_path, monkeypatch):
    model, path, metric = tiny.model("llama"), tmp_path / "axes", kind.split()[0]
    made[kind].save(path)
    metadata, tensors = read_tensors(path, CalibrationError, "calibration", "")
    described = {**metadata, "groups": json.loads(metadata["groups"])}
    chance, refused = random.Random(kind), 0
    for _ in range(COUNT):
        what, (changed, held) = mutated((described, tensors), chance)
        groups = json.dumps(changed.pop("groups", None))
        file = {name: value for name, value in changed.items() if isinstance(value, str)} | {"groups": groups}
        monkeypatch.setattr(reading, "read_tensors", lambda *args, file=file, held=held: (dict(file), dict(held)))
        try:
            calibration = Calibration.load(path)
            calibration.check(model, metric, 2)
            if metric == "fisher" and calibration.covers([[0, 1], [2, 3]]):
                stack = KVStack([CommonKV(0.5, layers=2, calibration=calibration), Quant(4)], model=model, window=16)
                model(tiny.tokens(1, 90), past_key_values=stack)
                logits = model(tiny.tokens(1, 1), past_key_values=stack).logits
                assert bool(torch.isfinite(logits).all()), what
        except CalibrationError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    assert refused > COUNT / 4  # words about how it was made may change


def damage(path, kind):
    metadata, tensors = read_tensors(path, CalibrationError, "calibration", "")
    groups = json.loads(metadata["groups"])
    if kind == "folder":
        path.unlink()
        path.mkdir()
        return
    if kind == "empty":
        path.write_bytes(b"")
        return
    if kind == "another shape":
        groups[0]["shapes"] = [[4, 8, 8] for _ in groups[0]["shapes"]]
    elif kind == "other layers":
        groups[0]["layers"] = [7, 8]
    elif kind == "no groups":
        groups = []
    elif kind == "NaN":
        tensors["0.scale"] = tensors["0.scale"] * float("nan")
    elif kind == "cut":
        tensors["0.mean"] = tensors["0.mean"][:-1].clone()
    elif kind == "no axes":
        del tensors["0.axes"]
    write_tensors(path, tensors, {**metadata, "groups": json.dumps(groups)})


@pytest.mark.parametrize(
    "kind", ["folder", "empty", "another shape", "other layers", "no groups", "NaN", "cut", "no axes"]
)
def test_any_damage_is_made_again(kind, made, monkeypatch, tmp_path, caplog):
    model = tiny.model("llama")
    monkeypatch.setattr(keep, "folder", lambda: tmp_path)
    monkeypatch.setattr(calibrating, "calibrate", lambda *args, **settings: made["fisher"])
    path = calibrating.default_path(model, 2)
    made["fisher"].save(path)
    damage(path, kind)
    keep.forget(model)
    with caplog.at_level(logging.WARNING, "kvstack"):
        stack = KVStack([CommonKV(0.5, layers=2)], model=model)
    keep.forget(model)
    assert "It is made again" in caplog.text
    model(tiny.tokens(1, 90), past_key_values=stack)
    if kind == "folder":
        assert "cannot be kept" in caplog.text
    else:
        Calibration.load(path).check(model)


def test_a_given_file_that_is_damaged_is_refused(made, tmp_path):
    path = tmp_path / "axes"
    made["fisher"].save(path)
    damage(path, "NaN")
    with pytest.raises(CalibrationError, match=r"is damaged: scales of layers \[0, 1\] hold NaN.* Make it again: "):
        KVStack([CommonKV(layers=2, calibration=str(path))], model=tiny.model("llama"))
