"""Questions about long texts, asked of a tiny random model that knows nothing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvstack.bench import results
from kvstack.bench.measure import needles, variants
from kvstack.bench.measure.run import Run
from kvstack.bench.measure.subject import opened
from kvstack.bench.tasks import Question, Sample
from kvstack.cli.bench import bench_app
from kvstack.errors import KVStackError
from tests.bench.commands import by_cache, invoke


def test_needles_are_asked_of_every_cache(bench):
    rows = bench("needles", "--samples", "2", "--task", "niah_single_1", "--mode", "aware", stacks=("evict:0.2",))
    assert [row["cache"] for row in rows] == ["dense", "dense", "evict:0.2", "evict:0.2"]
    assert all(row["score"] == 0 for row in rows)  # a random model knows nothing
    assert rows[0]["share"] == 1
    assert rows[2]["share"] < 0.5
    assert rows[0]["depth"] != rows[1]["depth"]


@pytest.mark.parametrize("mode", ["agnostic", "turns"])
def test_several_questions_of_one_compressed_text(bench, mode):
    options = ("--samples", "1", "--questions", "2", "--task", "niah_multikey_1", "--mode", mode)
    rows = bench("needles", *options, stacks=("commonkv:0.5,layers=2+quant:2",))
    assert all(len(row["answers"]) == len(row["scores"]) == 2 for row in rows)
    assert by_cache(rows)["commonkv:0.5,layers=2+quant:2"]["share"] < by_cache(rows)["dense"]["share"] == 1


def test_a_question_is_asked_of_a_copy_and_in_turns_of_the_cache_itself():
    """In turns the second question comes behind the first one and its answer; otherwise right behind the text."""
    questions = tuple(Question(f"\nWhat is {name}?", ("7",), 4, "share") for name in "abc")
    sample = Sample("niah", "x" * 200, questions, None, 0, 0)
    lengths = {}
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        for mode in ("agnostic", "turns"):
            seen: list[int] = []

            def count(cache, model, seen=seen):
                seen.append(cache.get_seq_length())
                return 1.0

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(needles.sizes, "share_of_bfloat16", count)
                needles.ask(tiny, variants.parse([])[0], sample, mode, 4)
            lengths[mode] = seen
    once = lengths["agnostic"][0]
    assert lengths["agnostic"] == [once] * 3
    assert once == 200 + len("\nWhat is a?") + 3  # the last new token is not fed
    assert lengths["turns"] == [once, 2 * once - 200 + 1, 3 * once - 400 + 2]


def test_files_of_tasks(tmp_path):
    """RULER's files for a context, and LongBench's, whose texts lose their middle."""
    (tmp_path / "512").mkdir()
    line = {"input": "Hay. " * 20 + "\nWhat is it? It is", "outputs": ["7"]}
    (tmp_path / "512" / "niah_single_1.jsonl").write_text(json.dumps(line))
    task = ("--task", "niah_single_1", "--mode", "aware", "--stack", "empty", "--out", tmp_path)
    invoke("needles", "--tasks", tmp_path, *task)
    long = {"input": "What?", "context": "a" * 400 + "b" * 4000, "answers": ["b"], "all_classes": None}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(long))
    invoke("needles", "--longbench", tmp_path, "--task", "hotpotqa", *task[2:])
    rows = [{**record["key"], **record["figures"]} for record in results.read(tmp_path / "needles.jsonl")]
    assert [row["task"] for row in rows] == ["niah_single_1"] * 2 + ["hotpotqa"] * 2
    done = CliRunner().invoke(bench_app, ["needles", "--tiny", "--longbench", str(tmp_path)])
    assert "--longbench needs the names" in done.output


def test_a_text_too_long_loses_its_middle():
    sample = Sample("qa", "a" * 300 + "b" * 300, (Question("\nWhat?", ("a",), 34, "f1"),), None, 0, None)
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        short = needles.shortened(tiny, sample, 100)
        assert short.text == "a" * 30 + "b" * 30
        assert needles.shortened(tiny, sample, 1000) == sample
        with pytest.raises(KVStackError, match="question and answer take 40 of 41 tokens"):
            needles.shortened(tiny, sample, 41)


def test_all_tasks_and_unknown_ones():
    done = CliRunner().invoke(bench_app, ["needles", "--tiny", "--task", "niah"])
    assert "'niah' is not a task. Use one of niah_single_1" in " ".join(done.output.replace("│", " ").split())
