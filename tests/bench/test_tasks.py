"""The benchmark's questions: texts of a given length whose answers a plain reader finds."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvstack.bench.tasks import TASKS, Question, Sample, longbench_files, make, ruler_files, score
from kvstack.bench.tasks.answers import DATASETS, Asked, answer_files
from kvstack.bench.tasks.haystack import cut, hide
from kvstack.bench.tasks.wordlist import ADJECTIVES, NOUNS
from kvstack.errors import KVStackError

PROSE = "\n\n".join(
    f"Paragraph {n} speaks of the sea and its {n} well-known harbours.\nIt says little else, and it ends soon."
    for n in range(40)
)
ONE_PLACE = [name for name, task in TASKS.items() if task.one_place]


def count(text: str) -> int:
    """Words and signs: near what a tokenizer gives, and quick."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def samples(task: str, length: int = 1024, number: int = 3, seed: int = 0, **settings: Any) -> list[Sample]:
    return make(task, length, number, seed, count, PROSE, **settings)


def solve(text: str, question: str) -> str:
    """The answer, by reading: the oracle that every task must satisfy."""
    if variables := re.search(r"hold the value (\d+)\?", question):
        held = {variables[1]}
        names = []
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            if value in held:
                held.add(name)
                names.append(name)
        return " ".join(names)
    if "come up most often in the list" in question:
        listed = re.findall(r"\d+\. (\S+)", text.rpartition("Remember those.")[2])
        return " ".join(word for word, _ in Counter(listed).most_common(10))
    if "coded words" in question:
        coded = text.partition("\n")[2].replace("...", "").split()
        return " ".join(word for word, _ in Counter(coded).most_common(3))
    keys = re.search(r"secret (?:number|code)s? of (.+?) in the text above\?", question)
    assert keys is not None
    values = dict.fromkeys(re.split(", | and ", keys[1]), "")
    for key, value in re.findall(r"secret (?:number|code) of (\S+) is (\S+)\.", text):
        if key in values:
            values[key] += f" {value}"
    return " ".join(values.values())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, 4096])
def test_text_question_and_room_fill_the_length(task, length):
    for sample in samples(task, length):
        (question,) = sample.questions
        used = count(sample.text) + count(question.text) + question.new_tokens
        assert 0.98 * length <= used <= length


@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_in_the_text_and_a_reader_finds_them(task):
    for sample in samples(task, number=5):
        (question,) = sample.questions
        assert len(set(question.answers)) == len(question.answers)
        assert all(answer in sample.text for answer in question.answers)
        assert not any(answer in question.text for answer in question.answers)
        assert score(question.metric, solve(sample.text, question.text), question) == 1
        assert score(question.metric, "", question) == 0


@pytest.mark.parametrize("task", TASKS)
def test_a_question_begins_on_a_line_of_its_own_and_ends_in_the_answer(task):
    (sample,) = samples(task, number=1)
    (question,) = sample.questions
    assert question.text.startswith("\n")
    assert not sample.text.endswith(("\n", " "))
    assert re.search(r"(is|are)$", question.text)


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_give_equal_samples_and_others_do_not(task):
    first = samples(task)
    assert first == samples(task)
    assert [sample.index for sample in first] == [0, 1, 2]
    assert len({sample.text for sample in [*first, *samples(task, seed=1)]}) == 6


@pytest.mark.parametrize("task", [name for name in TASKS if name.startswith("niah")])
def test_needles_are_those_of_other_lengths(task):
    assert [s.questions for s in samples(task, 1024)] == [s.questions for s in samples(task, 2048)]


@pytest.mark.parametrize("task", ONE_PLACE)
def test_depths_are_equal_steps_and_the_needle_is_there(task):
    made = samples(task, length=4096, number=5)
    assert [sample.depth for sample in made] == [0, 0.25, 0.5, 0.75, 1]
    for sample in made:
        place = sample.text.index(sample.questions[0].answers[0]) / len(sample.text)
        assert place == pytest.approx(sample.depth, abs=0.03)


def test_a_single_sample_has_its_needle_in_the_middle():
    assert samples("niah_single_1", number=1)[0].depth == 0.5


def test_answers_in_several_places_have_no_depth():
    assert set(TASKS) - set(ONE_PLACE) == {"niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"}
    for task in set(TASKS) - set(ONE_PLACE):
        assert {sample.depth for sample in samples(task)} == {None}


