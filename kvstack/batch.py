"""The rows of a batch, and what is held for them.

Rows whose texts differ in length (left padding) are held apart, as cohorts of equal length without any padding. So a
padded row goes through exactly the arithmetic it would go through alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .binding import Binding
from .errors import UseError
from .store.given import Given
from .store.store import Store
from .types import KV
from .workspace import Workspace

__all__ = ["Batch", "Cohort"]


@dataclass
class Cohort:
    """Rows of the batch that have seen equally many tokens. `rows` is None where that is all of them."""

    rows: Tensor | None
    stores: list[Store]
    seen: int = 0
    new: int = 0  # tokens of the running forward
    unsettled: int = 0  # tokens since the last settling
    given: Given = field(default_factory=Given)  # positions that the model was given

    def __post_init__(self) -> None:
        for store in self.stores:
            store.given = self.given

    def its(self, x: Tensor) -> Tensor:
        """This cohort's rows and new tokens of `x` (B, heads, new, ...)."""
        x = x if self.rows is None else x.index_select(0, self.rows.to(x.device))
        return x if self.new == x.shape[2] else x[:, :, x.shape[2] - self.new :]

    def picked(self, rows: Tensor | None, local: Tensor) -> Cohort:
        """The cohort of those of our own rows that `local` names, now numbered `rows` in the batch."""
        stores = [store.rows(local) for store in self.stores]
        return Cohort(rows, stores, self.seen, self.new, self.unsettled, self.given.rows(local))

    @property
    def dirty(self) -> bool:
        """Whether tokens of a forward are not settled yet."""
        return any(store.dirty for store in self.stores)


