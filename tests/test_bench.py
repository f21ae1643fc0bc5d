"""The benchmarks run on a tiny random model. What they measure of time is never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from kvstack import KVStack
from kvstack.bench.measure import matrix, quality, results, subject, summary, texts, variants
from kvstack.bench.measure.quality import Reading, compare
from kvstack.bench.measure.results import Results
from kvstack.bench.measure.run import Run, environment
from kvstack.bench.measure.subject import opened, rotated
from kvstack.bench.show import report
from kvstack.cli.bench import bench_app
from kvstack.errors import KVStackError, SpecError


def invoke(*arguments: object) -> str:
    # one thread: two that wait for each other on a busy machine cost more than the arithmetic
    done = CliRunner().invoke(bench_app, [*map(str, arguments), "--tiny", "--threads", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def bench(tmp_path: Path):
    def run(command: str, *options: str, stacks: tuple[str, ...] = (), file: str | None = None):
        """The records of one benchmark, key and figures together."""
        invoke(command, "--out", tmp_path, *(f"--stack={spec}" for spec in stacks), *options)
        rows, _ = report.load(tmp_path, file or command)
        return rows

    return run


def by_cache(rows):
    return {row["cache"]: row for row in rows}


# ---- what is measured


def test_quality_of_exact_caches_is_exact(bench):
    rows = by_cache(summary.quality(bench("quality", "--score", "16", stacks=("empty",))))
    for label in ("dense", "empty"):
        assert rows[label]["kl"] == rows[label]["kl_q99"] == 0
        assert rows[label]["top1"] == 1
    assert rows["empty"]["nll"] == rows["dense"]["nll"]


def test_quality_falls_with_the_bits_and_with_the_tokens(bench):
    stacks = ("quant:8", "quant:4", "quant:2", "evict:0.2")
    rows = by_cache(summary.quality(bench("quality", "--windows", "2", "--score", "32", stacks=stacks)))
    assert 0 < rows["quant:8"]["kl"] < rows["quant:4"]["kl"] < rows["quant:2"]["kl"]
    assert rows["evict:0.2"]["kl"] > rows["quant:8"]["kl"]
    assert 1 > rows["quant:8"]["share"] > rows["quant:4"]["share"] > rows["quant:2"]["share"]
    assert all(row["scored"] == 3 * 2 * 32 for row in rows.values())


def test_chance_and_no_context_are_the_worst(bench):
    stacks = ("evict:0.2", "evict:0.2,score=random", "evict:0.2,score=knorm", "nothing")
    rows = by_cache(summary.quality(bench("quality", "--windows", "4", stacks=stacks)))
    assert rows["nothing"]["share"] == 0
    assert rows["nothing"]["kind"] == rows["evict:0.2,score=random"]["kind"] == "control"
    assert rows["evict:0.2"]["kl"] < rows["evict:0.2,score=random"]["kl"] < rows["nothing"]["kl"]


def test_figures_of_a_reading_by_plain_loops():
    draw = torch.Generator().manual_seed(0)
    dense, own = (torch.randn(5, 7, generator=draw).log_softmax(-1) for _ in range(2))
    targets = torch.tensor([0, 6, 3, 3, 1])
    figures = compare(Reading(own, 0.25), dense, targets)
    for i in range(5):
        p, q = dense[i].exp().tolist(), own[i].exp().tolist()
        assert figures["kl"][i] == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-3)
        assert figures["same"][i] == (p.index(max(p)) == q.index(max(q)))
        assert figures["nll"][i] == pytest.approx(-np.log(q[targets[i]]), rel=1e-3)
    assert figures["share"] == 0.25
    assert figures["simulated"] is False


def test_a_context_that_is_compressed_is_not_the_one_that_is_scored():
    """The logits are those of the whole text read at once, where the cache is exact."""
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        ids = tiny.tokens(80)
        reading = quality.read(tiny, variants.parse([])[0], ids, 48)
        plain = tiny.model(ids).logits[0, 48:-1].log_softmax(-1)
    torch.testing.assert_close(reading.log_probs, plain, atol=1e-4, rtol=1e-4)


def test_tokens_can_be_fed_as_in_decoding():
    """One by one they give what they give at once; a stack compresses them when they leave its window, which shows."""
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        ids = tiny.tokens(128)
        for spec, far in (("dense", False), ("quant:2@window=16", True)):
            cache = variants.parse([spec])[-1]
            once, *apart = (quality.read(tiny, cache, ids, 64, feed).log_probs for feed in (None, 1, 7))
            assert [bool((x - once).abs().max() > 1e-3) for x in apart] == [far, far]


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
    from kvstack.bench.measure import needles
    from kvstack.bench.tasks import Question, Sample

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
                patch.setattr(needles.variants, "share_of_bfloat16", count)
                needles._ask(tiny, variants.parse([])[0], sample, mode, 4)
            lengths[mode] = seen
    once = lengths["agnostic"][0]
    assert lengths["agnostic"] == [once] * 3
    assert once == 200 + len("\nWhat is a?") + 3  # the last new token is not fed
    assert lengths["turns"] == [once, 2 * once - 200 + 1, 3 * once - 400 + 2]


def test_memory_by_stage(bench):
    stacks = ("empty", "quant:4", "quant:2", "quant:2+evict:0.2")
    options = ("--no-peak", "--decode", "40", "--dtype", "bfloat16")
    rows = by_cache(bench("memory", *options, stacks=stacks))
    assert rows["dense"]["nbytes_prefill"] == 2 * 2 * 2 * 32 * 2 * 512  # bfloat16
    assert rows["dense"]["parts"] == []
    shares = [rows[label]["nbytes"] / rows[label]["dense_nbytes"] for label in ("dense", *stacks)]
    assert shares[:2] == [1, pytest.approx(1, rel=0.1)]
    assert shares[1] > shares[2] > shares[3] > shares[4]
    row = rows["quant:2+evict:0.2"]
    assert row["report"]["nbytes"] == row["nbytes"] == sum(part["nbytes"] for part in row["parts"])
    assert row["dense_nbytes"] == rows["dense"]["nbytes"]
    assert {"Quant(bits=2)", "Evict(keep=0.2)", "stack"} == {part["payer"] for part in row["parts"]}


def test_memory_peaks_come_from_a_process_of_their_own(bench):
    (row,) = bench("memory", "--decode", "1", stacks=("dense",))
    assert row["peak_prefill"] is None or row["peak_decode"] >= 0


def test_decode_counts_bytes_of_every_cache(bench):
    stacks = ("empty", "evict:0.2", "quant:2")
    rows = by_cache(bench("decode", "--steps", "8", "--burst", "4", "--rounds", "2", stacks=stacks))
    assert list(rows) == ["dense", *stacks]
    assert all(row["tokens"] == 8 and len(row["bursts_ms"]) == len(row["prefills_ms"]) == 2 for row in rows.values())
    # 2 layers x keys and values x 2 heads x 32 channels x 4 bytes, for the context, the warm-up burst and the steps
    assert rows["dense"]["nbytes"] == 2 * 2 * 2 * 32 * 4 * (512 + 4 + 8)
    assert rows["dense"]["ttft_cost"] == 0
    assert rows["dense"]["speed_typical"] == 1
    assert rows["evict:0.2"]["nbytes"] < rows["dense"]["nbytes"] / 2


def test_a_matrix_has_every_combination_and_a_front(tmp_path):
    options = ("--transform", "none", "--transform", "commonkv:0.5,layers=2", "--encode", "none", "--encode", "quant:2")
    out = invoke("matrix", "--out", tmp_path, *options, "--evict", "none", "--score", "32", "--steps", "4")
    rows, _ = report.load(tmp_path, "matrix")
    assert len([row for row in rows if row["stages"]]) == 4
    assert "front: no other combination holds fewer bytes" in out
    assert all(row["speed_typical"] > 0 for row in rows)


def test_a_combination_that_cannot_be_built_is_left_out_and_said(capsys):
    grid = matrix.combinations(["none", "commonkv:0.5,layers=2"], ["none"], ["evict:0.5,layers=3"])
    assert list(grid) == ["evict:0.5,layers=3"]
    assert "do not nest" in " ".join(capsys.readouterr().out.split())


def test_likeness_of_layers(bench):
    rows = {row["variant"]: row for row in bench("layers", "--layers", "2")}
    assert set(rows) == {"keys", "values", "hidden states", "latents of the weights"}
    assert all(-1 <= row["ends"] <= 1 for row in rows.values())
    assert rows["keys"]["ends"] == pytest.approx(rows["keys"]["pairs"]), "two layers are one pair"


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
        shares.append(variants.share_of_bfloat16(cache, model))
    codes, raw = 64 * (4 + 32 / 32 / 2 + 32 / 16 / 2) / 16, 10
    assert shares[:2] == [1.0, 1.0]
    assert shares[2] == pytest.approx((raw + codes) / 74)
    held = caches[3].held
    assert held <= 32 + 10
    # positions: four bytes for each token that was chosen, once for all four layers; a token has 256 numbers
    assert shares[3] == pytest.approx((held + (held - 10) * 4 / (256 * 2)) / 74)


def test_dense_bytes_of_a_sliding_layer_end_with_its_window():
    from . import tiny

    model = tiny.model("gemma3")
    ids = tiny.tokens(1, 200)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    # 2 layers hold 15 of 200 tokens and 2 hold all, 2 heads of 16 for keys and for values, 2 bytes
    assert variants.dense_bfloat16(cache, model) == (2 * 15 + 2 * 200) * 2 * 2 * 16 * 2
    # behind a prompt sliding layers hold views of all of it; a few counters come on top
    assert variants.share_of_bfloat16(cache, model) == pytest.approx(1, rel=0.01)
    stack = KVStack([], model=model)
    model(ids, past_key_values=stack)
    assert variants.share_of_bfloat16(stack, model) == pytest.approx(1, rel=0.01)


# ---- statistics


def test_the_interval_of_a_mean_holds_it_and_narrows():
    draw = np.random.default_rng(0)
    few, many = draw.exponential(size=20), draw.exponential(size=2000)
    (a, b), (c, d) = summary.interval(few, 0), summary.interval(many, 0)
    assert a < few.mean() < b
    assert d - c < (b - a) / 5
    assert summary.interval(np.array([3.0]), 0) == (3, 3)


def test_the_interval_of_a_ratio_is_paired():
    """Two caches that drift on the same tokens: their ratio is far surer than either mean."""
    tokens = np.random.default_rng(0).exponential(size=50)
    assert summary.ratio(tokens * 0.5, tokens, 0) == pytest.approx((0.5, 0.5))


def test_the_best_of_each_budget_by_hand():
    def record(cache, kind, share, kl):
        figures = {"share": share, "kl": [kl] * 64, "same": [1] * 64, "nll": [0.0] * 64, "simulated": False}
        key = {"context": 100, "score": 64, "domain": "code", "window": 0, "text": "a", "cache": cache}
        return {**key, **figures, "kind": kind, "family": kind}

    records = [
        record("dense", "dense", 1.0, 0.0),
        record("a", "kvstack", 0.5, 0.01),
        record("b", "kvstack", 0.2, 0.04),
        record("c", "kvstack", 0.24, 0.08),  # larger and worse than b
        record("chance", "control", 0.1, 0.0001),
        record("p", "peer", 0.4, 0.02),
        record("q", "peer", 0.25, 0.4),
    ]
    half, quarter, eighth = summary.budgets(records, (0.5, 0.25, 0.125))
    assert (half["stack"]["cache"], half["peer"]["cache"], half["ratio"]) == ("a", "p", pytest.approx(0.5))
    assert (quarter["stack"]["cache"], quarter["peer"]["cache"], quarter["ratio"]) == ("b", "q", pytest.approx(0.1))
    assert (eighth["stack"], eighth["peer"], eighth["ratio"]) == (None, None, None)


def test_scores_are_drawn_by_depth():
    def record(depth, score):
        key = {"context": 100, "task": "niah", "mode": "aware", "cache": "dense"}
        return {**key, "depth": depth, "score": score, "kind": "dense", "share": 1.0}

    found = summary.heat([record(0.0, 1.0), record(0.19, 0.0), record(1.0, 1.0), record(None, 0.0)], cells=5)
    assert [(cell["depth"], cell["score"], cell["samples"]) for cell in found] == [(0.1, 0.5, 2), (0.9, 1.0, 1)]


# ---- figures on disk


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    options = ("quality", "--out", tmp_path, "--score", "16")
    first = invoke(*options, "--stack", "quant:4")
    lines = (tmp_path / "quality.jsonl").read_text()
    read = quality.read
    asked = []
    monkeypatch.setattr(
        quality, "read", lambda tiny, cache, *rest: asked.append(cache.label) or read(tiny, cache, *rest)
    )
    assert invoke(*options, "--stack", "quant:4") == first
    assert asked == []
    invoke(*options, "--stack", "quant:4", "--stack", "quant:2")
    assert asked == ["dense", "quant:2"] * 3  # the dense cache is what a new one is compared with
    assert (tmp_path / "quality.jsonl").read_text().startswith(lines)


def test_other_windows_are_other_texts(tmp_path):
    """With more windows the first one begins elsewhere: it is read anew, and not taken for what stands there."""
    options = ("quality", "--out", tmp_path, "--score", "16", "--stack", "quant:4")
    invoke(*options)
    invoke(*options, "--windows", "2")
    rows, _ = report.load(tmp_path, "quality")
    assert len(rows) == 2 * 3 * (1 + 2)
    assert len({(row["domain"], row["text"]) for row in rows}) == 3 * (1 + 2)


def test_a_report_does_not_mix_settings(tmp_path):
    for score in ("16", "32"):
        invoke("quality", "--out", tmp_path, "--score", score, "--stack", "quant:4")
    rows, _ = report.load(tmp_path, "quality")
    assert {row["score"] for row in rows} == {32}
    assert report.write(tmp_path).exists()


def test_a_cache_that_fails_ends_no_run(tmp_path, monkeypatch):
    read = quality.read

    def failing(tiny, cache, *rest):
        if cache.label == "quant:4":
            raise KVStackError("out of tricks.")
        return read(tiny, cache, *rest)

    monkeypatch.setattr(quality, "read", failing)
    out = invoke("quality", "--out", tmp_path, "--score", "16", "--stack", "quant:4", "--stack", "quant:2")
    assert out.count("quant:4: skipped, out of tricks.") == 1
    rows, _ = report.load(tmp_path, "quality")
    assert set(by_cache(rows)) == {"dense", "quant:2"}


@pytest.mark.parametrize("command", ["decode", "memory", "needles"])
def test_no_context_is_no_cache(command, tmp_path):
    own = {"decode": ("--steps", "4", "--rounds", "1"), "memory": ("--no-peak",), "needles": ("--samples", "1")}
    out = invoke(command, "--out", tmp_path, *own[command], "--stack", "nothing,empty")
    rows, _ = report.load(tmp_path, command)
    assert set(by_cache(rows)) == {"dense", "empty"}
    assert command == "needles" or "nothing: skipped, there is no cache in this process." in out


def test_turns_are_not_asked_of_kvpress(capsys):
    found = variants.without_presses(variants.parse(["kvpress:snapkv,keep=0.5", "empty"]), "it cannot.")
    assert [cache.label for cache in found] == ["dense", "empty"]
    assert capsys.readouterr().out == "kvpress:snapkv,keep=0.5: skipped, it cannot.\n"


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
    from kvstack.bench.measure import needles
    from kvstack.bench.tasks import Question, Sample

    sample = Sample("qa", "a" * 300 + "b" * 300, (Question("\nWhat?", ("a",), 34, "f1"),), None, 0, None)
    with opened(Run((), (), tiny=True, threads=1)) as tiny:
        short = needles._shortened(tiny, sample, 100)
        assert short.text == "a" * 30 + "b" * 30
        assert needles._shortened(tiny, sample, 1000) == sample
        with pytest.raises(KVStackError, match="question and answer take 40 of 41 tokens"):
            needles._shortened(tiny, sample, 41)


def test_a_context_longer_than_the_model_is_refused():
    done = CliRunner().invoke(bench_app, ["quality", "--tiny", "--contexts", "9000", "--stack", "empty"])
    assert done.exit_code == 2
    assert "reads 8,192 tokens, and 9,256 are needed" in " ".join(done.output.replace("│", " ").split())


def test_all_tasks_and_unknown_ones():
    done = CliRunner().invoke(bench_app, ["needles", "--tiny", "--task", "niah"])
    assert "'niah' is no task. Use one of niah_single_1" in " ".join(done.output.replace("│", " ").split())


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    where = {"model": "m", "commit": "a"}
    Results("quality", tmp_path, where).add({"kl": 1.0}, cache="x")
    path = tmp_path / "quality.jsonl"
    path.write_text(path.read_text() + '{"bench": "qual')
    again = Results("quality", tmp_path, where)
    assert again.get(cache="x") == {"kl": 1.0}
    again.add({"kl": 2.0}, cache="y")
    assert [record["figures"]["kl"] for record in results.read(path)] == [1.0, 2.0]


def test_figures_of_other_code_or_settings_are_not_taken(tmp_path):
    Results("quality", tmp_path, {"code": "1", "commit": "a"}).add({"kl": 1.0}, cache="x")
    assert Results("quality", tmp_path, {"code": "1", "commit": "b"}).get(cache="x") == {"kl": 1.0}
    assert Results("quality", tmp_path, {"code": "2", "commit": "a"}).get(cache="x") is None
    rows, where = report.load(tmp_path, "quality")
    assert rows == [{"cache": "x", "kl": 1.0}]
    assert where["code"] == "1"


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "quality.jsonl").write_text('{"cache": "x"}\n')
    with pytest.raises(KVStackError, match=r"line 1 is no benchmark record\. Name another folder"):
        Results("quality", tmp_path, {})


def test_figures_say_where_they_come_from():
    found = environment(Run((), (), seed=3, threads=1), "some model")
    assert (found["model"], found["dtype"], found["threads"], found["seed"]) == ("some model", "float32", 1, 3)
    assert all(found[name] for name in ("hardware", "torch", "transformers", "kvstack", "code"))


def test_everything_and_its_report(tmp_path):
    """All benchmarks with two stacks, then one page with their pictures."""
    out = invoke("all", "--out", tmp_path, "--stack", "quant:4", "--stack", "quant:2+evict:0.2")
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in "".join(out.split("\n"))
    for name in ("quality", "needles", "memory", "decode", "matrix"):
        assert (tmp_path / f"{name}.jsonl").exists()
    for heading in ("Quality", "Needles", "Memory", "Speed", "Mix and match", "At equal bytes"):
        assert heading in page
    pictures = sorted(path.stem for path in tmp_path.glob("*.svg"))
    assert pictures[:4] == ["decode", "matrix", "memory", "memory-growth"]
    assert page.count("<svg") == len(pictures)


def test_a_report_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(KVStackError, match="Run a benchmark first: kvstack bench all --out"):
        report.write(tmp_path)


# ---- names and options


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


def test_contexts_are_numbers():
    done = CliRunner().invoke(bench_app, ["decode", "--tiny", "--contexts", "4k"])
    assert done.exit_code == 2
    assert "2048,4096" in done.output


def test_what_cannot_run_here_is_said_and_passed_over(monkeypatch, capsys):
    found = variants.parse(["empty", "hqq:4"])
    monkeypatch.setattr(type(found[2].peer), "missing", lambda self: "not installed.")
    assert [cache.label for cache in variants.available(found)] == ["dense", "empty"]
    assert capsys.readouterr().out == "hqq:4: skipped, not installed.\n"


def test_a_stack_that_cannot_be_bound_is_said_and_passed_over(bench, tmp_path):
    out = invoke("quality", "--out", tmp_path, "--score", "16", "--stack", "commonkv:layers=5", "--stack", "quant:4")
    assert "commonkv:layers=5: skipped, CommonKV(layers=5) stores 5 layers" in out
    rows, _ = report.load(tmp_path, "quality")
    assert set(by_cache(rows)) == {"dense", "quant:4"}


def test_settings_reach_the_stack():
    with opened(Run((), (), tiny=True)) as tiny:
        cache = variants.parse(["quant:4@fused=False,window=32"])[1].cache(tiny.model)
    assert repr(cache) == "KVStack([Quant(bits=4)], window=32, fused=False)"


def test_every_cache_goes_first_once():
    assert [rotated("abc", i) for i in range(4)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_letters_are_a_tokenizer():
    letters = subject.Letters()
    assert letters.decode(letters("Hay, é.", return_tensors="pt")["input_ids"][0]) == "Hay, ?."


# ---- texts


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
    assert texts.domains(tmp_path)["texts"] == texts.prose(tmp_path) == "essay"


def test_figures_are_plain_json(bench, tmp_path):
    bench("quality", "--score", "16", stacks=("empty",))
    record = json.loads((tmp_path / "quality.jsonl").read_text().splitlines()[0])
    assert set(record) == {"bench", "key", "figures", "environment"}
