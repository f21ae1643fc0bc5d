"""Everything that is held along with tokens: a `Track` is something that goes where the tokens go.

    track            one for                     aligned with
    RawTokens        every layer                 raw tokens:  sinks | middle | window and new
    Positions        all layers of a store       sealed tokens, then raw middle ones; nothing before the first eviction
    Memory           every layer                 all held tokens
    Queries          every layer                 the newest tokens the model saw
    Bias             every layer, where tokens are refitted: sealed tokens, then raw middle ones
    References       every layer, where tokens are refitted: some tokens of the running forward
    sealed.Sealed    what is stored together     sealed tokens

The store moves tokens in five ways, and does each by asking all of its tracks: `take` (eviction), `crop` (the newest
are taken back), `rows` (other rows of the batch), `fork` (a second owner), and `state` with `restore` (to disk and
back).

A tensor that a track holds is replaced, and never written to: so forks can share it. Only a `Buffer` is written to, and
knows whether it is shared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..checks import FLOATS, Get, entries, items, misfit
from ..floats import saturated
from ..packed import storage_bytes
from ..types import KV, take_tokens
from .raw import Buffer
from .refit import STEP

__all__ = ["Bias", "Crop", "Cut", "Memory", "Positions", "Queries", "RawTokens", "References", "Track", "putting_back"]

Put = Callable[[Tensor | None], Any]
"""Writes a tensor and gives back what stands for it in a description."""

REFERENCES = 384
"""Queries of a forward that are asked what tokens which stay must become."""

RECENT_QUERIES = 8
"""Queries remembered while decoding, for scores that look at queries. A query costs as much as several tokens of
the cache on grouped-query models, so they are few, and none are held before the first new token."""


@dataclass(frozen=True)
class Cut:
    """An eviction: which of the middle tokens (those between sinks and window) stay.

        [ sinks | sealed tokens | raw middle | window + new ]     held tokens, in the order of their positions
                 '--- granules --'--- raw ---'                    indices of those that stay

    Attributes:
        sinks, sealed, middle: how many tokens of each there were.
        granule: sealed tokens that go together.
        granules: (B, H or 1, n) of the sealed granules; raw: (B, H or 1, n) of the raw middle tokens. Ascending, they
            broadcast over rows and heads.
        positions: (B or 1, H or 1, sealed + middle) true positions of the middle tokens.
    """

    sinks: int
    sealed: int
    middle: int
    granule: int
    granules: Tensor
    raw: Tensor
    positions: Tensor

    @cached_property
    def stay(self) -> Tensor:
        """(B, H or 1, n) indices among all middle tokens."""
        steps = torch.arange(self.granule, device=self.raw.device)
        packed = (self.granules.unsqueeze(-1) * self.granule + steps).flatten(-2)
        return torch.cat([packed, self.raw + self.sealed], dim=-1)


@dataclass(frozen=True)
class Crop:
    """The newest tokens are taken back.

    Attributes:
        remove: how many of the tokens that the model saw.
        seen: how many it has seen then.
        sinks: sinks that are left.
        stay: held tokens that are left in addition to the sinks, in every layer and head.
        whole: sealed tokens that stay sealed, whole granules.
        thawed: by layer, what must become raw again of a granule that the crop cuts through; empty: nothing.
        loose: raw tokens that are left in addition to the sinks, where nothing is thawed.
    """

    remove: int
    seen: int
    sinks: int
    stay: int
    whole: int
    loose: int
    thawed: tuple[KV, ...] = ()


class Track(ABC):
    """Something that is held along with tokens."""

    @abstractmethod
    def take(self, cut: Cut) -> None:
        """Keep what an eviction leaves."""

    @abstractmethod
    def crop(self, crop: Crop) -> None:
        """Forget the newest tokens."""

    @abstractmethod
    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same, with `change` made to each tensor (rows, ...) that is held."""

    def rows(self, index: Tensor) -> Self:
        """The same for the batch rows at `index` (n,); nothing is shared with this one."""
        return self.mapped(lambda x: rows_of(x, index))

    def fork(self) -> Self:
        """The same, in the same memory; neither sees what becomes of the other."""
        return self.mapped(lambda x: x)

    def undo(self) -> Callable[[], None]:
        """Return the function that makes this hold again what it holds now."""
        return putting_back(self)

    @abstractmethod
    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that is held."""

    @abstractmethod
    def state(self, put: Put) -> Any:
        """A description for a file, with tensors handed to `put`."""

    @abstractmethod
    def restore(self, state: Any, get: Get) -> None:
        """Hold what `state` described. It comes from a file: a track checks what is its own.

        Raises:
            UseError: something is missing, or does not fit.
        """


def putting_back(held: object) -> Callable[[], None]:
    """Return the function that gives an object the attributes again that it has now. Tensors are replaced, and never
    written to, so nothing is copied but names, dicts and lists."""
    now = vars(held)
    before = {name: x.copy() if isinstance(x, dict | list) else x for name, x in now.items()}
    return lambda: now.update(before)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index.to(x.device))


class RawTokens(Track):
    """Uncompressed keys and values of one layer, and hidden states where a codec wants them."""

    def __init__(self, slot: int, hidden: bool) -> None:
        self.slot = slot
        self.buffers = tuple(Buffer() for _ in range(3 if hidden else 2))

    @property
    def length(self) -> int:
        return self.buffers[0].length

    @property
    def kv(self) -> KV:
        """All raw tokens: views, valid until the next change."""
        return KV(*(buffer.view for buffer in self.buffers))

    @property
    def width(self) -> int:
        """Channels of a key."""
        return self.buffers[0].width

    @property
    def device(self) -> torch.device:
        return self.buffers[0].device

    def append(self, kv: KV) -> None:
        new = [x for x in (kv.keys, kv.values, kv.hidden) if x is not None]
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer.append(x)

    def draw(self, sinks: int, count: int) -> KV:
        """Take out the oldest `count` tokens behind the sinks."""
        drawn = []
        for buffer in self.buffers:
            x = buffer.view
            drawn.append(x[:, :, sinks : sinks + count])
            buffer.replace(torch.cat([x[:, :, :sinks], x[:, :, sinks + count :]], dim=2))
        return KV(*drawn)

    def take(self, cut: Cut) -> None:
        first, last = cut.sinks, cut.sinks + cut.middle
        for buffer in self.buffers:
            x = buffer.view
            middle = take_tokens(x[:, :, first:last], cut.raw)
            buffer.replace(torch.cat([x[:, :, :first], middle, x[:, :, last:]], dim=2))

    def revalue(self, first: int, values: Tensor) -> None:
        """Other values (B, H, n, D) for the tokens from `first` on, in the type of the old ones: attention takes no
        other, and they only come near to what is wanted."""
        buffer, n = self.buffers[1], values.shape[2]
        x = buffer.view
        buffer.replace(torch.cat([x[:, :, :first], saturated(values, x.dtype), x[:, :, first + n :]], dim=2))

    def crop(self, crop: Crop) -> None:
        if not crop.thawed:
            for buffer in self.buffers:
                buffer.truncate(crop.sinks + crop.loose)
            return
        keys, values, *_ = self.buffers
        thawed = crop.thawed[self.slot]
        keys.replace(torch.cat([keys.view[:, :, : crop.sinks], thawed.keys], dim=2))
        values.replace(torch.cat([values.view[:, :, : crop.sinks], thawed.values], dim=2))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> RawTokens:
        other = RawTokens(self.slot, len(self.buffers) > 2)
        for new, old in zip(other.buffers, self.buffers, strict=True):
            if old.tensors:
                new.replace(change(old.view))
        return other

    def undo(self) -> Callable[[], None]:
        each = [putting_back(buffer) for buffer in self.buffers]

        def undo() -> None:
            for put_back in each:
                put_back()

        return undo

    def fork(self) -> RawTokens:
        other = RawTokens(self.slot, len(self.buffers) > 2)
        other.buffers = tuple(buffer.fork() for buffer in self.buffers)
        return other

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for buffer in self.buffers:
            for x in buffer.tensors:
                yield "raw", x

    def spent(self, sinks: int, window: int) -> Iterator[tuple[str, int]]:
        """Bytes that go into sinks, window, the tail between them, and reserve."""
        for buffer in self.buffers:
            token = buffer.view[:, :, :1].numel() * buffer.view.element_size() if buffer.length else 0
            newest = min(window, buffer.length - sinks)
            for name, n in (("sinks", sinks), ("window", newest), ("tail", buffer.length - sinks - newest)):
                yield name, n * token
            yield "reserve", storage_bytes(buffer.tensors) - buffer.length * token

    def state(self, put: Put) -> Any:
        return [put(buffer.view) if buffer.tensors else None for buffer in self.buffers]

    def restore(self, state: Any, get: Get) -> None:
        names = items(state, get.where("raw tokens"), len(self.buffers))
        if not get.seen and not any(names):
            return
        (layout,) = get.layouts
        tokens: int | None = None
        for buffer, name, (what, heads, width, dtypes) in zip(
            self.buffers,
            names,
            (
                ("keys", layout.heads, layout.key_width, [layout.key_dtype]),
                ("values", layout.heads, layout.value_width, [layout.value_dtype]),
                ("hidden states", 1, layout.hidden, FLOATS),
            ),
            strict=False,  # most stacks hold no hidden states
        ):
            x = get(name, f"raw {what}", (get.rows, heads, tokens, width), *dtypes)
            buffer.replace(x)
            tokens = x.shape[2]


class Positions(Track):
    """True positions of tokens, once something was evicted. What they do not reach is the newest, without holes."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None  # (B, H or 1, sealed + chosen raw), int32

    def take(self, cut: Cut) -> None:
        expanded = cut.positions.expand(*cut.stay.shape[:2], -1)
        kept = expanded.gather(-1, cut.stay).to(torch.int32)
        # after a crop that went deeper than the window, raw tokens behind the middle have holes between them too
        behind = [] if self.kept is None else [self.kept[..., cut.sealed + cut.middle :]]
        self.kept = torch.cat([kept, *behind], dim=-1)

    def crop(self, crop: Crop) -> None:
        if self.kept is not None:
            self.kept = self.kept[..., : min(self.kept.shape[-1], crop.stay)].clone()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Positions:
        other = Positions()
        other.kept = None if self.kept is None else change(self.kept)
        return other

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        if self.kept is not None:
            yield "positions", self.kept

    def state(self, put: Put) -> Any:
        return put(self.kept)

    def restore(self, state: Any, get: Get) -> None:
        shape = (get.rows, None, None)
        self.kept = None if state is None else get(state, "positions", shape, torch.int32)


