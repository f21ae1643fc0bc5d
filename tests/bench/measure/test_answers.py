"""Questions in kvpress' columns, asked of a tiny random model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import DynamicCache
from typer.testing import CliRunner

from kvstack.bench.measure import answers, variants
from kvstack.bench.measure.run import Run
from kvstack.bench.measure.subject import Letters, opened
from kvstack.cli.bench import bench_app
from tests.bench.commands import invoke

ROWS = [
    {
        "context": f"The number of {name} is {n}. " * 20,
        "question": f"What is the number of {other}?",
        "answer_prefix": " It is",
        "answer": [str(n), name],
        "max_new_tokens": 5,
        "task": task,
        "extra": {"n": n},
    }
    for n, (name, other, task) in enumerate(
        [("cats", "cats", "niah_single_1"), ("cats", "dogs", "qa_1"), ("mice", "mice", "niah_single_1")]
    )
]
ROWS[1]["context"] = ROWS[0]["context"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_answers_of_every_cache_and_the_files_of_kvpress(file, tmp_path):
    results = tmp_path / "results"
    options = ("--dataset", "ruler", "--data-dir", "512", "--results", results, "--stacks", "empty,quant:2@window=16")
    out = invoke("answers", file, *options)
    folders = sorted(results.iterdir())
    names = [folder.name for folder in folders]
    # a stack without stages holds a reserve for the next tokens, which is counted
    assert names[0].startswith("ruler__512__tiny random llama__empty__-0.1")
    assert names[1] == "ruler__512__tiny random llama__no_press__0.00"
    assert names[2].startswith("ruler__512__tiny random llama__quant_2@window=16__0.")
    assert all(str(folder) in out.replace("\n", "") for folder in folders)
    tables = []
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.json", "predictions.csv"]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["dataset"], config["data_dir"], config["fraction"]) == ("ruler", "512", 1.0)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert list(metrics) == ["niah_single_1", "qa_1"]
        assert all(0 <= task["string_match"] <= 100 for task in metrics.values())
        with (folder / "predictions.csv").open(newline="") as lines:
            tables.append(list(csv.DictReader(lines)))
        assert [row["question"] for row in tables[-1]] == [row["question"] for row in ROWS]
        assert "context" not in tables[-1][0]
        ratios = [float(row["compression_ratio"]) for row in tables[-1]]
        assert config["compression_ratio"] == pytest.approx(sum(ratios) / 3, abs=1e-4)
    empty, dense, quant = tables
    assert [row["predicted_answer"] for row in empty] == [row["predicted_answer"] for row in dense]
    assert all(float(row["compression_ratio"]) > 0.4 for row in quant)
    assert yaml.safe_load((folders[2] / "config.yaml").read_text())["press_init_command"] == (
        "KVStack([Quant(bits=2)], window=16)"
    )
    # once more: nothing is overwritten
    invoke("answers", file, *options)
    assert sorted(path.name for path in folders[0].iterdir()) == ["1", "config.yaml", "metrics.json", "predictions.csv"]


def test_figures_are_kept(file, tmp_path):
    for _ in range(2):
        invoke("answers", file, "--samples", "2", "--stack", "quant:4", "--out", tmp_path)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2 * 2
    invoke("answers", file, "--samples", "2", "--stack", "quant:4", "--out", tmp_path, "--query-aware")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4 * 2


@pytest.mark.parametrize("aware", [False, True])
def test_answers_are_those_of_kvpress_pipeline(file, aware):
    """By plain loops: context, then question, suffix and prefix, then greedy tokens one by one."""
    asking = answers.Asking(file, aware=aware)
    figures, rows, whole = answers.run(Run((), ("empty",), tiny=True, threads=1), asking)
    assert whole == len(rows) == 3
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        for number, row in enumerate(ROWS):
            cache, told = DynamicCache(config=tiny.model.config), []
            context = row["context"] + (row["question"] if aware else "")
            tiny.model(tiny.ids(context), past_key_values=cache)
            ids = tiny.ids(("" if aware else row["question"]) + "\n" + row["answer_prefix"])
            for _ in range(row["max_new_tokens"]):
                ids = tiny.model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                told.append(int(ids))
            found = [one for one in figures.rows if one["sample"] == number]
            assert [one["answer"] for one in found] == [tiny.tokenizer.decode(torch.tensor(told))] * 2


def test_a_chat_template_parts_the_turn():
    class Chat(Letters):
        chat_template = "yes"

        def apply_chat_template(self, turns, tokenize, add_generation_prompt, enable_thinking):
            assert not tokenize
            assert not enable_thinking
            return f"<user>{turns[0]['content']}<end>" + "<model>" * add_generation_prompt

    assert answers._turn(Chat(), "a # text") == ("<user>a # text", "<end><model>")
    assert answers._turn(Letters(), "a # text") == ("a # text", "\n")


def test_several_questions_of_one_context_do_not_see_each_other(file):
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        cache = variants.parse(["quant:2@window=0"])[1]
        context, first, second = (tiny.ids(text) for text in (ROWS[0]["context"], "\nWhat?", "\nWho is it?"))
        both = [text for text, _ in answers._answers(tiny, cache, [(context, first), (context, second)], [4, 4])]
        alone = [text for q in (first, second) for text, _ in answers._answers(tiny, cache, [(context, q)], [4])]
    assert both == alone


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(bench_app, ["answers", *map(str, arguments), "--tiny", "--threads", "1"])
    assert done.exit_code == 2
    return " ".join(done.output.replace("│", " ").split())


def test_refused(file, tmp_path):
    assert "'loogle' cannot be scored. Use one of match, exact, ruler," in refusal(file, "--dataset", "loogle")
    assert "the contexts are those of the file" in refusal(file, "--contexts", "100")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({**ROWS[0], "context": "x" * 9000}))
    assert "takes 9,039 tokens with its answer, and tiny random llama reads 8,192. Use --max-context-length 8153" in (
        refusal(long)
    )
    invoke("answers", long, "--max-context-length", "100", "--stack", "empty")
