"""The tokens held for a group of layers that are handled together, and when tokens of it are evicted and sealed.

    [ sinks | sealed tokens | raw: middle not sealed yet | window + new ]
      raw     encoded,        raw                          raw
              dropped by
              whole granules

Keys and values take one way, from top to bottom:

    append     new tokens go behind the raw ones
    settle     the forward is over for all layers: score, choose, take (evict), then draw from the raw tokens and seal
    read       decoded sealed tokens between the raw ones, in the order of their positions
    attend     the answer to one query, without a decoded copy of all tokens

Without an encoder or transform nothing is sealed and the middle stays raw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import Get, items, misfit
from ..errors import UseError
from ..floats import saturated, wide
from ..heads import Heads
from ..packed import Packed
from ..select.attention import moved_behind
from ..stage import Codec
from ..types import KV, Context, Layout, Rotation, positions_between
from ..workspace import Workspace
from .budget import Choice, Profile, allowance, choose, how_many
from .given import Given, Numbered, Placed
from .plan import Plan
from .refit import Refitted, refitted
from .sealed import GroupLatents, LayerCodes, Sealed
from .tiered import TieredLatents
from .tracks import Bias, Crop, Cut, Memory, Positions, Put, Queries, RawTokens, References, Track

__all__ = ["Expand", "Store"]

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Makes keys and values (B, heads, T, D) of the two tensors that a layer caches in their place."""

GUESSES = 256
"""Tokens of a forward that assisted decoding may take back, as far as their queries are told apart: it guesses tens."""

AHEAD = 256
"""Positions behind a text that reference queries are spread over."""

QUERIES = ("recent", "references")
"""Tracks that hold queries of the text itself."""

SAMPLE = 32
"""Tokens that a score is shown to see what it remembers."""