class Bias(Track):
    """Biases, added to the logits of tokens of one layer that stand for dropped ones: (B, H, sealed + chosen raw)
    int8, in steps of `STEP` nats; the tokens behind them have none."""

    def __init__(self) -> None:
        self.steps: Tensor | None = None

    def of(self, sinks: int, held: int) -> Tensor | None:
        """(B, H, held) nats for all held tokens; None: none has any."""
        if self.steps is None:
            return None
        nats = self.steps.float() * STEP
        return torch.nn.functional.pad(nats, (sinks, held - sinks - nats.shape[2]))

    def stand_in(self, steps: Tensor) -> None:
        """Other steps (B, H, n) for the oldest tokens."""
        behind = [] if self.steps is None else [self.steps[:, :, steps.shape[2] :]]
        self.steps = torch.cat([steps, *behind], dim=2)

    def take(self, cut: Cut) -> None:
        if self.steps is None:
            return
        width = cut.sealed + cut.middle
        middle = torch.nn.functional.pad(self.steps, (0, max(0, width - self.steps.shape[2])))
        self.steps = torch.cat([take_tokens(middle[:, :, :width], cut.stay), middle[:, :, width:]], dim=2)

    def crop(self, crop: Crop) -> None:
        if self.steps is not None:
            # with every token there, none stands in for another
            whole = crop.sinks + crop.stay == crop.seen
            self.steps = None if whole else self.steps[:, :, : crop.stay].clone()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Bias:
        other = Bias()
        other.steps = None if self.steps is None else change(self.steps)
        return other

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        if self.steps is not None:
            yield "biases", self.steps

    def state(self, put: Put) -> Any:
        return put(self.steps)

    def restore(self, state: Any, get: Get) -> None:
        (layout,) = get.layouts
        shape = (get.rows, layout.heads, None)
        self.steps = None if state is None else get(state, "biases", shape, torch.int8)


