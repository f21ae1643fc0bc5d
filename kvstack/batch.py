"""The rows of a batch, and what is held for them.

Rows that are padded at different places are held apart, as cohorts without any padding. So a padded row goes through
exactly the arithmetic it would go through alone, wherever its padding is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .binding import Binding
from .columns import Columns
from .errors import UseError
from .lazy import refusing_gradient
from .rereading import Text, not_seen
from .store.given import Given
from .store.split import SplitStore
from .store.store import Store
from .store.tracks import putting_back
from .text_hash import TextHash
from .types import KV
from .workspace import Workspace

__all__ = ["Batch", "Cohort"]


@dataclass
class Cohort:
    """Rows of the batch whose tokens stand in the same columns.

    Attributes:
        rows: their numbers in the batch; None: all of them.
        seen: tokens the model saw, padding left out.
        columns: where they stand in the batch.
        new: tokens of the running forward.
        places: which of the running forward's columns they are; None: all of them.
        unsettled: tokens since the last settling.
        given: the positions that the model was given for them.
        stores: one for each group of layers.
    """

    rows: Tensor | None
    stores: list[Store | SplitStore]
    seen: int = 0
    columns: Columns = field(default_factory=Columns)
    new: int = 0
    places: Tensor | None = None
    unsettled: int = 0
    given: Given = field(default_factory=Given)

    def __post_init__(self) -> None:
        for store in self.stores:
            store.given = self.given

    @property
    def pieces(self) -> list[Store]:
        """The stores of heads that hold equally many tokens, of all groups."""
        return [piece for store in self.stores for _, piece in store.pieces]

    def its(self, x: Tensor) -> Tensor:
        """This cohort's rows and new tokens of `x` (B, heads, new, ...)."""
        x = x if self.rows is None else x.index_select(0, self.rows.to(x.device))
        return x if self.places is None else x.index_select(2, self.places.to(x.device))

    def picked(self, rows: Tensor | None, local: Tensor) -> Cohort:
        """The cohort of those of our own rows that `local` names, now numbered `rows` in the batch."""
        stores = [store.rows(local) for store in self.stores]
        given = self.given.rows(local)
        return Cohort(rows, stores, self.seen, self.columns, self.new, self.places, self.unsettled, given)

    def fork(self) -> Cohort:
        """The same rows, in the same memory as long as neither changes it."""
        stores = [store.fork() for store in self.stores]
        given = self.given.fork()
        return Cohort(self.rows, stores, self.seen, self.columns, self.new, self.places, self.unsettled, given)

    @property
    def held(self) -> int:
        """Tokens held in every layer and head.

        Raises:
            UseError: some hold more than others.
        """
        held = {store.held for store in self.stores}
        if len(held) > 1:
            raise UseError(
                f"layers of this cache hold {sorted(held)} tokens, so a new token has no one place in all of them. Use "
                'Evict(..., positions="text").'
            )
        return held.pop() if held else 0

    @property
    def dirty(self) -> bool:
        """Return True if tokens of a forward are not settled yet."""
        return any(store.dirty for store in self.stores)