@pytest.mark.parametrize(
    ("task", "questions"), [("niah_multikey_1", 4), ("niah_multikey_2", 6), ("niah_multikey_3", 3)]
)
def test_several_questions_about_one_text_have_answers_of_their_own(task, questions):
    for sample in samples(task, questions=questions):
        assert len(sample.questions) == questions
        assert len({question.answers for question in sample.questions}) == questions
        for question in sample.questions:
            assert score("share", solve(sample.text, question.text), question) == 1
        room = max(count(question.text) + question.new_tokens for question in sample.questions)
        assert 0.98 * 1024 <= count(sample.text) + room <= 1024


def test_the_numbers_of_needles_are_rulers():
    needles = {task: len(re.findall(r"secret \w+ of", samples(task, 2048)[0].text)) for task in TASKS}
    assert [needles[f"niah_single_{n}"] for n in (1, 2, 3)] == [1, 1, 1]
    assert [needles[task] for task in ("niah_multikey_1", "niah_multivalue", "niah_multiquery")] == [4, 4, 4]
    assert needles["niah_multikey_2"] > 100
    assert needles["niah_multikey_3"] > 50


def test_variables_are_tracked_over_four_hops_after_a_solved_example():
    (sample,) = samples("vt", number=1)
    example, text = sample.text.split("\n\n")
    assert example.endswith(solve(example, example).replace(" ", ", "))
    assert text.count(" = VAR ") == 4


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_stand_as_often_in_the_list_as_with_ruler(length, often, seldom):
    (sample,) = samples("cwe", length, number=1)
    listed = Counter(re.findall(r"\d+\. (\S+)", sample.text.split("\n\n")[1]))
    common = sample.questions[0].answers
    assert {listed.pop(word) for word in common} == {often}
    assert set(listed.values()) == {seldom}


def test_coded_words_follow_the_zeta_distribution():
    (sample,) = samples("fwe", 8192, number=1)
    times = [times for _, times in Counter(sample.text.partition("\n")[2].split()).most_common(5)]
    assert [times[0] / n for n in times] == pytest.approx([1, 4, 9, 16, 25], rel=0.01)


def test_the_list_of_common_words_does_not_run_out():
    (sample,) = samples("cwe", 16_384, number=1)
    assert any("-" in word for word in sample.text.split())
    assert score("share", solve(sample.text, "come up most often in the list"), sample.questions[0]) == 1


def test_no_word_is_listed_twice():
    assert len({*ADJECTIVES, *NOUNS}) == len(ADJECTIVES) + len(NOUNS)


def test_pieces_are_the_text():
    text = f"  Well-known, it is.\n\n--- {'x' * 40} "
    assert "".join(cut(text)) == text


def test_a_needle_goes_where_a_sentence_ends_or_between_words_where_none_does():
    sentences = cut("One two three. Four five six. Seven.")
    assert hide(sentences, [(0.7, "HERE.")]) == "One two three. Four five six. HERE. Seven."
    assert hide(sentences, [(0, "A."), (0, "B.")]).startswith("A. B. One")
    endless = hide(cut("word " * 400), [(0.5, "HERE.")]).split()
    assert endless.index("HERE.") == 200


def test_short_prose_begins_again():
    (sample,) = make("niah_single_2", 1024, 1, 0, count, "A sentence. Another one.")
    assert sample.text.count("Another one.") > 100


def test_prose_without_spaces_is_cut_too():
    for sample in make("niah_single_2", 1024, 3, 0, len, "海很大。船很小。" * 40):
        assert len(sample.text) + len(sample.questions[0].text) + 128 > 0.98 * 1024
        place = sample.text.index("The secret number of") / len(sample.text)
        assert place == pytest.approx(sample.depth, abs=0.15)  # the first line and the needle are long beside the hay


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("niah", {}, "'niah' is not a task. Use one of niah_single_1, "),
        ("vt", {"number": 0}, "0 samples with 1 questions each: ask for at least one of both."),
        ("vt", {"questions": 0}, "3 samples with 0 questions each: ask for at least one of both."),
        (
            "niah_multikey_1",
            {"questions": 5},
            "niah_multikey_1 can answer 4 questions about one text, not 5. "
            "Ask fewer, or use niah_multikey_2 or niah_multikey_3.",
        ),
        (
            "niah_multiquery",
            {"questions": 2},
            "niah_multiquery can answer 1 question about one text, not 2. "
            "Ask fewer, or use niah_multikey_1 or niah_multikey_2 or niah_multikey_3.",
        ),
        ("niah_single_1", {"length": 100}, r"niah_single_1: 100 tokens are too few. .* take \d+. Ask for more."),
    ],
)
def test_what_cannot_be_made_is_refused(task, settings, message):
    with pytest.raises(KVStackError, match=message):
        samples(task, **settings)


