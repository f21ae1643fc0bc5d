"""What every benchmark is told, and where its figures come from."""

from __future__ import annotations

from typer.testing import CliRunner

from kvstack.bench.measure.run import Run, environment
from kvstack.cli.bench import bench_app


def test_figures_say_where_they_come_from():
    where = environment(Run((), (), seed=3, threads=1), "some model")
    assert (where["model"], where["dtype"], where["threads"], where["seed"]) == ("some model", "float32", 1, 3)
    assert all(where[name] for name in ("hardware", "torch", "transformers", "kvstack", "code"))


def test_contexts_are_numbers():
    done = CliRunner().invoke(bench_app, ["decode", "--tiny", "--contexts", "4k"])
    assert done.exit_code == 2
    assert "2048,4096" in done.output
