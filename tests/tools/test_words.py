"""The search for phrases that are hard to read: what it finds, where, and that its list can be read."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("words", ROOT / "tools" / "words.py")
words = importlib.util.module_from_spec(spec)
sys.modules["words"] = words  # dataclasses look their module up
spec.loader.exec_module(words)

RULES = words.read_rules(
    "# a comment\n[phrases]\nis no file -> is not a file\nstands in -> is in\nin -> inside\n"
    "[limits]\nwhat 500\n[at least]\nyou 100\n[first words]\nWhether -> Return True if\n[short]\n20\n"
)
TALKS = "you and your cache " * 10


def rules_of(findings):
    return [(finding.line, finding.rule) for finding in findings]


def test_a_phrase_is_found_on_its_line():
    page = "# Title\n\nThis is no\nfile. Nor is this No File.\n"
    (found,) = words.check_page(page, RULES, "page.md")
    assert str(found) == "page.md:3: 'is no file': write: is not a file"


def test_whole_words_count_and_the_longest_phrase():
    assert not rules_of(words.check_page("this is no filename, within an in-place edit\n", RULES, "page.md"))
    assert rules_of(words.check_page("it stands in line\n", RULES, "page.md")) == [(1, "stands in")]


@pytest.mark.parametrize(
    "text",
    [
        "```text\nis no file\n```\n",
        "a list\n\n  ```sh\n  is no file\n  ```\n",
        "the message `is no file`\n",
        "[a link](is-no-file.md)",
        "<!-- written by make -->\nis no file\n<!-- end of it -->\n",
    ],
)
def test_code_and_names_are_not_read(text):
    assert not list(words.check_page(text, RULES, "page.md"))
    assert list(words.check_page(text + "\nis no file", RULES, "page.md"))


def test_lines_behind_code_keep_their_numbers():
    assert rules_of(words.check_page("```text\none\ntwo\n```\nis no file\n", RULES, "page.md")) == [(5, "is no file")]


def test_overused_and_rare_words():
    assert not list(words.check_page(TALKS, RULES, "page.md"))
    assert rules_of(words.check_page(TALKS + "what " * 5, RULES, "page.md")) == [(1, "what (too often)")]
    assert rules_of(words.check_page("a cache " * 20, RULES, "page.md")) == [(1, "you (too rare)")]
    assert not list(words.check_page("what a cache", RULES, "page.md"))  # too short to be counted


def test_docstrings_and_messages_of_a_module():
    module = (
        '"""It is no file."""\n\n\ndef f(path):\n    """The name `is no file` is quoted."""\n'
        '    raise ValueError(f"{path} is no file. Use {path!r}.")  # this comment is no file\n'
    )
    assert rules_of(words.check_module(module, RULES, "module.py")) == [(1, "is no file"), (6, "is no file")]


def test_docstrings_do_not_begin_with_a_question():
    module = 'class A:\n    """Whether it is."""\n\n    def f(self):\n        """Say whether it is."""\n'
    assert rules_of(words.check_module(module, RULES, "module.py")) == [(1, "Whether (first word)")]


def test_nor_do_the_docstrings_of_attributes():
    module = 'X = 1\n"""Whether so."""\n\n\nclass A:\n    y: int\n    """Whether it is."""\n\n\n"""Whether no."""\n'
    assert sorted(rules_of(words.check_module(module, RULES, "module.py"))) == [
        (1, "Whether (first word)"),
        (6, "Whether (first word)"),
    ]


@pytest.mark.parametrize("line", ["[phrases]\nno arrow", "[limits]\nwhat often", "lost -> found", "[short]\nmany"])
def test_a_list_that_cannot_be_read(line):
    with pytest.raises(ValueError, match=r"line \d of the list of words cannot be read"):
        words.read_rules(line)


def test_the_list_of_the_project_can_be_read():
    rules = words.read_rules(words.LIST.read_text(encoding="utf-8"))
    assert {"is no file", "with a word", "without a word"} <= set(rules.phrases)
    assert all(rules.phrases.values())


def test_a_phrase_is_not_its_own_advice():
    rules = words.read_rules(words.LIST.read_text(encoding="utf-8"))
    for phrase, better in rules.phrases.items():
        assert not any(finding.rule == phrase for finding in words.phrases_in(better, rules, "words.txt"))
