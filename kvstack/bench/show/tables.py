"""Tables on stdout and progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Steps", "console", "mib", "share", "short", "steps", "table", "working"]

QUIET = 30.0
"""Seconds between two lines of progress where there is no terminal."""


def console() -> Console:
    # 80 columns, rich's guess for a file or a pipe, would break the tables
    return Console(width=None if sys.stdout.isatty() else 170)


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Says on stderr what takes so long."""
    with Console(stderr=True).status(doing):
        yield


class Steps:
    """Counts the steps of a long run."""

    def __init__(self, name: str, total: int, bar: Progress | None) -> None:
        self.name, self.total, self.done = name, total, 0
        self._bar, self._task = bar, bar.add_task(name, total=total) if bar else None
        self._started = self._said = time.monotonic()

    def skip(self, count: int = 1) -> None:
        """Steps that an earlier run has done: they say nothing of the time that is left."""
        self.total -= count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self.total)

    def step(self, doing: str) -> None:
        """One more step is done; `doing` says what it was."""
        self.done += 1
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=f"{self.name}: {doing}")
        elif now - self._said > QUIET:
            self._said = now
            left = (now - self._started) / self.done * (self.total - self.done)
            print(f"{self.name}: {self.done} of {self.total}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


@contextmanager
def steps(name: str, total: int) -> Iterator[Steps]:
    """A bar with the time left on a terminal; a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield Steps(name, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield Steps(name, total, bar)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table whose first column is text and whose others are numbers."""
    made = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*row)
    console().print(made)


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.2f}"


def share(x: float) -> str:
    """A share of bytes: 12.3 %, 2.14 %."""
    return f"{x:.2%}" if x < 0.1 else f"{x:.1%}"


def short(x: float) -> str:
    """A divergence in nats."""
    return f"{x:.2g}" if x < 0.1 else f"{x:.3f}"