class References(Track):
    """Queries of some tokens of the running forward of one layer, evenly spaced: what later ones may ask. They are
    asked when the forward is settled, and go with it. What is taken back before leaves no trace."""

    def __init__(self) -> None:
        self.queries: Tensor | None = None  # (B, H*G, n, D), every `stride`-th
        self.first = self.count = 0  # tokens before the forward, and of it
        self.stride = 1

    def add(self, queries: Tensor, seen: int, guesses: int) -> None:
        """The queries (B, H*G, Q, D) of the newest of `seen` tokens, of which the last `guesses` may be taken back."""
        self.count = queries.shape[2]
        self.first, self.stride = seen - self.count, _stride(max(1, self.count - guesses))
        self.queries = queries.detach()[:, :, :: self.stride].clone()

    def asked(self) -> tuple[Tensor, Tensor] | None:
        """Queries, and the indices of their tokens (n,); None where there was no forward of several tokens."""
        if self.queries is None:
            return None
        stride = _stride(self.count)
        at = torch.arange(self.first, self.first + self.count, stride)
        return self.queries[:, :, :: stride // self.stride], at

    def forget(self) -> None:
        self.queries = None

    def take(self, cut: Cut) -> None:
        """Queries are of no token that goes."""

    def crop(self, crop: Crop) -> None:
        self.count = crop.seen - self.first
        if self.queries is not None and self.count > 1:
            self.queries = self.queries[:, :, : -(-self.count // self.stride)].clone()
        else:
            self.forget()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> References:
        other = References()
        other.queries = None if self.queries is None else change(self.queries)
        other.first, other.count, other.stride = self.first, self.count, self.stride
        return other

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        if self.queries is not None:
            yield "reference queries", self.queries

    def state(self, put: Put) -> Any:
        return None

    def restore(self, state: Any, get: Get) -> None:
        if state is not None:
            raise misfit(f"{get.where('reference queries')} are never saved.")


def _stride(tokens: int) -> int:
    """The least power of two that leaves at most `REFERENCES` of so many tokens: fewer tokens have the same ones, and
    maybe some between."""
    return 1 << max(0, math.ceil(math.log2(tokens / REFERENCES)))


class Memory(Track):
    """The memory of a score for every token of one layer: named tensors (B, H, T), which may end before the newest
    tokens."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def grown(self, tokens: int) -> Mapping[str, Tensor]:
        """For `tokens` tokens: those that are not known yet start at zero."""
        return {name: torch.nn.functional.pad(x, (0, tokens - x.shape[2])) for name, x in self.tensors.items()}

    def take(self, cut: Cut) -> None:
        first, last = cut.sinks, cut.sinks + cut.sealed + cut.middle
        for name, known in self.tensors.items():
            x = torch.nn.functional.pad(known, (0, max(0, last - known.shape[2])))
            middle = take_tokens(x[:, :, first:last], cut.stay)
            self.tensors[name] = torch.cat([x[:, :, :first], middle, x[:, :, last:]], dim=2)

    def crop(self, crop: Crop) -> None:
        for name, x in self.tensors.items():
            self.tensors[name] = x[:, :, : crop.sinks + crop.stay].clone()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Memory:
        other = Memory()
        other.tensors = {name: change(x) for name, x in self.tensors.items()}
        return other

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()

    def state(self, put: Put) -> Any:
        return {name: put(x) for name, x in self.tensors.items()}

    def restore(self, state: Any, get: Get) -> None:
        (layout,) = get.layouts
        shape = (get.rows, layout.heads, None)
        known = entries(state, get.where("the memory of a score"), state)
        self.tensors = {name: get(key, f"memory {name!r}", shape) for name, key in known.items()}


class Queries(Track):
    """The newest queries of one layer, for scores that look at them.

    Those of the running forward are apart until it is settled, since some of its tokens may be taken back before. What
    is left of them decides: several tokens bring the queries that their settling looks at, and nothing stays; a
    single one joins those before it.
    """

    def __init__(self) -> None:
        self.before: Tensor | None = None  # (B, H*G, Q, D), of single tokens
        self.running: Tensor | None = None  # (B, H*G, Q, D), of the running forward
        self.tokens = 0  # of the running forward, as far as they are not taken back
        self.untracked = 0  # how many of the newest a score's memory has not seen

    def add(self, queries: Tensor, keep: int) -> None:
        """Remember the queries (B, H*G, Q, D) of a forward, the newest `keep` of them; -1: all."""
        self._join()
        self.tokens = queries.shape[2]
        self.untracked += self.tokens
        queries = queries.detach()
        # clone: a view would keep the queries of the whole prompt until the group is complete
        self.running = queries if keep < 0 else queries[:, :, -keep:].clone()

    def _join(self) -> None:
        """The running forward is over: a single token joins those before it, several replace them."""
        if self.running is None:
            return
        if self.tokens == 1:
            known = self.running if self.before is None else torch.cat([self.before, self.running], dim=2)
            self.before = known[:, :, -RECENT_QUERIES:].clone()
        else:
            self.before = None
        self.running, self.tokens = None, 0

    def newest(self, count: int) -> Tensor | None:
        """The queries that a score looks at: the newest `count` of a forward with several tokens (-1: all), or those
        of the last single tokens; None: none are known."""
        if self.tokens > 1 and self.running is not None:
            return self.running if count < 0 else self.running[:, :, -count:]
        self._join()
        return self.before

    def unseen(self) -> Tensor | None:
        """The queries that a score's memory has not seen."""
        newest = self.newest(-1)
        return newest[:, :, -self.untracked :] if self.untracked and newest is not None else None

    def settled(self, dropped: bool) -> None:
        """A forward was settled, and tokens were `dropped` or not."""
        self._join()
        if dropped:
            self.before = None
        self.untracked = 0

    def take(self, cut: Cut) -> None:
        """Queries are of no token that goes: an eviction leaves them to `settled`."""

    def crop(self, crop: Crop) -> None:
        self.untracked = max(0, self.untracked - crop.remove)
        running = min(crop.remove, self.tokens)
        self.tokens -= running
        self.running = _without(self.running, running) if self.tokens else None
        self.before = _without(self.before, crop.remove - running)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Queries:
        other = Queries()
        other.before = None if self.before is None else change(self.before)
        other.running = None if self.running is None else change(self.running)
        other.tokens, other.untracked = self.tokens, self.untracked
        return other

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("recent queries", x) for x in (self.before, self.running) if x is not None)

    def state(self, put: Put) -> Any:
        self._join()
        return put(self.before)

    def restore(self, state: Any, get: Get) -> None:
        if state is None:
            return
        (layout,) = get.layouts
        heads = layout.heads * layout.queries or None
        self.before = get(state, "recent queries", (get.rows, heads, None, layout.key_width), layout.key_dtype)
        count, heads = self.before.shape[2], self.before.shape[1]
        if not 1 <= count <= RECENT_QUERIES or heads % layout.heads:
            raise misfit(f"{get.where('recent queries')} are {count} of {heads} heads.")


def _without(x: Tensor | None, newest: int) -> Tensor | None:
    """`x` (B, H, Q, D) without its newest entries."""
    if x is None or not newest:
        return x
    left = x.shape[2] - newest
    return x[:, :, :left].clone() if left > 0 else None
