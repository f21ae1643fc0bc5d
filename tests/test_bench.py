"""The benchmarks run on a tiny random model. What they measure of time is never asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from kvstack.bench import common, texts
from kvstack.bench.cli import bench_app
from kvstack.bench.common import Run, opened, rotated, variants
from kvstack.errors import KVStackError, SpecError


@pytest.fixture
def bench(tmp_path: Path):
    def run(command: str, *options: str, stacks: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
        """The JSON lines of one benchmark, by variant."""
        out = tmp_path / "figures.jsonl"
        # one thread: two that wait for each other on a busy machine cost more than the arithmetic
        settings = ["--tiny", "--threads", "1", "--json", str(out), *(f"--stack={spec}" for spec in stacks)]
        done = CliRunner().invoke(bench_app, [command, *settings, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert {row["bench"] for row in rows} == {command}
        return {row["variant"]: row for row in rows if row.get("domain", "all") == "all"}

    return run


def test_decode_counts_bytes_of_every_cache(bench):
    rows = bench("decode", "--steps", "8", "--burst", "4", stacks=("empty", "evict:0.2", "quant:2"))
    assert list(rows) == ["dense", "empty", "evict:0.2", "quant:2"]
    assert all(row["steps"] == 8 and len(row["bursts_ms"]) == 2 for row in rows.values())
    # 2 layers x keys and values x 2 heads x 32 channels x 4 bytes, for the context, the warm-up burst and the steps
    assert rows["dense"]["nbytes"] == 2 * 2 * 2 * 32 * 4 * (512 + 4 + 8)
    assert rows["evict:0.2"]["nbytes"] < rows["dense"]["nbytes"] / 2
    assert rows["quant:2"]["nbytes"] < rows["dense"]["nbytes"] / 2


def test_quality_of_exact_caches_is_exact(bench):
    rows = bench("quality", "--windows", "1", "--score", "16", stacks=("empty",))
    for label in ("dense", "empty"):
        assert rows[label]["kl"] == rows[label]["kl_q99"] == 0
        assert rows[label]["top1"] == 1
    assert rows["empty"]["nll"] == rows["dense"]["nll"]


def test_quality_falls_with_the_bits_and_with_the_tokens(bench):
    stacks = ("quant:8", "quant:4", "quant:2", "evict:0.2")
    rows = bench("quality", "--windows", "2", "--score", "32", stacks=stacks)
    assert 0 < rows["quant:8"]["kl"] < rows["quant:4"]["kl"] < rows["quant:2"]["kl"]
    assert rows["evict:0.2"]["kl"] > rows["quant:8"]["kl"]
    assert 1 > rows["quant:8"]["share"] > rows["quant:4"]["share"] > rows["quant:2"]["share"]
    assert all(row["scored"] == 64 for row in rows.values())


def test_quality_beside_transformers_quantized_cache(bench):
    pytest.importorskip("hqq")
    rows = bench("quality", "--windows", "1", "--score", "16", stacks=("hqq:4", "hqq:2", "hqq:2,group=16"))
    assert 0 < rows["hqq:4"]["kl"] < rows["hqq:2"]["kl"]
    # 4 bits a number, and a scale and a zero for every 64 of them, which are floats of the model and count 16 bits
    assert rows["hqq:4"]["share"] == pytest.approx((4 + 32 / 64) / 16)
    assert rows["hqq:2,group=16"]["share"] == pytest.approx((2 + 32 / 16) / 16)


def test_memory_by_stage(bench):
    rows = bench("memory", "--no-peak", "--decode", "40", stacks=("empty", "quant:4", "quant:2", "quant:2+evict:0.2"))
    assert rows["dense"]["nbytes_prefill"] == 2 * 2 * 2 * 32 * 2 * 512  # bfloat16
    assert rows["dense"]["report"] is None
    assert rows["empty"]["share_prefill"] == pytest.approx(1, rel=0.05)
    assert rows["quant:4"]["share"] > rows["quant:2"]["share"] > rows["quant:2+evict:0.2"]["share"]
    report = rows["quant:2+evict:0.2"]["report"]
    assert report["nbytes"] == rows["quant:2+evict:0.2"]["nbytes"]
    assert report["dense_nbytes"] == rows["dense"]["nbytes"]
    assert {"Quant(bits=2)", "Evict(keep=0.2)", "stack"} == {part["payer"] for part in report["parts"]}


def test_memory_peak_comes_from_a_process_of_its_own(bench):
    rows = bench("memory", "--decode", "1", stacks=("dense",))
    assert rows["dense"]["peak_prefill"] is None or rows["dense"]["peak_prefill"] >= 0


def test_prefill_takes_turns(bench):
    rows = bench("prefill", "--rounds", "2", stacks=("quant:4",))
    assert list(rows) == ["dense", "quant:4"]
    assert rows["dense"]["cost"] == 0
    assert all(len(row["rounds_s"]) == 2 for row in rows.values())


def test_needles_are_asked_of_every_cache(bench):
    rows = bench("needles", "--samples", "2", "--keys", "3", stacks=("evict:0.2",))
    assert [row["found"] for row in rows.values()] == [0, 0]  # a random model knows nothing
    assert rows["dense"]["share"] == 1
    assert rows["evict:0.2"]["share"] < 0.5


def test_a_needle_stands_in_its_sample():
    from kvstack.bench.needles import _sample

    class Letters:
        def __call__(self, text, **kwargs):
            return {"input_ids": torch.tensor([list(text.encode()[:9000])])}

    class Subject(common.Subject):
        def encode(self, text, length):
            return torch.tensor([list(text.encode()[:length])])

    sample = _sample(Subject("letters", None, Letters()), 3000, 4, seed=1)
    text = bytes(torch.cat([sample.text, sample.question], dim=1)[0].tolist()).decode()
    asked = text.rsplit("number of the ", 1)[1].split()[0]
    assert sample.text.shape[1] + sample.question.shape[1] == 3000
    assert text.count("The special number of the") == 5
    assert f"The special number of the {asked} is {sample.answers[0]}.\n" in text


def test_needles_of_a_text_compressed_before_the_question(bench):
    rows = bench("needles", "--samples", "1", "--blind", stacks=("commonkv:0.5,layers=2+quant:2",))
    row = rows["commonkv:0.5,layers=2+quant:2"]
    assert row["blind"] is True
    assert row["share"] < rows["dense"]["share"] == pytest.approx(1.0)


def test_ruler_files_are_read(tmp_path):
    from kvstack.bench.needles import _read
    from kvstack.errors import KVStackError

    class Letters:
        def __call__(self, text, **kwargs):
            return {"input_ids": torch.tensor([list(text.encode())])}

    subject = common.Subject("letters", None, Letters())
    path = tmp_path / "task.jsonl"
    line = '{"input": "Hay.\\nWhat else? Hay.\\nWhat is it? It is", "outputs": ["7", "8"]}'
    path.write_text(line + "\n" + line)
    (sample,) = _read(subject, path, 1)
    assert bytes(sample.text[0].tolist()) == b"Hay.\nWhat else? Hay."
    assert bytes(sample.question[0].tolist()) == b"\nWhat is it? It is"
    assert sample.answers == ("7", "8")
    with pytest.raises(KVStackError, match="is no file"):
        _read(subject, tmp_path / "none.jsonl", 1)


def test_bytes_as_a_share_of_bfloat16():
    """Raw numbers of a float32 model count two bytes each, codes and positions what they are."""
    from kvstack import Evict, KVStack, Quant
    from kvstack.testing import tiny_model

    model = tiny_model()
    ids = torch.randint(3, 97, (1, 2 + 8 + 64), generator=torch.Generator().manual_seed(0))
    caches = [DynamicCache(), *(KVStack(s, model=model, sinks=2, window=8) for s in ([], [Quant(4)], [Evict(32)]))]
    shares = []
    for cache in caches:
        model(ids, past_key_values=cache)
        shares.append(common.share_of_bfloat16(cache, model))
    codes, raw = 64 * (4 + 32 / 32 / 2 + 32 / 16 / 2) / 16, 10
    assert shares[:2] == [1.0, 1.0]
    assert shares[2] == pytest.approx((raw + codes) / 74)
    held = caches[3].held
    assert held <= 32 + 10
    # positions: four bytes for each token that was chosen, once for all four layers; a token has 256 numbers
    assert shares[3] == pytest.approx((held + (held - 10) * 4 / (256 * 2)) / 74)


def test_likeness_of_layers(bench):
    rows = bench("layers", "--layers", "2")
    assert set(rows) == {"keys", "values", "hidden states", "latents of the weights"}
    assert all(-1 <= row["ends"] <= 1 for row in rows.values())
    assert rows["keys"]["ends"] == pytest.approx(rows["keys"]["pairs"]), "two layers are one pair"


def test_figures_say_where_they_come_from(bench):
    row = bench("prefill", "--rounds", "1", "--seed", "3", "--contexts", "64", stacks=("empty",))["dense"]
    assert row["context"] == 64
    assert (row["model"], row["dtype"], row["threads"], row["seed"]) == ("tiny random llama", "float32", 1, 3)
    assert all(row[name] for name in ("hardware", "torch", "transformers", "kvstack"))


def test_a_table_is_printed():
    options = ["prefill", "--tiny", "--threads", "1", "--rounds", "1", "--contexts", "64", "--stack", "empty"]
    done = CliRunner().invoke(bench_app, options, catch_exceptions=False)
    assert "prefill of 64 tokens: tiny random llama" in done.output
    assert "dense" in done.output


@pytest.mark.parametrize("spec", ["hqq:3", "hqq:5", "nothing:4", "quant:4@fused", "quant:4@speed=3"])
def test_a_cache_that_does_not_exist_is_refused(spec):
    with pytest.raises(SpecError, match=spec.split(":")[0]):
        variants([spec])
    done = CliRunner().invoke(bench_app, ["decode", "--tiny", "--stack", spec])
    assert done.exit_code == 2
    assert "Invalid value for '--stack'" in done.output


def test_contexts_are_numbers():
    done = CliRunner().invoke(bench_app, ["decode", "--tiny", "--contexts", "4k"])
    assert done.exit_code == 2
    assert "2048,4096" in done.output


def test_a_missing_package_is_said_and_passed_over(monkeypatch, capsys):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    found = common.chosen(Run((), ("empty", "hqq:4")))
    assert [variant.label for variant in found] == ["dense", "empty"]
    assert capsys.readouterr().out == "hqq:4: skipped, the package hqq is not installed.\n"


def test_settings_reach_the_stack():
    with opened(Run((), (), tiny=True)) as subject:
        cache = variants(["quant:4@fused=False,window=32"])[1].make(subject.model)
    assert repr(cache) == "KVStack([Quant(bits=4)], window=32, fused=False)"


def test_every_cache_goes_first_once():
    assert [rotated("abc", i) for i in range(4)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_texts_of_python_are_long_enough_for_the_windows():
    for text in texts.domains(None).values():
        assert len(text) > 8 * 8192


def test_windows_are_spread_and_repeatable():
    text = "".join(f"line {i}\n" for i in range(1000))
    found = texts.windows(text, 4, 500, seed=1)
    assert found == texts.windows(text, 4, 500, seed=1) != texts.windows(text, 4, 500, seed=2)
    assert all(piece.startswith("line ") and len(piece) > 400 for piece in found)
    assert [len(piece) for piece in found] == sorted(map(len, found), reverse=True)


def test_a_folder_takes_the_place_of_the_docstrings(tmp_path):
    with pytest.raises(KVStackError, match=r"holds no \.txt files"):
        texts.domains(tmp_path)
    (tmp_path / "a.txt").write_text("essay")
    assert texts.domains(tmp_path)["texts"] == "essay"
