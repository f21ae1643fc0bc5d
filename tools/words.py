"""Search documents, docstrings and messages for phrases that are hard to read, listed in words.txt.

    python tools/words.py     prints the findings; exit status 1 if there are any

Code blocks and `names` are not read.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
LIST = HERE / "words.txt"
UNREAD = re.compile(
    r"^ *```.*?^ *```"  # code, diagrams, output
    r"|<!-- written by.*?<!-- end of"  # tables of make matrix: messages of the code, which are read there
    r"|`[^`\n]*`"  # names
    r"|\]\([^)]*\)",  # targets of links
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Rules:
    """Phrases with a better one, and rates per 10,000 words of a page."""

    phrases: dict[str, str] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    short: int = 0

    def __post_init__(self) -> None:
        # the longest first, so that a phrase is not counted as a shorter one that it contains
        order = sorted(self.phrases, key=len, reverse=True)
        words = (r"\s+".join(map(re.escape, phrase.split())) for phrase in order)
        self.pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(words) or '(?!)'})(?![\w-])", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """A place that a rule objects to."""

    path: str
    line: int
    rule: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule!r}: {self.advice}"


def read_rules(text: str) -> Rules:
    """Return the rules of a list such as words.txt. A line that cannot be read raises ValueError."""
    advice: dict[str, dict[str, str]] = {"phrases": {}, "first words": {}}
    rates: dict[str, dict[str, float]] = {"limits": {}, "at least": {}}
    short, section = 0, ""
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
        elif section in advice and " -> " in line:
            phrase, better = line.split(" -> ", 1)
            advice[section][phrase.lower()] = better
        elif section in rates and re.fullmatch(r"\w+ \d+", line):
            word, rate = line.split()
            rates[section][word.lower()] = float(rate)
        elif section == "short" and line.isdigit():
            short = int(line)
        else:
            raise ValueError(f"line {number} of the list of words cannot be read: {line!r}")
    return Rules(advice["phrases"], rates["limits"], rates["at least"], advice["first words"], short)


def prose(text: str) -> str:
    """The words of a page, on the lines where they are: code and names are blanked."""
    return UNREAD.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings and strings of a module, with the line each begins on. A field of an f-string reads as {}."""
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def first_words(source: str) -> Iterator[tuple[int, str]]:
    """First words of the docstrings of a module, its classes, functions and attributes, with the lines of these."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words:
                yield getattr(node, "lineno", 1), words[0]
        if isinstance(node, ast.Module | ast.ClassDef):
            for attribute, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(attribute, ast.Assign | ast.AnnAssign) and (words := _string(text).split()):
                    yield attribute.lineno, words[0]


def _string(node: ast.stmt) -> str:
    """Return the text of a statement that is only a string; empty for all others."""
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
    return ""


def phrases_in(text: str, rules: Rules, path: str, line: int = 1) -> Iterator[Finding]:
    for match in rules.pattern.finditer(text):
        phrase = " ".join(match[0].lower().split())
        yield Finding(path, line + text.count("\n", 0, match.start()), phrase, f"write: {rules.phrases[phrase]}")


def check_page(text: str, rules: Rules, path: str) -> Iterator[Finding]:
    """Yield the findings in a page of Markdown."""
    text = prose(text)
    yield from phrases_in(text, rules, path)
    words = Counter(re.findall(r"[a-z']+", text.lower()))
    total = words.total()
    if total < rules.short:
        return
    words["you"] += words["your"]
    for word, most in rules.most.items():
        if (rate := words[word] * 10_000 / total) > most:
            yield Finding(path, 1, f"{word} (too often)", f"{rate:.0f} per 10,000 words, at most {most:.0f}")
    for word, least in rules.least.items():
        if (rate := words[word] * 10_000 / total) < least:
            yield Finding(path, 1, f"{word} (too rare)", f"{rate:.0f} per 10,000 words, at least {least:.0f}")


def check_module(source: str, rules: Rules, path: str) -> Iterator[Finding]:
    """Yield the findings in docstrings and messages of a module."""
    for line, text in texts_of(source):
        yield from phrases_in(re.sub(r"`[^`\n]*`", " ", text), rules, path, line)
    for line, word in first_words(source):
        if word.lower() in rules.first:
            yield Finding(path, line, f"{word} (first word)", f"begin with: {rules.first[word.lower()]}")


def check_project(root: Path, rules: Rules) -> list[Finding]:
    """Return the findings in documents and code of the project, without the tests."""
    found: list[Finding] = []
    pages = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "plugins").rglob("*.md")]
    for page in sorted(pages):
        found += check_page(page.read_text(encoding="utf-8"), rules, page.relative_to(root).as_posix())
    modules = [*(root / "kvstack").rglob("*.py"), *(root / "plugins").glob("*/kvstack_*.py")]
    modules += (root / "plugins").glob("*/kvstack_*/**/*.py")
    for module in sorted(modules):
        found += check_module(module.read_text(encoding="utf-8"), rules, module.relative_to(root).as_posix())
    return found


def main() -> int:
    found = check_project(HERE.parent, read_rules(LIST.read_text(encoding="utf-8")))
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