def test_the_length_named_as_needed_is_enough():
    with pytest.raises(KVStackError) as refused:
        samples("cwe", 100)
    needed = re.search(r"take (\d+)", str(refused.value))
    assert needed is not None
    assert samples("cwe", int(needed[1]), number=1)


def test_empty_prose_is_refused():
    with pytest.raises(KVStackError, match=r"the prose is empty. Give a text of some pages."):
        make("niah_single_2", 1024, 1, 0, count, " \n")


# files


@pytest.fixture
def files(tmp_path: Path):
    def write(name: str, *entries: dict[str, Any] | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        path.write_text("\n".join(lines) + "\n")
        return tmp_path

    return write


def needle(index: int, place: int) -> dict[str, Any]:
    words = ["hay"] * 100
    words[place] = str(1000 + index)
    question = "What is the number? The number is"
    return {"index": index, "input": f"{' '.join(words)}\n{question}", "outputs": [str(1000 + index)], "length": 110}


def test_ruler_files_are_read(files):
    folder = files("1024/niah_single_2.jsonl", needle(0, 0), needle(1, 50), "", needle(2, 99))
    read = ruler_files(folder, 1024, "niah_single_2", 3)
    assert [sample.depth for sample in read] == pytest.approx([0, 0.5, 1], abs=0.02)
    assert [sample.index for sample in read] == [0, 1, 2]
    question = read[1].questions[0]
    assert question == Question("\nWhat is the number? The number is", ("1001",), 128, "share")
    assert read[1].text.endswith("hay")
    assert len(ruler_files(folder, 1024, "niah_single_2", 2)) == 2


def test_ruler_questions_begin_at_their_last_mark_and_end_with_the_answers_prefix(files):
    entry = {
        "input": "A = 1\nQuestion: Which? Answer: A\nA = 2\nQuestion: Find all.",
        "outputs": ["A", "B"],
        "answer_prefix": " Answer: they are:",
    }
    (sample,) = ruler_files(files("4096/vt.jsonl", entry), 4096, "vt", 5)
    assert sample.text == "A = 1\nQuestion: Which? Answer: A\nA = 2"
    assert sample.questions[0].text == "\nQuestion: Find all. Answer: they are:"
    assert sample.questions[0].new_tokens == 30
    assert sample.depth is None


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("2048/vt.jsonl", {}, r"1024.vt.jsonl does not exist. RULER's samples are files CONTEXT/TASK.jsonl"),
        ("1024/vt.jsonl", {"input": "no question", "outputs": ["1"]}, "no question in sample 0. It begins with one of"),
        ("1024/vt.jsonl", {"input": "text"}, "vt.jsonl, line 1: no outputs."),
        ("1024/vt.jsonl", "{", "vt.jsonl, line 1: no JSON object: "),
        ("1024/vt.jsonl", "", "vt.jsonl holds no sample."),
    ],
)
def test_broken_ruler_files_are_named(files, name, entry, message):
    with pytest.raises(KVStackError, match=message):
        ruler_files(files(name, entry), 1024, "vt", 1)


def test_ruler_tasks_without_a_score_are_refused(tmp_path):
    with pytest.raises(KVStackError, match="'qa_1': of RULER's tasks, those that begin with niah, vt, cwe, fwe can be"):
        ruler_files(tmp_path, 1024, "qa_1", 1)


def longbench(files: Any, task: str, **fields: Any) -> Sample:
    entry = {"input": "", "context": "A text.\n", "answers": ["x"], "all_classes": None, "dataset": task} | fields
    (sample,) = longbench_files(files(f"{task}.jsonl", entry), task, 4)
    return sample


