"""The demo's question, asked of the default model."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kvstack.cli import demo
from kvstack.cli.commands import app

pytestmark = pytest.mark.real


def test_dense_and_stack_answer_the_question():
    done = CliRunner().invoke(app, ["demo", "--new-tokens", "16"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "WRONG" not in done.stdout
    dense, stack = done.stdout.split("dense cache answers", 1)[1].split(f"{demo.STACK} answers", 1)
    assert demo.ANSWER in dense
    assert demo.ANSWER in stack
