"""The commands of `kvstack bench`, run on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.testing import CliRunner

from kvstack.cli.bench import bench_app


def invoke(*arguments: object) -> str:
    # one thread: two that wait for each other on a busy machine cost more than the arithmetic
    done = CliRunner().invoke(bench_app, [*map(str, arguments), "--tiny", "--threads", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def by_cache(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["cache"]: row for row in rows}
