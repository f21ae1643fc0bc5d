"""How alike the layers of a group are."""

from __future__ import annotations

import pytest


def test_likeness_of_layers(bench):
    rows = {row["variant"]: row for row in bench("layers", "--layers", "2")}
    assert set(rows) == {"keys", "values", "hidden states", "latents of the weights"}
    assert all(-1 <= row["ends"] <= 1 for row in rows.values())
    assert rows["keys"]["ends"] == pytest.approx(rows["keys"]["pairs"]), "two layers are one pair"
