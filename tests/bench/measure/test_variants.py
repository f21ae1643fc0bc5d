"""The specs of caches, and what is said of those that cannot be measured."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kvstack.bench import results
from kvstack.bench.measure import variants
from kvstack.bench.measure.run import Run
from kvstack.bench.measure.subject import opened
from kvstack.cli.bench import bench_app
from kvstack.errors import SpecError
from tests.bench.commands import by_cache, invoke


@pytest.mark.parametrize("command", ["decode", "memory", "needles"])
def test_no_context_is_no_cache(command, tmp_path):
    own = {"decode": ("--steps", "4", "--rounds", "1"), "memory": ("--no-peak",), "needles": ("--samples", "1")}
    out = invoke(command, "--out", tmp_path, *own[command], "--stack", "nothing,empty")
    rows, _ = results.load(tmp_path, command)
    assert set(by_cache(rows)) == {"dense", "empty"}
    assert command == "needles" or "nothing: skipped, this process has no cache to measure." in out


def test_turns_are_not_asked_of_kvpress(capsys):
    left = variants.without_presses(variants.parse(["kvpress:snapkv,keep=0.5", "empty"]), "it cannot.")
    assert [cache.label for cache in left] == ["dense", "empty"]
    assert capsys.readouterr().out == "kvpress:snapkv,keep=0.5: skipped, it cannot.\n"


@pytest.mark.parametrize("spec", ["hqq:3", "hqq:5", "nothing:4", "quant:4@fused", "quant:4@speed=3"])
def test_a_cache_that_does_not_exist_is_refused(spec):
    with pytest.raises(SpecError, match=spec.split(":")[0]):
        variants.parse([spec])
    done = CliRunner().invoke(bench_app, ["decode", "--tiny", "--stack", spec])
    assert done.exit_code == 2
    assert "Invalid value" in done.output


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("quant:2,group=64,evict:0.2", ["quant:2,group=64", "evict:0.2"]),
        ("quant:2,64,hqq:2,group=16 empty", ["quant:2,64", "hqq:2,group=16", "empty"]),
        ("evict:0.2,score=snapkv(window=16,kernel=3),quant:4@fused=False,window=16", None),
        ("commonkv,quant:4+evict:0.5,dense", ["commonkv", "quant:4+evict:0.5", "dense"]),
        ("kvpress:snapkv,keep=0.2; nothing", ["kvpress:snapkv,keep=0.2", "nothing"]),
    ],
)
def test_lists_of_specs(text, specs):
    wanted = specs or ["evict:0.2,score=snapkv(window=16,kernel=3)", "quant:4@fused=False,window=16"]
    assert variants.split(text) == wanted


def test_what_cannot_run_here_is_said_and_passed_over(monkeypatch, capsys):
    caches = variants.parse(["empty", "hqq:4"])
    monkeypatch.setattr(type(caches[2].peer), "missing", lambda self: "not installed.")
    assert [cache.label for cache in variants.available(caches)] == ["dense", "empty"]
    assert capsys.readouterr().out == "hqq:4: skipped, not installed.\n"


def test_a_stack_that_cannot_be_bound_is_said_and_passed_over(bench, tmp_path):
    out = invoke("quality", "--out", tmp_path, "--score", "16", "--stack", "commonkv:layers=5", "--stack", "quant:4")
    assert "commonkv:layers=5: skipped, CommonKV(layers=5) stores 5 layers" in out
    rows, _ = results.load(tmp_path, "quality")
    assert set(by_cache(rows)) == {"dense", "quant:4"}


def test_settings_reach_the_stack():
    with opened(Run((), (), tiny=True)) as tiny:
        cache = variants.parse(["quant:4@fused=False,window=32"])[1].cache(tiny.model)
    assert repr(cache) == "KVStack([Quant(bits=4)], window=32, fused=False)"