class Store:
    """Tokens of `layers` (indices in the model) for a set of rows of equal length.

    Args:
        plan: what the stack does.
        layers: indices in the model.
        codecs: one for each run of layers that are stored together; empty without a transform.
        ropes: how each layer rotates keys.
        expansions: of layers that cache latents (multi-head latent attention), what makes keys and values of them.
        profile: its part of the tokens that may stay; None: as many as every other store.
        heads: the kv heads that other processes hold; or, where the heads of a layer are held apart, which of them
            these are.
    """

    def __init__(
        self,
        plan: Plan,
        layers: Sequence[int],
        codecs: Sequence[Codec],
        ropes: Mapping[int, Rotation | None],
        expansions: Mapping[int, Expand],
        profile: Profile | None = None,
        heads: Heads | None = None,
    ) -> None:
        self.plan, self.layers, self.codecs, self.ropes = plan, list(layers), codecs, ropes
        self.expansions, self.profile, self.heads = expansions, profile, plan.heads if heads is None else heads
        self.given = Given()  # the cohort's, which all its stores share
        self.dirty = False  # holds tokens of a forward that is not settled
        self.mixes_heads = False  # what attention reads of a kv head depends on other heads, too
        self._sealed_positions: Tensor | None = None
        self._moves: dict[tuple[object, ...], Callable[[Tensor], Tensor]] = {}
        self._reading: Sealed | None = None
        slots = range(len(self.layers))
        # all that moves with tokens, by the name it has on disk: the only list of it
        self._hold(
            {
                "raw": [RawTokens(slot, plan.hidden) for slot in slots],
                "sealed": self._nothing_sealed(),
                "kept": [Positions()],
                "memory": [Memory() for _ in slots],
                "recent": [Queries() for _ in slots],
                **({"bias": [Bias() for _ in slots]} if plan.refits else {}),
                **({"references": [References() for _ in slots]} if plan.references else {}),
            }
        )

    def _nothing_sealed(self) -> list[Sealed]:
        size, parts = self.plan.stored_together, list[Sealed]()
        latents = GroupLatents if self.plan.tiers is None else TieredLatents
        for i in range(0, len(self.layers), size):
            mine = self.layers[i : i + size]
            if self.codecs:
                ropes = [self.ropes.get(layer) for layer in mine]
                parts.append(latents(self.plan, mine, self.codecs[i // size], ropes))
            else:
                parts.append(LayerCodes(self.plan, mine))
        return parts

    def _hold(self, held: dict[str, list[Any]]) -> None:
        self._held = held
        self.raw: list[RawTokens] = held["raw"]
        self.sealed: list[Sealed] = held["sealed"]
        self.kept_positions: Positions = held["kept"][0]
        self.memory: list[Memory] = held["memory"]
        self.queries: list[Queries] = held["recent"]
        self.biases: list[Bias] = held.get("bias", [])
        self.references: list[References] = held.get("references", [])

    @property
    def names(self) -> list[str]:
        """Of the kinds of tracks, as they are on disk."""
        return list(self._held)

    def tracks(self) -> Iterator[Track]:
        return (track for tracks in self._held.values() for track in tracks)

    def take_over(self, other: Store) -> None:
        """Hold what `other` holds, whose layers are the first of these."""
        self._hold({name: tracks + self._held[name][len(tracks) :] for name, tracks in other._held.items()})
        self.dirty, self.mixes_heads = other.dirty, other.mixes_heads

    # ---- lengths and positions

    @property
    def sealed_tokens(self) -> int:
        return self.sealed[0].tokens

    @property
    def raw_tokens(self) -> int:
        return self.raw[0].length

    @property
    def held(self) -> int:
        return self.sealed_tokens + self.raw_tokens

    @property
    def mean_held(self) -> float:
        """Tokens held, as a mean over kv heads."""
        return self.held

    @property
    def pieces(self) -> list[tuple[tuple[int, ...] | None, Store]]:
        """Stores of heads that hold equally many tokens, and the places of these heads; None: of all."""
        return [(None, self)]

    def tokens_in(self, slot: int) -> int:
        """Tokens held in a layer: in the middle of a forward the layers of a group have not all got their new ones."""
        return self.sealed_tokens + self.raw[slot].length

    def sample(self, slot: int) -> KV | None:
        """Keys and values (rows, H, n, D) as a layer holds them, for their type and shape; None: it never held any."""
        return self.raw[slot].kv if self.raw[slot].buffers[0].tensors else None

    @property
    def sinks(self) -> int:
        return min(self.plan.sinks, self.raw_tokens)

    @property
    def middle(self) -> int:
        """Raw tokens between the sinks and the window."""
        return max(0, self.raw_tokens - self.sinks - self.plan.window)

    @property
    def granule(self) -> int:
        return self.plan.granule(self.raw[0].width)

    @property
    def packed(self) -> dict[tuple[int, str], Packed]:
        """Sealed tokens by (first slot of what is stored together, name)."""
        size = self.plan.stored_together
        return {(i * size, name): packed for i, part in enumerate(self.sealed) for name, packed in part.packed.items()}

    def positions(self, seen: int) -> Tensor:
        """(B or 1, H or 1, held) true positions, ascending."""
        if not self.held:
            return torch.empty(1, 1, 0, dtype=torch.int32)
        device, kept = self.raw[0].device, self.kept_positions.kept
        if kept is None:
            return positions_between(seen - self.held, seen, device)[None, None]
        b, h, chosen = kept.shape
        rest = self.held - self.sinks - chosen
        first = positions_between(0, self.sinks, device).expand(b, h, -1)
        last = positions_between(seen - rest, seen, device).expand(b, h, -1)
        return torch.cat([first, kept, last], dim=-1)

    # ---- writing

    def append(self, slot: int, kv: KV) -> None:
        """New tokens of one layer."""
        self.dirty = True
        self.raw[slot].append(kv)

    def remember(self, slot: int, queries: Tensor, seen: int, may_be_cropped: bool) -> None:
        """Keep what is wanted of the running forward's queries (B, H*G, Q, D): by the score, and some more where tokens
        may be taken back before it looks; by refitting."""
        select = self.plan.select
        if select is None or not select.looks_at_queries:
            return
        guesses = GUESSES if may_be_cropped else 0
        keep = -1 if select.tracks or select.queries < 0 else max(1, select.queries) + guesses
        self.queries[slot].add(queries, keep)
        if self.references and queries.shape[2] > 1:
            self.references[slot].add(queries, seen, guesses)

    def mix_heads(self) -> None:
        """Attention makes something else of these keys and values, across kv heads (DiffLlama, Doge, JetMoe): one token
        set serves all heads from now on."""
        if self.kept_positions.kept is None:
            self.mixes_heads = True

    # ---- compressing

    def settle(self, seen: int, new: int, scalings: Sequence[float], work: Workspace) -> None:
        """Evict down to the budget, then seal what may be sealed. `new` tokens came since the last time. All or
        nothing: where something stops this, such as memory that is full, the next time finds what this one found."""
        self._track(seen, scalings, work)
        dropped = self._surplus(seen, new)
        if dropped or self._sealable(dropped):
            undo = self.undo()
            try:
                self._compress(seen, new, dropped, scalings, work)
            except BaseException:
                undo()
                raise
        select = self.plan.select
        for queries in self.queries:
            queries.settled(bool(dropped) or (select is not None and not (select.queries or select.references)))
        for references in self.references:
            references.forget()
        self.dirty = False
        self.close()

    def undo(self) -> Callable[[], None]:
        """Return the function that makes this hold again what it holds now, until tokens come."""
        each, state = [track.undo() for track in self.tracks()], (self.dirty, self.mixes_heads)

        def undo() -> None:
            for put_back in each:
                put_back()
            self.dirty, self.mixes_heads = state
            self.end_forward()  # what was decoded may be of tokens that have come or gone

        return undo

    def _surplus(self, seen: int, new: int) -> int:
        """The number of tokens that must go, equal in all layers and heads of this store."""
        plan = self.plan
        if plan.evict is None or not self._can_score():
            return 0
        budget = allowance(plan.evict.keep, seen, plan.sinks, plan.window, self.profile)
        raw = max(0, new - plan.sinks - plan.window)  # a bound that holds in every layer
        # after a crop the window may reach into what is sealed, and is not whole yet: it is no part of the budget
        between = max(0, self.held - self.sinks - plan.window)
        return how_many(between, raw, budget, self.granule, plan.block)

    def _sealable(self, dropped: int) -> int:
        """The number of tokens to seal, in whole granules; a few new tokens wait until a block of them is there, if
        nothing was evicted."""
        plan, granule = self.plan, self.granule
        if not plan.seals or (plan.first_block_only and self.sealed_tokens):
            return 0
        if plan.tiers is not None and not self._can_score():
            return 0
        enough = self.middle >= self._first_block(granule) and bool(dropped or self.middle >= max(plan.block, granule))
        return self.middle // granule * granule if enough else 0

    def _compress(self, seen: int, new: int, dropped: int, scalings: Sequence[float], work: Workspace) -> None:
        plan = self.plan
        if dropped:
            cut = self._cut(seen, self.granule, dropped, scalings, work)
            self._check_numbers(plan.select)
            fits = [self._refitted(slot, cut, seen, scalings[slot], work) for slot in range(len(self.biases))]
            for track in self.tracks():
                track.take(cut)
            for slot, fit in enumerate(fits):
                self.biases[slot].stand_in(fit.bias)
                self.raw[slot].revalue(self.sinks, fit.values)
        if count := self._sealable(dropped):
            # encoders check what they are given
            if plan.transform is not None and not plan.own_encoder and not dropped:
                self._check_numbers(plan.transform.stage)
            # after an eviction, the next one copies what is left anyway; after a prompt, maybe nothing follows
            scores = None
            if plan.tiers is not None:
                scores = self._ranking(seen, scalings, work)[..., self.sealed_tokens : self.sealed_tokens + count]
            self._seal(seen, count, spare=not dropped and new <= plan.block, scores=scores)

    def _can_score(self) -> bool:
        """Return True if the queries that the score looks at are known: after a deep crop they come with the next
        forward."""
        select = self.plan.select
        assert select is not None
        # what was tracked is enough for the score, but not to refit tokens
        blind = (select.queries == 0 or select.tracks) and not select.references
        return blind or all(known.newest(-1) is not None for known in self.queries)

    def _track(self, seen: int, scalings: Sequence[float], work: Workspace) -> None:
        """Let the score update its memory of each token with the queries that it has not seen."""
        select, ranking = self.plan.select, self.plan.ranking
        if select is None or ranking is None or not select.tracks:
            return
        for slot, known in enumerate(self.queries):
            queries = known.unseen()
            if queries is not None:
                self.hear(slot, queries, seen, scalings[slot], work)
                known.untracked = 0

    def hear(self, slot: int, queries: Tensor, seen: int, scaling: float, work: Workspace) -> None:
        """Let the score update its memory of each token of a layer with queries (B, H*G, Q, D) of the newest ones."""
        assert self.plan.ranking is not None
        kv = self._attended(slot, seen, work)
        context = self._context(slot, seen, scaling, queries, self.memory[slot].grown(kv.tokens))
        self.memory[slot].tensors = dict(self.plan.ranking.track(kv, context))

    def _context(
        self, slot: int, seen: int, scaling: float, queries: Tensor | None, memory: Mapping[str, Tensor]
    ) -> Context:
        return Context(
            layer=self.layers[slot],
            seen=seen,
            positions=self.positions(seen).to(self.raw[slot].device),
            queries=queries,
            scaling=scaling,
            memory=memory,
            rope=self._rope(slot, seen),
            references=self._reference(slot, seen) if self.references else None,
            sinks=self.sinks,
            window=self.plan.window,
            heads=self.heads,
        )

    def _rope(self, slot: int, seen: int) -> Placed | None:
        """The rotation of a layer for the tokens of this text, by their indices."""
        rope = self.ropes.get(self.layers[slot])
        if rope is None:
            return None
        return Placed(rope, self._numbered(seen) if self.plan.renumbers else self.given)

    def _first_block(self, granule: int) -> int:
        """Raw tokens that must be there before any are sealed, whole granules, where none are."""
        if self.sealed_tokens:
            return 0
        raw, size = [track.kv for track in self.raw], self.plan.stored_together
        needed = max(part.needs(raw[i * size : (i + 1) * size]) for i, part in enumerate(self.sealed))
        return -(-needed // granule) * granule

    def _cut(self, seen: int, granule: int, drop: int, scalings: Sequence[float], work: Workspace) -> Cut:
        """Decide which of the middle tokens stay."""
        pooled = self._ranking(seen, scalings, work)
        sinks, sealed, middle = self.sinks, self.sealed_tokens, self.middle
        choice: Choice = choose(pooled, sealed, granule, drop, self.heads)
        positions = self.positions(seen)[..., sinks : sinks + sealed + middle]
        return Cut(sinks, sealed, middle, granule, choice.granules, choice.raw, positions)

    def _refitted(self, slot: int, cut: Cut, seen: int, scaling: float, work: Workspace) -> Refitted:
        """Return the tokens of a layer that a cut leaves, changed so that they stand for those that go."""
        kv = self.read(slot, seen, work)
        queries, tokens = self._reference(slot, seen)
        queries = moved_behind(queries, tokens, self._rope(slot, seen), seen, AHEAD)
        middle = slice(cut.sinks, cut.sinks + cut.sealed + cut.middle)
        bias = self.biases[slot].of(self.sinks, self.held)
        return refitted(kv, bias, queries, cut.stay, cut.raw.shape[-1], middle, scaling)

    def _reference(self, slot: int, seen: int) -> tuple[Tensor, Tensor]:
        """Queries (B, H*G, n, D) of the text, and the indices of their tokens: of a forward of several tokens, or the
        last single ones."""
        asked = self.references[slot].asked()
        if asked is not None:
            return asked
        queries = self.queries[slot].newest(-1)
        assert queries is not None  # `_can_score` has asked
        return queries, torch.arange(seen - queries.shape[2], seen)

    def _ranking(self, seen: int, scalings: Sequence[float], work: Workspace) -> Tensor:
        """(B, H or 1, sealed + middle): score all held tokens of all layers."""
        select = self.plan.select
        assert select is not None
        scores: list[Tensor] = []
        for slot in range(len(self.layers)):
            score = self._scores(slot, seen, scalings[slot], work)
            scores.append(score.to(scores[0].device) if scores else score)
        return select.pooled(scores, self.heads) if self.plan.share_heads or self.mixes_heads else scores[0]

    def scored(self, seen: int, scaling: float) -> Tensor:
        """(B, H, middle): the scores of all tokens between sinks and window, of a store of one layer that has just got
        its first tokens."""
        self._track(seen, [scaling], Workspace())
        return self._scores(0, seen, scaling, Workspace())

    def _scores(self, slot: int, seen: int, scaling: float, work: Workspace) -> Tensor:
        """(B, H, sealed + middle) scores of one layer, checked; H are the heads that hold something."""
        select, ranking, layer = self.plan.select, self.plan.ranking, self.layers[slot]
        assert select is not None
        assert ranking is not None
        kv = self._attended(slot, seen, work)
        queries = self.queries[slot].newest(select.queries)
        memory = self.memory[slot].grown(kv.tokens)
        score = ranking.score(kv, self._context(slot, seen, scaling, queries, memory)).float()
        if score.shape != kv.keys.shape[:3]:
            raise UseError(
                f"{select!r} on layer {layer}: score gave {tuple(score.shape)}, "
                f"one number per row, kv head and token is needed: {tuple(kv.keys.shape[:3])}."
            )
        score = score[:, :, self.sinks : self.sinks + self.sealed_tokens + self.middle]
        if not bool(torch.isfinite(score).all()):
            raise UseError(
                f"{select!r} on layer {layer}: scores hold NaN or infinity, so the keys do. "
                "Check the model's dtype (float16 overflows) and its input."
            )
        # all heads of latent attention read one latent of a token
        one = score.shape[1] != self.raw[slot].kv.keys.shape[1]
        return select.pooled([score], self.heads) if one else score

    def _attended(self, slot: int, seen: int, work: Workspace) -> KV:
        """The tokens that a score compares: with queries, the keys that these attend to, where latents are held in
        their place."""
        kv, select = self.read(slot, seen, work), self.plan.select
        expand = self.expansions.get(self.layers[slot]) if select is not None and select.looks_at_queries else None
        return kv if expand is None else KV(*expand(kv.keys, kv.values))

    def _check_numbers(self, stage: object) -> None:
        """Refuse raw tokens with NaN or infinity: not every score looks at keys, and none at all that is held."""
        named = [(slot, name) for slot in range(len(self.raw)) for name in ("keys", "values")]
        found = [_bounds(getattr(self.raw[slot].kv, name)) for slot, name in named]
        fits = torch.stack([x.to(found[0].device) for x in found]).isfinite().all(1)
        if bool(fits.all()):  # a GPU is waited for once
            return
        for (slot, name), good in zip(named, fits.tolist(), strict=True):
            if not good:
                raise UseError(
                    f"{stage!r} on layer {self.layers[slot]}: {name} hold NaN or infinity. "
                    "Check the model's dtype (float16 overflows) and its input."
                )

    def _seal(self, seen: int, count: int, spare: bool, scores: Tensor | None) -> None:
        """Move the oldest `count` raw middle tokens into the sealed part, with room left for more if `spare`. `scores`
        (B, 1, count) say how important they are, where classes of tokens are told apart."""
        first = self.sinks + self.sealed_tokens
        given = self.given.at(self.positions(seen)[..., first : first + count])
        block = [track.draw(self.sinks, count) for track in self.raw]
        size = self.plan.stored_together
        for i, part in enumerate(self.sealed):
            part.append(block[i * size : (i + 1) * size], given, spare, scores)

    # ---- reading

    def read(self, slot: int, seen: int, work: Workspace, *, turned: bool = True) -> KV:
        """All held tokens of one layer in position order. Views of the raw part where nothing is sealed, scratch
        memory (valid until the next read) otherwise. `turned`: keys as attention sees them; False: as they came."""
        raw, turned = self.raw[slot].kv, turned and self._moved(slot, seen)
        if not self.sealed_tokens:
            return KV(self._turned(slot, raw.keys, seen) if turned else raw.keys, raw.values)
        first, second = self.sinks, self.sinks + self.sealed_tokens
        loose = raw.keys
        if turned and self.plan.rotates_late:
            loose = self._turned(slot, loose, seen, self._loose)
        whole = []
        for name, x in (("keys", loose), ("values", raw.values)):
            b, h, n, d = x.shape
            out = work.get(name, (b, h, n + self.sealed_tokens, d), x.dtype, x.device)
            out[:, :, :first] = x[:, :, :first]
            out[:, :, second:] = x[:, :, first:]
            whole.append(out)
        keys, values = whole
        part, layer = self._stored(slot)
        part.decode(layer, keys[:, :, first:second], values[:, :, first:second], self._where(seen, turned))
        if turned and not self.plan.rotates_late:
            keys = self._turned(slot, keys, seen)
        return KV(keys, values)

    # ---- places inside the cache

    def _numbered(self, seen: int) -> Numbered:
        """The places of tokens inside the cache."""
        index = self.positions(seen)
        newest = self.given.at(index.new_full((1, 1, 1), seen - 1))
        return Numbered(index, seen, _of_one_axis(newest))

    def _moved(self, slot: int, seen: int) -> bool:
        """Return True if keys of a layer may be rotated to other places than those that their tokens have now."""
        if not self.plan.renumbers or self.ropes.get(self.layers[slot]) is None:
            return False
        return self.held < seen or self.given.told is not None

    @property
    def _loose(self) -> Tensor:
        """(raw,) which of the tokens held are raw."""
        device, behind = self.raw[0].device, self.sinks + self.sealed_tokens
        return torch.cat([torch.arange(self.sinks, device=device), torch.arange(behind, self.held, device=device)])

    def _turned(self, slot: int, keys: Tensor, seen: int, places: Tensor | None = None) -> Tensor:
        """Keys (B, H, n, D) as they came, of the tokens at `places` (n,) among those held (None: all), rotated to the
        places that these have now. Each key is turned from what the model made: errors of rounding do not add up."""
        rope = self.ropes[self.layers[slot]]
        assert rope is not None  # `_moved` has asked
        key = (id(rope), keys.device, seen, self.held, places is None)
        if key not in self._moves:  # the same for all layers that rotate alike, until the forward is over
            numbered = self._numbered(seen)
            index, now = numbered.index, numbered.held()
            if places is not None:
                index, now = index[..., places], now[..., places]
            self._moves[key] = rope.move(self.given.at(index).to(keys.device), now.to(keys.device))
        return saturated(self._moves[key](wide(keys)), keys.dtype)

    def _stored(self, slot: int) -> tuple[Sealed, int]:
        """The sealed tokens that a layer is part of, and its place there."""
        size = self.plan.stored_together
        part = self.sealed[slot // size]
        if self._reading is not part:  # what was decoded for the layers before is not needed any more
            if self._reading is not None:
                self._reading.close()
            self._reading = part
        return part, slot % size

    def _where(self, seen: int, turned: bool = False) -> Any:
        """Positions that the model was given for the sealed tokens, worked out at the first question of a forward.
        `turned`: their places inside the cache."""

        def where() -> Tensor:
            if self._sealed_positions is None:
                first, device = self.sinks, self.raw[0].device
                if turned:
                    self._sealed_positions = self._numbered(seen).held()[..., first : first + self.sealed_tokens]
                elif self.kept_positions.kept is None:
                    start = seen - self.held + first
                    self._sealed_positions = self.given.of_run(start, start + self.sealed_tokens, device)
                else:  # compared when they were sealed
                    index = self.positions(seen)[..., first : first + self.sealed_tokens]
                    self._sealed_positions = self.given.at(index, compared=True)
            return self._sealed_positions

        return where

    def attend(
        self, slot: int, query: Tensor, seen: int, scaling: float, work: Workspace, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of one query per row over sealed codes and raw tokens, without a decoded copy of both.

        query (B, H*G, 1, D) -> output (B, 1, H*G, D), weights (B, H*G, 1, held) with the sealed tokens first:
        softmax does not care for their order. `mask` (B or 1, H*G or 1, 1, held), in the order of positions, tells
        what the query sees: boolean, or added to the logits.
        """
        raw, (part, layer), moved = self.raw[slot].kv, self._stored(slot), self._moved(slot, seen)
        where = self._where(seen, moved)
        if moved:
            raw = KV(self._turned(slot, raw.keys, seen, self._loose), raw.values)
        b, h, _, d = raw.keys.shape
        grouped = wide(query).reshape(b, h, -1, d) * scaling  # (B, H, G, D); products of halves may not be halves
        # logits of sealed tokens, then of raw ones
        logits = part.logits(layer, grouped, raw.keys, where, work)
        bias = self.bias(slot)
        if bias is not None:
            logits = logits + self._sealed_first(bias).unsqueeze(2)
        if mask is not None:
            logits = self._masked(logits, mask)
        # one softmax over all of them, and the values of both
        weights = logits.softmax(dim=-1, dtype=torch.float32)
        mixed = part.output(layer, weights, raw.values, work)
        mixed = saturated(mixed, raw.values.dtype)
        return mixed.reshape(b, 1, query.shape[1], -1), weights.reshape(b, query.shape[1], 1, -1)

    def _masked(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, H, G, tokens) of sealed tokens and then of raw ones, behind a mask."""
        mask = mask.to(logits.device)
        heads = logits.shape[1] if mask.shape[1] > 1 else 1
        mask = mask.reshape(mask.shape[0], heads, -1, mask.shape[-1])  # (B or 1, H or 1, G or 1, held)
        mask = self._sealed_first(mask).expand(*logits.shape[:3], -1)
        if mask.dtype.is_floating_point:
            return logits + mask.to(logits.dtype)
        return logits.masked_fill(~mask.bool(), torch.finfo(logits.dtype).min)

    def _sealed_first(self, x: Tensor) -> Tensor:
        """Values for all held tokens, in the order of their positions -> sealed tokens, then raw ones."""
        first, middle, last = x.tensor_split([self.sinks, self.sinks + self.sealed_tokens], dim=-1)
        return torch.cat([middle, first, last], dim=-1)

    def bias(self, slot: int) -> Tensor | None:
        """(B, H, held) nats that are added to the logits of a layer's tokens; None: nothing is."""
        return self.biases[slot].of(self.sinks, self.held) if self.biases else None

    def in_order(self, weights: Tensor) -> Tensor:
        """`weights` of `attend`, their last axis in the order of positions."""
        sealed, sinks = self.sealed_tokens, self.sealed_tokens + self.sinks
        return torch.cat([weights[..., sealed:sinks], weights[..., :sealed], weights[..., sinks:]], dim=-1)

    def close(self) -> None:
        """Drop what was decoded for all layers of a group."""
        self._sealed_positions = self._reading = None
        self._moves = {}
        for part in self.sealed:
            part.close()

    def end_forward(self) -> None:
        """Drop what was needed for one forward only."""
        self.close()
        self.given.end_forward()
        for part in self.sealed:
            part.end_forward()

    # ---- rows and crops

    def rows(self, index: Tensor) -> Store:
        """A store with the batch rows at `index`; nothing is shared with this one."""
        return self._with({name: [track.rows(index) for track in tracks] for name, tracks in self._held.items()})

    def fork(self) -> Store:
        """A store of the same tokens, in the same memory as long as neither changes it."""
        return self._with({name: [track.fork() for track in tracks] for name, tracks in self._held.items()})

    def _with(self, held: dict[str, list[Any]]) -> Store:
        """A store like this one that holds something else."""
        other = Store(self.plan, self.layers, self.codecs, self.ropes, self.expansions, self.profile, self.heads)
        other.dirty, other.mixes_heads = self.dirty, self.mixes_heads
        other._hold(held)
        return other

    def older_than(self, limit: int, seen: int) -> int:
        """The number of middle tokens that every head holds whose position is below `limit`."""
        if not self.held:
            return 0
        middle = self.positions(seen)[..., self.sinks : self.held]
        return int((middle < limit).sum(-1).min())

    def crop(self, seen: int, remove: int, stay: int) -> None:
        """Forget the newest `remove` of `seen` tokens. `stay` tokens are left in addition to the sinks, in every
        layer."""
        sinks, granule = min(self.sinks, seen - remove), self.granule
        whole = min(part.whole(min(self.sealed_tokens, stay), granule) for part in self.sealed)
        rest = max(0, min(self.sealed_tokens, stay) - whole)
        thawed = self._thawed(seen, whole, rest, granule) if rest else ()
        crop = Crop(remove, seen - remove, sinks, stay, whole, max(0, stay - self.sealed_tokens), thawed)
        for track in self.tracks():
            track.crop(crop)
        self.end_forward()  # what was read to thaw tokens is not needed any more, positions included

    def take_back(self, seen: int, remove: int) -> None:
        """Forget the newest `remove` of `seen` tokens, which were read a second time: raw ones, whose queries were not
        remembered."""
        sinks = min(self.sinks, seen - remove)
        stay = self.held - remove - sinks
        crop = Crop(remove, seen - remove, sinks, stay, self.sealed_tokens, stay - self.sealed_tokens)
        for name, tracks in self._held.items():
            if name not in QUERIES:
                for track in tracks:
                    track.crop(crop)
        self.end_forward()

    def drop_reserve(self) -> None:
        """Give back the memory behind the raw tokens."""
        for raw in self.raw:
            for buffer in raw.buffers:
                if buffer.tensors:
                    buffer.replace(buffer.view)

    def _thawed(self, seen: int, whole: int, rest: int, granule: int) -> tuple[KV, ...]:
        """`rest` tokens behind the `whole` ones that stay sealed, decoded: the crop cuts through their granule."""
        if self.plan.hidden:
            assert self.plan.transform is not None
            raise UseError(
                f"{self.plan.transform.stage!r} merges hidden states, and those of compressed tokens are not kept: "
                f"crop back to a multiple of {granule} compressed tokens, or use merge='project'."
            )
        work, start = Workspace(), self.sinks + whole
        index = torch.arange(start, start + rest, device=self.raw[0].device)[None, None]
        return tuple(self.read(slot, seen, work, turned=False).take(index) for slot in range(len(self.layers)))

    # ---- files

    def state(self, put: Put) -> dict[str, list[Any]]:
        """A description of all tracks."""
        return {name: [track.state(put) for track in tracks] for name, tracks in self._held.items()}

    def restore(self, state: Mapping[str, Sequence[Any]], get: Get) -> None:
        """Hold what `state` described; `get` is for all layers.

        Raises:
            UseError: something does not fit the layers, or the parts do not fit each other.
        """
        for name, tracks in self._held.items():
            each = -(-len(self.layers) // len(tracks))  # layers that a track is for; the last may be for fewer
            for i, (track, described) in enumerate(zip(tracks, items(state[name], name, len(tracks)), strict=True)):
                track.restore(described, get.part(i * each, each))
        self._check_lengths(get)
        if self.held:
            self._check_positions(get)
        self._check_biases(get)
        for slot, layout in enumerate(get.layouts):
            self._check_scores(slot, layout, get)

    def _check_lengths(self, get: Get) -> None:
        plan, lengths = self.plan, {track.length for track in self.raw}
        if len(lengths) > 1:
            raise misfit(f"{get.where('raw tokens')} are {sorted(lengths)} tokens, not equally many.")
        sealed, raw = self.sealed_tokens, self.raw_tokens
        if sealed and not (plan.seals and sealed % self.granule == 0 and raw >= plan.sinks):
            raise misfit(
                f"{get.where('sealed tokens')} are {sealed}, with {raw} raw ones: these are no whole granules."
            )
        if self.held > get.seen or (self.kept_positions.kept is None and self.held < get.seen):
            raise misfit(f"{get.where('tokens')} are {self.held} of the {get.seen} that were read.")

    def _check_positions(self, get: Get) -> None:
        kept = self.kept_positions.kept
        if kept is None:
            return
        heads = {1} if self.plan.share_heads else {1, get.layouts[0].heads}
        fits = self.plan.evict is not None and kept.shape[1] in heads and kept.shape[2] <= self.held - self.sinks
        if fits:
            positions = self.positions(get.seen).long()
            fits = bool((positions.diff(dim=-1) > 0).all() and (positions >= 0).all() and (positions < get.seen).all())
        if not fits:
            raise misfit(f"{get.where('positions')} are not ascending, or not those of {self.held} tokens.")

    def _check_biases(self, get: Get) -> None:
        """Refuse tokens that stand in for others where none was dropped, and the other way round."""
        kept = self.kept_positions.kept
        most = 0 if kept is None else kept.shape[2]
        for slot, bias in enumerate(self.biases):
            count = None if bias.steps is None else bias.steps.shape[2]
            if (count is None) != (self.held == get.seen) or count not in (None, most):
                raise misfit(f"{get.part(slot, 1).where('biases')} are {count}, for {self.held} of {get.seen} tokens.")

    def _check_scores(self, slot: int, layout: Layout, get: Get) -> None:
        """Refuse memory and queries that the score does not keep."""
        select, queries, memory = self.plan.select, self.queries[slot].before, self.memory[slot].tensors
        what = get.part(slot, 1).where("the memory of a score")
        if queries is not None and (select is None or not select.looks_at_queries or queries.shape[2] > self.held):
            raise misfit(f"{what} holds queries, and no score looks at them.")
        like: Mapping[str, Tensor] = {}
        # what was never read a second time, such as a text that was fed token by token, has no memory of that
        if select is not None and self.held and (select.tracks or (select.rereads and memory)):
            like = self._any_memory(slot, layout)
        if memory.keys() != like.keys() or any(x.dtype != like[name].dtype for name, x in memory.items()):
            raise misfit(f"{what} is of {sorted(memory)}, not of {sorted(like)}.")
        if any(x.shape[2] > self.held for x in memory.values()):
            raise misfit(f"{what} is of more tokens than are held.")

    def _any_memory(self, slot: int, layout: Layout) -> Mapping[str, Tensor]:
        """An example of the memory of the score, of any numbers: for its names and types."""
        assert self.plan.ranking is not None
        heads, device = layout.heads, layout.device
        keys = torch.ones(1, heads, SAMPLE, layout.key_width, dtype=layout.key_dtype, device=device)
        values = torch.ones(1, heads, SAMPLE, layout.value_width, dtype=layout.value_dtype, device=device)
        queries = keys[:, :, -1:].repeat_interleave(layout.queries or 1, dim=1)
        positions = positions_between(0, SAMPLE, device)[None, None]
        context = Context(
            layer=self.layers[slot],
            seen=SAMPLE,
            positions=positions,
            queries=queries,
            rope=self.ropes.get(self.layers[slot]),
        )
        return self.plan.ranking.track(KV(keys, values), context)


def _bounds(x: Tensor) -> Tensor:
    """The least and the largest number (2,): NaN where there is one."""
    return torch.stack(torch.aminmax(x)).float() if x.numel() else torch.zeros(2, device=x.device)


def _of_one_axis(positions: Tensor) -> Tensor:
    """Positions (B or 1, H or 1, n) of (B, axes, H or 1, n) that are the same on all axes, or as they are."""
    return positions[:, 0] if positions.dim() == 4 else positions