def test_longbench_questions_follow_the_context(files):
    sample = longbench(files, "hotpotqa", input="Who?", answers=["me", "I"])
    assert sample.text == "A text."
    (question,) = sample.questions
    assert question.text.startswith("\n\nQuestion: Who?\n")
    assert question.text.endswith("\nAnswer:")
    assert (question.answers, question.metric, question.new_tokens) == (("me", "I"), "f1", 32)
    assert sample.depth is None


def test_longbench_examples_go_on_with_the_input(files):
    sample = longbench(files, "trec", input="Question: How far?\nType: ", answers=["number"], all_classes=["number"])
    (question,) = sample.questions
    assert question.text == "\nQuestion: How far?\nType:"
    assert question.classes == ("number",)
    assert score(question.metric, "\nnumber\nQuestion: What is a label?\nType: other", question) == 1


def test_longbench_code_keeps_its_indent_and_its_braces(files):
    sample = longbench(files, "repobench-p", context="import a\n\n", input="def f():\n    x = {input}\n")
    assert sample.questions[0].text == "\ndef f():\n    x = {input}\nThe next line of this code:\n"
    assert longbench(files, "lcc").questions[0].text == "\nThe next line of this code:\n"


def test_longbench_e_is_read_like_longbench(files):
    assert longbench(files, "qasper_e").questions == longbench(files, "qasper").questions


def test_unknown_longbench_files_are_refused(tmp_path):
    with pytest.raises(
        KVStackError, match=r"'dureader' is not an English data set of LongBench. Use one of narrativeqa, "
    ):
        longbench_files(tmp_path, "dureader", 1)
    with pytest.raises(KVStackError, match=r"qasper.jsonl does not exist. LongBench's samples are files TASK.jsonl"):
        longbench_files(tmp_path, "qasper", 1)


# scores, by hand


@pytest.mark.parametrize(
    ("metric", "given", "answers", "classes", "wanted"),
    [
        ("share", "they are: ABC and def", ("abc", "DEF", "ghi", "jkl"), (), 0.5),
        ("f1", "The cat, sat.", ("a cat sat down",), (), 0.8),  # 2 of 2 words given, 2 of 3 wanted
        ("f1", "cat cat", ("cat",), (), 2 / 3),
        ("f1", "dog", ("cat", "dog"), (), 1),
        ("rouge_l", "a b c d", ("a c d e",), (), 0.75),
        ("rouge_l", "", ("a b",), (), 0),
        ("classes", "It is a place.", ("place",), ("place", "person"), 1),
        ("classes", "place or person", ("place",), ("place", "person"), 0.5),
        ("classes", "a work place", ("work place",), ("place", "work place"), 1),
        ("classes", "person", ("place",), ("place", "person"), 0),
        ("retrieval", "Paragraph 12", ("Paragraph 12",), (), 1),
        ("retrieval", "Paragraph 12 or 1", ("Paragraph 1",), (), 0.5),
        ("retrieval", "the first", ("Paragraph 1",), (), 0),
        ("count", "17, no: 7", ("7",), (), 0.5),
        ("edit", "\n# a comment\nx = 1\ny = 2", ("x = 2",), (), 0.8),  # 4 of 5 signs
        ("edit", "`x`", ("x",), (), 0),
    ],
)
def test_scores(metric, given, answers, classes, wanted):
    question = Question("\nWhat?", answers, 8, metric, classes)
    assert score(metric, given, question) == pytest.approx(wanted, abs=1e-6)


def test_a_summary_too_long_for_its_package_scores_nothing():
    question = Question("\nWhat?", ("x",), 8, "rouge_l")
    assert score("rouge_l", "x" + " word" * 100, question) > 0
    assert score("rouge_l", "x" + " word" * 1100, question) == 0


def test_unknown_metrics_are_refused():
    with pytest.raises(KVStackError, match=r"'bleu' is not a metric. Use one of share, f1, "):
        score("bleu", "text", Question("\nWhat?", ("a",), 8, "bleu"))


def test_summaries_without_their_package_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(KVStackError, match=r"package rouge. Run: pip install 'kvstack\[bench\]'"):
        score("rouge_l", "text", Question("\nWhat?", ("a",), 8, "rouge_l"))


# ---- questions in kvpress' columns


def asked(*answers: str, task: str = "niah", **row: Any) -> Asked:
    return Asked("", "", "", answers, 1, task, row)


