"""Perplexity of long texts: the parts of one text, each predicted from what a cache holds."""

import math

import pytest
import torch

from kvstack.bench.measure import beyond, subject, variants
from kvstack.bench.measure.run import Run
from tests.bench.commands import invoke

PLACES = "evict:64,score=streaming,positions=cache@window=16"


def test_every_part_is_scored_once(bench):
    rows = bench("beyond", "--contexts", "100,230", "--feed", "32", stacks=(PLACES,))
    assert [(row["cache"], row["context"], row["scored"]) for row in rows] == [
        ("dense", 100, 100), ("dense", 230, 130), (PLACES, 100, 100), (PLACES, 230, 130),
    ]  # fmt: skip
    assert [row["held"] for row in rows][:2] == [100, 230]
    assert rows[3]["held"] <= 4 + 64 + 16
    assert all(row["perplexity"] == pytest.approx(math.exp(row["nll"])) for row in rows)


def test_the_dense_figures_are_those_of_one_forward():
    run = Run((60, 150), (), tiny=True, threads=1)
    with subject.opened(run) as opened:
        ids, (dense,) = opened.tokens(151), variants.parse(())
        found = list(beyond.measure(opened.model, ids, dense, run.contexts, 32))
        logits = opened.model(ids[:, :-1]).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    for figures, part in zip(found, losses.split([60, 90]), strict=True):
        assert figures["nll"] == pytest.approx(float(part.mean()), rel=1e-4)


def test_the_table_names_the_parts():
    told = invoke("beyond", "--contexts", "100,200", "--stack", PLACES)
    assert all(words in told for words in ("0 - 100", "100 - 200", "perplexity", "256 tokens fed at once"))