class Batch:
    """All rows that a stack serves, in cohorts.

    Attributes:
        size: rows; None before the first forward.
        columns: layer -> tokens fed through it, padding included.
        shapes: layer -> (numbers, bytes of a number) that a dense cache would hold for a token and row.
        running: a forward has begun, and has not ended for all layers.
        recording: tokens may still be taken back (assisted decoding), so compressing waits for `crop`.
    """

    def __init__(self, binding: Binding, work: Workspace) -> None:
        self.binding, self.work = binding, work
        self.cohorts = [Cohort(None, binding.stores())]
        self.columns = dict.fromkeys(binding.places, 0)
        self.shapes: dict[int, tuple[int, int]] = {}
        self.size: int | None = None
        self.running = False
        self.recording = False
        self._uncropped = 0  # forwards since the last crop

    # ---- lengths

    @property
    def seen(self) -> int:
        return min(self.columns.values(), default=0)

    @property
    def held(self) -> int:
        """Tokens held in each compressed layer (the most of any row)."""
        return max((store.held for cohort in self.cohorts for store in cohort.stores[:1]), default=0)

    @property
    def stores(self) -> list[Store]:
        return [store for cohort in self.cohorts for store in cohort.stores]

    def positions(self, layer: int, row: int) -> Tensor:
        """True positions of the tokens a layer holds for one row: (H or 1, held)."""
        group, _ = self.binding.places[layer]
        cohort, local = self._cohort_of(row)
        positions = cohort.stores[group].positions(cohort.seen)
        return positions[local if positions.shape[0] > 1 else 0]

    def read(self, layer: int, row: int) -> KV:
        """What a layer holds for one row, decoded: (1, H, held, D) in the order of `positions`."""
        group, slot = self.binding.places[layer]
        cohort, local = self._cohort_of(row)
        store = cohort.stores[group]
        kv = store.read(slot, cohort.seen, Workspace())
        store.end_forward()
        return KV(kv.keys[local : local + 1].clone(), kv.values[local : local + 1].clone())

    def _cohort_of(self, row: int) -> tuple[Cohort, int]:
        for cohort in self.cohorts:
            rows = range(self.size or 0) if cohort.rows is None else cohort.rows.tolist()
            if row in rows:
                return cohort, list(rows).index(row)
        raise UseError(f"row {row} is not in this cache, which has {self.size or 0} rows.")

    # ---- a forward

    def grow(self, binding: Binding) -> None:
        """Serve the layers that a caller without a model has named meanwhile."""
        self.binding = binding
        self.columns = {layer: self.columns.get(layer, 0) for layer in binding.places}
        for cohort in self.cohorts:
            stores = binding.stores()
            for i, store in enumerate(cohort.stores):
                if store.layers == stores[i].layers:
                    stores[i] = store
                else:  # a layer more in its group
                    stores[i].take_over(store)
                stores[i].given = cohort.given
            cohort.stores = stores

    def check_complete(self) -> None:
        """Refuse to go on from a forward that an exception has stopped.

        Raises:
            UseError: some layers hold its tokens, and others do not.
        """
        if self.running:
            raise UseError(
                "the last forward of this cache did not end: an error or an interrupt stopped it, and its layers hold "
                "different tokens. Call reset() and read the text again."
            )

    def begin(self, rows: int, new: int) -> None:
        """A forward of `new` tokens begins; `split` parts the rows where some of these are padding."""
        self.size = rows
        for cohort in self.cohorts:
            cohort.new = new
            if not cohort.dirty:
                cohort.unsettled = 0

    def place(self, positions: Tensor) -> None:
        """The new tokens were given `positions` (B, axes, new); `count` comes after it."""
        for cohort in self.cohorts:
            if cohort.new:
                cohort.given.append(cohort.its(positions), cohort.seen)

    def count(self) -> None:
        """Count the new tokens, now that padding is known."""
        self._uncropped += 1
        for cohort in self.cohorts:
            cohort.seen += cohort.new
            cohort.unsettled += cohort.new

    def split(self, real: Tensor) -> None:
        """Part the cohorts so that rows with equally many real new tokens are together; `real` is (B, new) bool."""
        counts = real.sum(1)
        steps = torch.arange(real.shape[1], device=real.device)
        if not torch.equal(real, steps >= real.shape[1] - counts[:, None]):
            raise UseError(
                "padding must be on the left of the new tokens, and a row of this batch has it elsewhere. "
                "Use tokenizer.padding_side = 'left'."
            )
        parted = []
        for cohort in self.cohorts:
            rows = torch.arange(len(counts), device=counts.device) if cohort.rows is None else cohort.rows
            rows = rows.to(counts.device)
            mine = counts[rows]
            lengths = mine.unique().tolist()
            for length in lengths:
                local = (mine == length).nonzero().flatten()
                part = cohort if len(lengths) == 1 else cohort.picked(rows[local], local)
                part.new = int(length)
                parted.append(part)
        self.cohorts = parted

    # ---- compressing

    @torch.no_grad()
    def settle(self, group: int, scaling: Mapping[int, float]) -> None:
        """Compress what a forward left in a group of layers. `scaling`: what each layer multiplies q @ k with."""
        for cohort in self.cohorts:
            store = cohort.stores[group]
            if store.dirty:
                store.settle(cohort.seen, cohort.unsettled, [scaling.get(i, 1.0) for i in store.layers], self.work)

    def catch_up(self, scaling: Mapping[int, float]) -> None:
        """Compress what an earlier forward left: its tokens had to be verified first, or no hook said it ended. Whoever
        goes on has accepted them."""
        if self._uncropped > 1:
            self.recording = False  # assisted decoding crops after every forward, but maybe the prompt's: it has ended
        self._settle_all(scaling)
        self.work.clear()

    def _settle_all(self, scaling: Mapping[int, float]) -> None:
        for group in range(len(self.binding.groups)):
            self.settle(group, scaling)

    def end_forward(self) -> None:
        """Drop what was decoded for the layers of a forward."""
        self.work.clear()
        for store in self.stores:
            store.end_forward()

    def record(self) -> None:
        """From now on tokens may be taken back by `crop` before they are compressed."""
        self.recording, self._uncropped = True, 0

    @torch.no_grad()
    def crop(self, remove: int, scaling: Mapping[int, float]) -> None:
        """Forget the newest `remove` tokens; where compressing waited for this, compress now."""
        for cohort in self.cohorts if remove else ():
            if not cohort.seen:
                continue
            gone = min(remove, cohort.seen)
            # one count for all layers: one attention mask serves them all
            stay = min(store.older_than(cohort.seen - gone, cohort.seen) for store in cohort.stores)
            for store in cohort.stores:
                store.crop(cohort.seen, gone, stay)
            cohort.seen -= gone
            cohort.given.crop(cohort.seen)
            cohort.unsettled = max(0, cohort.unsettled - gone)
        self.columns = {layer: seen - remove for layer, seen in self.columns.items()}
        self._uncropped = 0
        if self.recording:
            self._settle_all(scaling)

    # ---- rows

    def select(self, indices: Tensor) -> None:
        """Only the rows at `indices` (n,), which may repeat; a boolean mask is welcome too."""
        if self.size is None:
            return
        every = torch.arange(self.size, device=indices.device)
        indices = every[indices]
        if torch.equal(indices, every):
            return
        chosen = []
        for cohort in self.cohorts:
            if cohort.rows is None:
                chosen.append(cohort.picked(None, indices))
                continue
            mine = cohort.rows.to(indices.device)
            where, local = (indices[:, None] == mine[None, :]).nonzero(as_tuple=True)
            if len(where):
                chosen.append(cohort.picked(where, local))
        self.cohorts = chosen
        self.size = indices.numel()

    def copy(self, work: Workspace) -> Batch:
        """An independent copy."""
        self.check_complete()
        other = Batch(self.binding, work)
        everything = torch.arange(self.size or 0)
        other.cohorts = [
            cohort.picked(cohort.rows, everything if cohort.rows is None else torch.arange(len(cohort.rows)))
            for cohort in self.cohorts
        ]
        other.columns, other.shapes, other.size = dict(self.columns), dict(self.shapes), self.size
        other.recording, other._uncropped = self.recording, self._uncropped
        return other