@pytest.mark.parametrize(
    ("dataset", "row", "text", "expected"),
    [
        ("match", asked("Paris", "Rome"), "It is rome.", 1),
        ("match", asked("Paris"), "It is rome.", 0),
        ("exact", asked("Paris"), " Paris\n", 1),
        ("exact", asked("Paris"), "Paris.", 0),
        ("ruler", asked("7", "8"), "7 and 9", 0.5),
        ("ruler", asked("7", "8", task="qa_1"), "7 and 9", 1),
        ("ruler", asked("ab"), "A\x00\nB", 1),  # control characters are taken out
        ("longbench", asked("the cat", task="qasper"), "\nA cat", 1),
        ("longbench", asked("one", task="trec", all_classes=["one", "two"]), "one\ntwo", 1),
        ("longbench-v2", asked("B"), "**The correct answer is (B)**", 1),
        ("longbench-v2", asked("B"), "The correct answer is C, not B", 0),
        ("aime25", asked("42"), "\\boxed{1} no, \\boxed{42}", 1),
        ("aime25", asked("42"), "42", 1),  # as kvpress counts it
        ("math500", asked("42"), "\\boxed{42} not \\boxed{1}", 1),
        ("math500", asked("42"), "42", 0),
    ],
)
def test_scores_of_kvpress(dataset, row, text, expected):
    assert DATASETS[dataset].score(text, row) == expected


def test_metrics_of_kvpress():
    """The figures of its metrics.json, worked out by hand."""
    rows, texts = [asked("7", task="b"), asked("8", "9", task="a"), asked("1", task="b")], ["7", "9", "2"]
    expected = {"a": {"string_match": 50.0}, "b": {"string_match": 50.0}}
    assert DATASETS["ruler"].metrics(rows, texts) == expected
    assert list(DATASETS["ruler"].metrics(rows, texts)) == ["a", "b"]
    boxed = [asked("1"), asked("2"), asked("3")]
    assert DATASETS["math500"].metrics(boxed, ["boxed{1}", "boxed{9}", "3"]) == {
        "correct": 1, "answered": 2, "accuracy": 1 / 3, "total": 3,
    }  # fmt: skip
    choices = [asked("A", difficulty="hard", length="short"), asked("B", difficulty="easy", length="short")]
    assert DATASETS["longbench-v2"].metrics(choices, ["The correct answer is A", ""]) == {
        "average": 0.5, "easy": 0.0, "hard": 1.0, "short": 0.5,
    }  # fmt: skip
    papers = [asked("cat", task="qasper", length=n) for n in (10, 4000)]
    assert DATASETS["longbench"].metrics(papers, ["cat", "dog"]) == 50.0
    assert DATASETS["longbench-e"].metrics(papers, ["cat", "dog"]) == {"0-4k": 100.0, "4-8k": 0.0, "8k+": None}


ROW = {"context": "c", "question": "q", "answer_prefix": None, "answer": "a", "max_new_tokens": 3}


def test_parquet_and_json_lines_hold_the_same_rows(tmp_path):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    rows = [{**ROW, "answer": ["a", "b"], "task": "qa_1"}, {**ROW, "answer": ["c"], "task": "niah"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines, table = (answer_files(tmp_path / f"rows.{kind}") for kind in ("jsonl", "parquet"))
    assert lines == table
    assert lines[1] == 2
    assert lines[0][0] == Asked("c", "q", "", ("a", "b"), 3, "qa_1", rows[0])
    assert answer_files(tmp_path / "rows.jsonl", 1) == (lines[0][:1], 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "", "rows.csv is neither Parquet nor JSON lines. Name a .parquet or a .jsonl file."),
        ("rows.parquet", "no", "rows.parquet cannot be read as Parquet"),
        ("rows.jsonl", "", "rows.jsonl holds no sample. A file of questions has the columns context, question,"),
        ("rows.jsonl", '{"context": "c"}', "no question and no answer_prefix and no max_new_tokens"),
        ("rows.jsonl", json.dumps({**ROW, "answer": None}), "row 0: the column answer is missing."),
        ("rows.jsonl", json.dumps({**ROW, "answer": []}), "answer is [] and max_new_tokens is 3. Give at least one"),
        ("rows.jsonl", json.dumps({**ROW, "max_new_tokens": 0}), "max_new_tokens is 0. Give at least one answer, and"),
    ],
)
def test_files_that_are_not_questions(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(KVStackError, match=re.escape(message)):
        answer_files(tmp_path / name)
