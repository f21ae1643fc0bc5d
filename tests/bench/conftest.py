"""What the tests of the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstack.bench import results
from tests.bench.commands import invoke


@pytest.fixture
def bench(tmp_path: Path):
    def run(command: str, *options: str, stacks: tuple[str, ...] = (), file: str | None = None):
        """The records of one benchmark, key and figures together."""
        invoke(command, "--out", tmp_path, *(f"--stack={spec}" for spec in stacks), *options)
        return results.load(tmp_path, file or command).rows

    return run
