"""The terminal: what is said goes to stdout, how far a run has come to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Steps", "console", "say", "steps", "working"]

QUIET = 30.0
"""Seconds between two lines of progress without a terminal."""


def console() -> Console:
    # 80 columns, rich's guess for a file or a pipe, would break the tables
    return Console(width=None if sys.stdout.isatty() else 170)


def say(text: str) -> None:
    """Print a line as it is."""
    console().print(text, highlight=False)


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