class Batch:
    """All rows that a stack serves, in cohorts.

    Attributes:
        size: rows; None before the first forward.
        columns: layer -> tokens fed through it, padding included.
        shapes: layer -> (numbers, bytes of a number) that a dense cache would hold for a token and row.
        running: a forward has begun, and has not ended for all layers.
        stopped: the change that an error or an interrupt stopped, so that layers may hold different tokens; None: none.
        writes: the number of times that forwards have changed a layer, those included that transformers caches.
        attached: gradients could be asked for in a forward that has ended.
        recording: tokens may still be taken back (assisted decoding), so compressing waits for `crop`.
        unread: the tokens of the last forward are read a second time before they are compressed.
        text: what that forward was given.
        reading: the second reading runs; its tokens are taken back.
        ids: what was read.
        fed: the ids (rows, new) of the forward that is about to begin; None: not known.
    """

    def __init__(self, binding: Binding, work: Workspace) -> None:
        self.binding, self.work = binding, work
        self.cohorts = [Cohort(None, binding.stores())]
        self.columns = dict.fromkeys(binding.places, 0)
        self.shapes: dict[int, tuple[int, int]] = {}
        self.size: int | None = None
        self.running = False
        self.stopped: str | None = None
        self.writes = 0
        self.recording = False
        self.attached = False
        self.unread = self.reading = False
        self.text: Text | None = None
        self.ids = TextHash()
        self.fed: Tensor | None = None
        self._uncropped = 0  # forwards since the last crop
        self._settling = False  # some groups may be settled, and others not yet

    # ---- lengths

    @property
    def seen(self) -> int:
        return min(self.columns.values(), default=0)

    @property
    def held(self) -> int:
        """Tokens held in each compressed layer and kv head, as a mean over these (the most of any row)."""
        each = [[store.mean_held for store in cohort.stores for _ in store.layers] for cohort in self.cohorts]
        return max((round(sum(held) / len(held)) for held in each if held), default=0)

    @property
    def is_even(self) -> bool:
        """Return True if all rows and heads of each layer hold equally many tokens."""
        of_layers = zip(*(cohort.stores for cohort in self.cohorts), strict=True)
        return all(len({piece.held for store in stores for _, piece in store.pieces}) < 2 for stores in of_layers)

    @property
    def stores(self) -> list[Store]:
        """Those of heads that hold equally many tokens, of all rows and groups."""
        return [store for cohort in self.cohorts for store in cohort.pieces]

    def positions(self, layer: int, row: int, head: int | None = None) -> Tensor:
        """True positions of the tokens a layer holds for one row: (H or 1, held), of one `head` (1, held)."""
        self._check_stopped()
        cohort, local = self._cohort_of(row)
        store, _, here = self._store_of(cohort, layer, head)
        positions = store.positions(cohort.seen)
        positions = positions[local if positions.shape[0] > 1 else 0]
        return positions if here is None or len(positions) == 1 else positions[here : here + 1]

    def read(self, layer: int, row: int, head: int | None = None) -> KV:
        """Tokens that a layer holds for one row, decoded: (1, H, held, D) in the order of `positions`, of one `head`
        (1, 1, held, D)."""
        self._check_stopped()
        cohort, local = self._cohort_of(row)
        store, slot, here = self._store_of(cohort, layer, head)
        heads = slice(None) if here is None else slice(here, here + 1)
        if not store.held:  # nothing but padding so far
            return KV(*(self._like(layer, kind)[:1, heads, :0].clone() for kind in ("keys", "values")))
        kv = store.read(slot, cohort.seen, Workspace())
        store.end_forward()
        rows = [x[local : local + 1, heads].clone() for x in (kv.keys, kv.values)]
        if self.attached and torch.is_grad_enabled():
            why = "a KVStack keeps no gradients of the forwards that filled it. Use a DynamicCache for them."
            rows = [refusing_gradient(x, why) for x in rows]
        return KV(*rows)

    def _store_of(self, cohort: Cohort, layer: int, head: int | None) -> tuple[Store | SplitStore, int, int | None]:
        """The store of a layer and its slot there; of a head its store, its slot, and the head's place there."""
        group, slot = self.binding.places[layer]
        store = cohort.stores[group]
        if head is None:
            return store, slot, None
        heads = self._like(layer, "keys").shape[1]
        if not 0 <= head < heads:
            raise UseError(f"layer {layer} of this cache has no kv head {head}: it has {heads}, from 0 on.")
        if isinstance(store, Store):
            return store, slot, head
        piece, here = store.piece_of(head)
        return piece, slot, here

    def shape_of(self, layer: int, kind: str) -> tuple[tuple[int, int, int, int], Tensor]:
        """The shape (B, H, held, D) of the `keys` or `values` of a layer, and a tensor of their type."""
        group, _ = self.binding.places[layer]
        like, held = self._like(layer, kind), max(cohort.stores[group].held for cohort in self.cohorts)
        return (self.size or 0, like.shape[1], held, like.shape[3]), like

    def _like(self, layer: int, kind: str) -> Tensor:
        """Some `keys` or `values` (rows, H, n, D) of a layer, for their type and shape."""
        group, slot = self.binding.places[layer]
        # in the middle of a forward the layers of a group have not all got their first tokens
        samples = (cohort.stores[group].sample(slot) for cohort in self.cohorts)
        sample = next((kv for kv in samples if kv is not None), None)
        if sample is None:
            raise UseError(f"layer {layer} of this cache holds nothing yet but padding, which is left out.")
        like: Tensor = getattr(sample, kind)
        return like

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
                grown = stores[i]
                if store.layers == grown.layers:
                    stores[i] = store
                else:  # a layer more in its group; heads are held apart only for a model
                    assert isinstance(store, Store)
                    assert isinstance(grown, Store)
                    grown.take_over(store)
                stores[i].given = cohort.given
            cohort.stores = stores

    def check_complete(self) -> None:
        """Refuse to go on from a forward, or a change of all layers, that an exception has stopped.

        Raises:
            UseError: some layers hold its tokens, and others may not.
        """
        what = self.stopped or ("the last forward" if self.running else None)
        if what is not None:
            raise UseError(
                f"{what} of this cache did not end: an error or an interrupt stopped it, and its layers may hold "
                "different tokens. Call reset() and read the text again."
            )

    def _check_stopped(self) -> None:
        """As `check_complete`, for what may be asked in the middle of a forward."""
        if self.stopped is not None:
            self.check_complete()

    def undo(self) -> Callable[[], None]:
        """Return the function that makes this hold again what it holds now, until tokens come."""
        each = [store.undo() for store in self.stores]
        each += [putting_back(cohort.given) for cohort in self.cohorts]
        each += [putting_back(cohort) for cohort in self.cohorts]
        each.append(putting_back(self))

        def undo() -> None:
            for put_back in each:
                put_back()

        return undo

    def begin(self, rows: int, new: int, real: Tensor | None) -> None:
        """A forward of `new` tokens begins, of which those that are `real` (B or 1, new) are held; None: all."""
        self.size = rows
        if not self.reading:
            self._uncropped += 1
            self.unread = self.rereads(new)
            self.text = self.text if self.unread else None
            self.ids, self.fed = self.ids.grown(self.fed, rows, new, self.recording), None
        for cohort in self.cohorts:
            cohort.new, cohort.places = new, None
            if not cohort.dirty:
                cohort.unsettled = 0
        if real is not None:
            self._split(real.expand(rows, new))
        start = max(self.columns.values(), default=0)
        for cohort in self.cohorts:
            places = None if cohort.places is None else cohort.places.tolist()
            cohort.columns = cohort.columns.grown(cohort.seen, start, places, new)
            cohort.seen += cohort.new
            cohort.unsettled += cohort.new

    def rereads(self, new: int) -> bool:
        """Return True if the next forward, of `new` tokens, is read a second time: a prompt or a later turn. Assisted
        decoding feeds guesses after the prompt, which count as decoded tokens."""
        return self.binding.plan.rereads and new > 1 and not (self.recording and self.seen)

    def check_text(self, rows: int, new: int) -> None:
        """Refuse a forward that would have to be read a second time, and cannot be.

        Raises:
            UseError: its tokens are not known.
        """
        known = self.text is not None and self.text.tokens.shape[:2] == (rows, new)
        # in the forward that binds a stack, the model may tell them at the end
        if self.rereads(new) and not known and (self.text is not None or self.size is not None):
            raise UseError(not_seen(repr(self.binding.plan.select)))

    @property
    def waits(self) -> bool:
        """Return True if the last forward goes on with a second reading."""
        return self.reading or (self.unread and not self.recording)

    def places(self, rows: int, new: int, real: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Places inside the cache (rows, new) of the next `new` tokens, behind those that are held, and their indices
        in the text of each row. Those of tokens that are not `real` (B or 1, new) mean nothing."""
        real = torch.ones(1, new, dtype=torch.bool) if real is None else real
        counted = real.to(like.device).expand(rows, new).long().cumsum(-1) - 1
        held, seen = (torch.zeros(rows, 1, dtype=torch.long) for _ in range(2))
        for cohort in self.cohorts:
            mine = slice(None) if cohort.rows is None else cohort.rows.cpu()
            held[mine], seen[mine] = cohort.held, cohort.seen
        place, index = ((x.to(like.device) + counted).clamp_min(0) for x in (held, seen))
        return place, index

    def place(self, positions: Tensor) -> None:
        """The new tokens of the forward that has just begun were given `positions` (B, axes, new)."""
        for cohort in self.cohorts:
            if cohort.new:
                cohort.given.append(cohort.its(positions), cohort.seen - cohort.new)

    @torch.inference_mode(False)  # what is made here is used in forwards with gradients, too
    def _split(self, real: Tensor) -> None:
        """Part the cohorts so that rows whose real new tokens stand in the same columns are together."""
        parted = []
        for cohort in self.cohorts:
            rows = torch.arange(len(real), device=real.device) if cohort.rows is None else cohort.rows.to(real.device)
            patterns, which = real[rows].unique(dim=0, return_inverse=True)
            for number, pattern in enumerate(patterns):
                local = (which == number).nonzero().flatten()
                part = cohort if len(patterns) == 1 else cohort.picked(rows[local], local)
                part.places = None if bool(pattern.all()) else pattern.nonzero().flatten()
                part.new = int(pattern.sum())
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

    def complete(self, group: int, scaling: Mapping[int, float]) -> None:
        """All layers that read a group have run: compress it, unless its tokens may be taken back, and drop what was
        decoded or fetched for it."""
        if not (self.recording or self.unread):
            self.settle(group, scaling)
        for cohort in self.cohorts:
            cohort.stores[group].close()

    def catch_up(self, scaling: Mapping[int, float]) -> None:
        """Compress what an earlier forward left: its tokens had to be verified first, or no hook said it ended. Whoever
        goes on has accepted them."""
        if self.unread:
            raise UseError(not_seen(repr(self.binding.plan.select)))
        if self._uncropped > 1:
            self.recording = False  # assisted decoding crops after every forward, but maybe the prompt's: it has ended
        self._settle_all(scaling)
        self.work.clear()

    def _settle_all(self, scaling: Mapping[int, float]) -> None:
        self._settling = True  # each group is settled or not: where this is stopped, the next time goes on
        for group in range(len(self.binding.groups)):
            self.settle(group, scaling)
        self._settling = False

    def end_forward(self) -> None:
        """Drop what was needed for one forward only."""
        self.work.clear()
        for cohort in self.cohorts:
            cohort.places = None
        for store in self.stores:
            store.end_forward()

    def record(self) -> None:
        """From now on tokens may be taken back by `crop` before they are compressed."""
        self.recording, self._uncropped = True, 0

    @torch.no_grad()
    def crop(self, remove: int, scaling: Mapping[int, float]) -> None:
        """Forget the newest `remove` tokens."""
        if self._settling:  # it was stopped, and all groups must hold equally many tokens
            self._settle_all(scaling)
        limit = self.seen - remove
        for cohort in self.cohorts if remove else ():
            gone = cohort.seen - cohort.columns.before(limit, cohort.seen)
            if not gone:
                continue
            plan, pieces = self.binding.plan, cohort.pieces
            older = [store.older_than(cohort.seen - gone, cohort.seen) for store in pieces]
            stays = [min(each) for each in zip(*plan.heads.gathered(older), strict=True)]
            if plan.budgets is None:  # all layers and heads go on holding equally many
                stays = [min(stays)] * len(stays)
            for store, stay in zip(pieces, stays, strict=True):
                store.crop(cohort.seen, gone, stay)
            cohort.seen -= gone
            cohort.columns = cohort.columns.first(cohort.seen)
            cohort.given.crop(cohort.seen)
            cohort.unsettled = max(0, cohort.unsettled - gone)
        self.columns = {layer: seen - remove for layer, seen in self.columns.items()}
        self.ids = self.ids.cropped(limit)
        self._uncropped = 0
        if self.text is not None:
            self.text = self.text.without(remove)
            self.unread = self.unread and self.text is not None

    @torch.no_grad()
    def cropped(self, scaling: Mapping[int, float]) -> None:
        """Compress what waited for a crop."""
        if self.recording and not self.unread:
            self._settle_all(scaling)

    # ---- a second reading

    def take_back(self, width: int) -> None:
        """Forget the newest `width` columns, which were read a second time."""
        for cohort in self.cohorts:
            for store in cohort.pieces:
                store.take_back(cohort.seen, cohort.new)
            cohort.seen -= cohort.new
            cohort.unsettled -= cohort.new
            cohort.columns = cohort.columns.first(cohort.seen)
            cohort.given.crop(cohort.seen)
        self.columns = {layer: seen - width for layer, seen in self.columns.items()}

    @torch.no_grad()
    def end_reading(self, scaling: Mapping[int, float]) -> None:
        """All was read a second time: compress it."""
        self.unread, self.text = False, None
        self._settle_all(scaling)
        for store in self.stores:
            store.drop_reserve()
        self.end_forward()
        self.running = False

    # ---- rows

    @torch.inference_mode(False)
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
        self.cohorts, self.ids = chosen, self.ids.rows(indices)
        self.size = indices.numel()

    @torch.inference_mode(False)
    def copy(self, work: Workspace) -> Batch:
        """An independent copy."""
        everything = torch.arange(self.size or 0)
        return self._with(
            work,
            lambda cohort: cohort.picked(
                cohort.rows, everything if cohort.rows is None else torch.arange(len(cohort.rows))
            ),
        )

    def fork(self, work: Workspace) -> Batch:
        """The same rows, in the same memory as long as neither changes it."""
        return self._with(work, Cohort.fork)

    def _with(self, work: Workspace, change: Callable[[Cohort], Cohort]) -> Batch:
        """A batch like this one, of changed cohorts."""
        self.check_complete()
        other = Batch(self.binding, work)
        other.cohorts = [change(cohort) for cohort in self.cohorts]
        other.columns, other.shapes, other.size = dict(self.columns), dict(self.shapes), self.size
        other.recording, other._uncropped = self.recording, self._uncropped
        other.attached, other.ids = self.attached, self.ids
        other.unread, other.text, other._settling = self.unread, self.text, self._settling
        return other
