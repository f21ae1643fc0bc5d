"""The content of a stack, by stage and part, as a table or as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

__all__ = ["Part", "Report", "break_even"]


@dataclass(frozen=True)
class Part:
    """Bytes of one kind of tensor: who pays for it (a stage, or the stack itself) and what it is."""

    payer: str
    part: str
    nbytes: int


def break_even(model_nbytes: int, tokens: int, saved: float) -> int | None:
    """From how many tokens on, of all texts together, bytes that were fitted to the model are saved again, where
    `tokens` of them save `saved` bytes. 0 where nothing was fitted, None where nothing is saved."""
    if not model_nbytes:
        return 0
    return int(-(-model_nbytes * tokens // saved)) if saved > 0 else None


@dataclass(frozen=True)
class Report:
    """Bytes held by a stack. `print` it, `rich.print` it, or take `to_dict()`.

    `nbytes` may be less than the sum of its parts where they share storage.
    """

    stack: str
    seen: int
    held: int
    nbytes: int
    dense_nbytes: int
    parts: list[Part]
    model_nbytes: int = 0
    """Bytes that were fitted to the model: held once for all its caches, and not part of `nbytes`."""

    reads_with: list[str] = field(default_factory=list)
    """The readers that answer a single query from sealed tokens: `torch`, or a faster one. Empty if nothing is sealed,
    or everything is decoded."""

    devices: dict[str, int] = field(default_factory=dict)
    """Bytes on each device; they add up to `nbytes`."""
    rows: int = 1
    """Texts in the batch, each of which has seen `seen` tokens."""

    @property
    def compression(self) -> float:
        """Share of the dense bytes that is saved."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

    @property
    def break_even(self) -> int | None:
        """Tokens, of all texts and rows, that must be seen until `model_nbytes` are saved too, at the bytes that a
        token takes now. 0 if nothing was fitted to the model, None if nothing is saved."""
        return break_even(self.model_nbytes, self.seen * self.rows, self.dense_nbytes - self.nbytes)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "compression": self.compression, "break_even": self.break_even}

    def table(self) -> Table:
        caption = f"{self.held:,} of {self.seen:,} tokens held"
        if len(self.devices) > 1:
            places = (f"{nbytes / 2**20:,.1f} MiB on {device}" for device, nbytes in self.devices.items())
            caption += f"; {' and '.join(places)}"
        if self.model_nbytes:
            caption += f"; in addition {self.model_nbytes / 2**20:,.1f} MiB that all caches of the model share"
            if self.break_even is not None:
                caption += f": together less than a dense cache from {self.break_even:,} tokens on"
        if self.reads_with:
            caption += f"; read with {' and '.join(self.reads_with)}"
        table = Table(title=self.stack, caption=caption, title_justify="left")
        for name, justify in (("paid by", "left"), ("part", "left"), ("KiB", "right"), ("of dense", "right")):
            table.add_column(name, justify="right" if justify == "right" else "left")
        for part in sorted(self.parts, key=lambda p: (p.payer, -p.nbytes)):
            table.add_row(part.payer, part.part, f"{part.nbytes / 1024:,.1f}", self._share(part.nbytes))
        table.add_section()
        table.add_row("all", "", f"{self.nbytes / 1024:,.1f}", self._share(self.nbytes), style="bold")
        table.add_row("dense cache", "", f"{self.dense_nbytes / 1024:,.1f}", self._share(self.dense_nbytes))
        return table

    def _share(self, nbytes: int) -> str:
        return f"{nbytes / self.dense_nbytes:.2%}" if self.dense_nbytes else "-"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()
