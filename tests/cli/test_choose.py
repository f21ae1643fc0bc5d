"""`kvstack choose`: a table, and lines that make the best stack."""

from __future__ import annotations

import re

import kvstack
from tests.cli.test_commands import failed, invoke

TINY = ("choose", "--tiny", "--threads", "1", "--context", "400", "--score", "31", "--steps", "2")


def test_the_lines_make_the_stack():
    done = invoke(*TINY, "--bytes", "0.2")
    assert done.exit_code == 0, done.output
    *_, measured, spec, _, imports, code = done.stdout.splitlines()
    assert re.match(
        r"# 1\d\.\d% of the bytes, KL \S+, top-1 \S+%, \d+\.\d\dx the decoding speed of a dense cache", measured
    )
    names: dict[str, object] = {}
    exec(imports, names)
    assert repr(eval(spec, dict(names))) == repr(eval(code, names)) == code
    assert isinstance(names["KVStack"], type(kvstack.KVStack))
    row = next(line for line in done.stdout.splitlines() if code and spec.split('"')[1] in line)
    assert row.startswith("│")


def test_a_drift_that_no_stack_has():
    line = failed_after_the_table(*TINY, "--bytes", "0.2", "--max-kl", "0.000001")
    assert re.match(
        r"error: no stack has a KL of 1e-06 or less; the least is \S+, of commonkv\S+. Use a larger --bytes", line
    )


def failed_after_the_table(*arguments: str) -> str:
    done = invoke(*arguments)
    assert done.exit_code == 2
    return next(line for line in done.stderr.splitlines() if line.startswith("error"))


def test_a_budget_that_no_stack_meets():
    assert "no stack holds 0.001 of a dense cache's bytes" in failed(*TINY, "--bytes", "0.001")
