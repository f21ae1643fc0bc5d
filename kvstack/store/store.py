"""What is held for a group of layers that are stored together, and everything that moves tokens in it.

    [ sinks | sealed tokens | raw: middle not sealed yet | window + new ]
      raw     encoded,        raw                          raw
              dropped by
              whole granules

The sinks and the rest of the raw tokens share one buffer a layer; `read` puts the sealed ones between them, so
that tokens are always in the order of their positions. Without an encoder or transform nothing is sealed and
the middle stays raw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..encode.exact import Plain
from ..errors import UseError
from ..model.rope import Rope, arange
from ..packed import Packed, storage_bytes
from ..stage import Encode, Select, Transform, check
from ..types import KV, Context, Latent, take_tokens
from ..workspace import Workspace
from .budget import Cut, allowance, choose, how_many
from .raw import Buffer

__all__ = ["RAW", "Plan", "Store"]

RAW = ("stack", "raw")
"""Who pays for the raw buffers, and what they are called among a store's parts."""

PLAIN = Plain()

Picked = tuple[Mapping[str, Tensor], Tensor]
"""What `Transform.pick` gives: latents of some tokens, and their places among the sealed ones."""

RECENT_QUERIES = 8
"""Queries remembered while decoding, for scores that look at queries. A query costs as much as several tokens of
the cache on grouped-query models, so they are few, and none are held before the first new token."""


@dataclass(frozen=True)
class Plan:
    """What a stack does, settled once: its stages by kind and the numbers they agreed on."""

    select: Select | None
    transform: Transform | None
    encode: Encode | None
    sinks: int
    window: int
    block: int

    def __post_init__(self) -> None:
        if self.transform is not None and self.transform.hidden:
            check(
                type(self.transform).strays is Transform.strays,
                self.transform,
                "it wants hidden states and may be fitted anew, and those of compressed tokens are gone.",
                "Leave out hidden or strays.",
            )

    @property
    def seals(self) -> bool:
        return self.encode is not None

    @property
    def once(self) -> bool:
        """Whether only the first block is sealed."""
        return self.transform is not None and self.transform.once

    @property
    def layers(self) -> int:
        """Adjacent layers that are handled together."""
        stored = self.transform.layers if self.transform else None  # None before the stack is bound
        chosen = self.select and (self.select.layers or stored or self.select.usual_layers)
        return max(chosen or 1, stored or 1)

    @property
    def share_heads(self) -> bool:
        """Whether one token set serves all heads (and layers) of a group."""
        wish = bool(self.select and self.select.share_heads) or bool(self.transform and self.transform.share_heads)
        return wish or self.layers > 1

    @property
    def hidden(self) -> bool:
        """Whether the hidden states of raw tokens are held too."""
        return self.transform is not None and self.transform.hidden

    def granule(self, width: int) -> int:
        if self.encode is None:
            return 1
        if self.transform is None:
            return self.encode.granule(width)
        known = self.transform.channels
        packed = self.encode.granule(width, known[0] if known else None)
        # as many granules of the transform as make whole ones of the encoder out of any share of them
        return self.transform.granule * (packed // math.gcd(packed, self.transform.unit))


class Store:
    """Tokens of `layers` (indices in the model) for a set of rows of equal length."""

    def __init__(self, plan: Plan, layers: Sequence[int], ropes: Mapping[int, Rope | None]) -> None:
        self.plan = plan
        self.layers = list(layers)
        self.ropes = ropes
        n = len(self.layers)
        # slot of the first layer of those that are stored together -> the transform fitted to them
        self.transforms: dict[int, Transform] = {}
        if plan.transform is not None:
            size = plan.transform.layers or 1
            self.transforms = {i: plan.transform.of(self.layers[i : i + size]) for i in range(0, n, size)}
        self.raw: list[tuple[Buffer, ...]] = [tuple(Buffer() for _ in range(3 if plan.hidden else 2)) for _ in range(n)]
        self.sealed: dict[tuple[int, str], Packed] = {}
        self.sealed_tokens = 0
        self.kept: Tensor | None = None  # (B, H or 1, sealed + chosen raw) positions, once something was evicted
        self.memory: list[dict[str, Tensor]] = [{} for _ in range(n)]
        self.recent: list[Tensor | None] = [None] * n
        self.fresh: list[Tensor | None] = [None] * n
        self.dirty = False
        self._latents: dict[int, dict[str, Tensor]] = {}
        self._sealed_positions: Tensor | None = None

    # ---- lengths and positions

    @property
    def raw_tokens(self) -> int:
        return self.raw[0][0].length

    @property
    def held(self) -> int:
        return self.sealed_tokens + self.raw_tokens

    @property
    def sinks(self) -> int:
        return min(self.plan.sinks, self.raw_tokens)

    @property
    def middle(self) -> int:
        """Raw tokens between the sinks and the window."""
        return max(0, self.raw_tokens - self.sinks - self.plan.window)

    def positions(self, seen: int) -> Tensor:
        """(B or 1, H or 1, held) true positions, ascending."""
        device = self.raw[0][0].view.device
        if self.kept is None:
            return arange(seen - self.held, seen, device)[None, None]
        b, h, chosen = self.kept.shape
        rest = self.held - self.sinks - chosen
        first = arange(0, self.sinks, device).expand(b, h, -1)
        last = arange(seen - rest, seen, device).expand(b, h, -1)
        return torch.cat([first, self.kept, last], dim=-1)

    # ---- writing

    def append(self, slot: int, kv: KV) -> None:
        """New tokens of one layer."""
        self.dirty = True
        new = [x for x in (kv.keys, kv.values, kv.hidden) if x is not None]
        for buffer, x in zip(self.raw[slot], new, strict=True):
            buffer.append(x)

    def remember(self, slot: int, queries: Tensor) -> None:
        """Keep what the selector wants to see of the running forward's queries (B, H*G, Q, D)."""
        want = self.plan.select.queries if self.plan.select else 0
        if want == 0:
            return
        queries = queries.detach()
        if queries.shape[2] > 1:
            self.recent[slot] = None
            # clone: a view would keep the queries of the whole prompt until the group is complete
            self.fresh[slot] = queries if want < 0 else queries[:, :, -want:].clone()
            return
        last = self.recent[slot]
        last = queries if last is None else torch.cat([last, queries], dim=2)
        self.recent[slot] = last[:, :, -RECENT_QUERIES:].clone()

    def context(
        self, slot: int, seen: int, scaling: float, queries: Tensor | None, memory: Mapping[str, Tensor]
    ) -> Context:
        layer = self.layers[slot]
        return Context(
            layer=layer,
            seen=seen,
            positions=self.positions(seen).to(self.raw[slot][0].view.device),
            queries=queries,
            scaling=scaling,
            memory=memory,
            rope=self.ropes.get(layer),
            sinks=self.sinks,
            window=self.plan.window,
        )

    def track(self, slot: int, seen: int, scaling: float, queries: Tensor, work: Workspace) -> None:
        """Let the selector update its per-token memory after a forward of this layer."""
        select = self.plan.select
        assert select is not None
        kv = self.read(slot, seen, work)
        # tokens the memory does not know yet start at zero
        grown = {name: torch.nn.functional.pad(x, (0, kv.tokens - x.shape[2])) for name, x in self.memory[slot].items()}
        self.memory[slot] = dict(select.track(kv, self.context(slot, seen, scaling, queries, grown)))

    # ---- compressing

    def settle(self, seen: int, fresh: int, scalings: Sequence[float], work: Workspace) -> None:
        """Evict down to the budget, then seal what may be sealed. `fresh` new tokens came since the last time."""
        plan = self.plan
        self.dirty = False
        granule = plan.granule(self.raw[0][0].view.shape[-1])
        dropped = 0
        if plan.select is not None:
            budget = allowance(plan.select.keep, seen, plan.sinks, plan.window)
            raw = max(0, fresh - plan.sinks - plan.window)  # a bound that holds in every layer
            dropped = how_many(self.sealed_tokens + self.middle, raw, budget, granule, plan.block)
        block = max(plan.block, granule)
        seals = plan.seals and not (plan.once and self.sealed_tokens)
        ready = seals and self.middle >= max(block, self._first(self.sealed_tokens, granule))
        if dropped or ready:
            cut = self._cut(seen, granule, dropped, scalings, work) if dropped else None
            middle, sealed = self.middle, self.sealed_tokens
            if cut is not None:
                middle, sealed = cut.raw.shape[-1], cut.granules.shape[-1]
            enough = middle >= self._first(sealed, granule) and (dropped or middle >= block)
            seal = middle // granule * granule if seals and enough else 0
            self._rebuild(seen, cut, seal, granule)
            if dropped:
                self.recent = [None] * len(self.layers)
        self.fresh = [None] * len(self.layers)
        self.end_forward()

    def _first(self, sealed: int, granule: int) -> int:
        """Raw tokens that must be there before any are sealed, whole granules, where none are `sealed`."""
        if sealed or not self.transforms:
            return 0
        raw = [KV(*(buffer.view for buffer in buffers)) for buffers in self.raw]
        needed = (stage.first(raw[i : i + (stage.layers or 1)]) for i, stage in self.transforms.items())
        return -(-max(needed) // granule) * granule

    def _cut(self, seen: int, granule: int, drop: int, scalings: Sequence[float], work: Workspace) -> Cut:
        """Score all held tokens of all layers and decide which of the middle ones stay."""
        select = self.plan.select
        assert select is not None
        first, last = self.sinks, self.sinks + self.sealed_tokens + self.middle
        scores: list[Tensor] = []
        for slot, layer in enumerate(self.layers):
            kv = self.read(slot, seen, work)
            fresh = self.fresh[slot]
            queries = self.recent[slot] if fresh is None else fresh
            score = select.score(kv, self.context(slot, seen, scalings[slot], queries, self.memory[slot])).float()
            if score.shape != kv.keys.shape[:3]:
                raise UseError(
                    f"{select!r} on layer {layer}: score gave {tuple(score.shape)}, "
                    f"one number per row, kv head and token is needed: {tuple(kv.keys.shape[:3])}."
                )
            score = score[:, :, first:last]
            if not bool(torch.isfinite(score).all()):
                raise UseError(
                    f"{select!r} on layer {layer}: scores hold NaN or infinity, so the keys do. "
                    "Check the model's dtype (float16 overflows) and its input."
                )
            scores.append(score.to(scores[0].device) if scores else score)
        pooled = select.pool(scores) if self.plan.share_heads else scores[0]
        return choose(pooled, self.sealed_tokens, granule, drop)

    def _rebuild(self, seen: int, cut: Cut | None, seal: int, granule: int) -> None:
        """Apply `cut`, then move the oldest `seal` raw middle tokens into the sealed part."""
        sinks, middle = self.sinks, self.middle
        positions = self.positions(seen)[..., sinks : sinks + self.sealed_tokens + middle]
        if cut is not None:
            steps = torch.arange(granule, device=cut.raw.device)
            packed = (cut.granules.unsqueeze(-1) * granule + steps).flatten(-2)
            stay = torch.cat([packed, cut.raw + self.sealed_tokens], dim=-1)  # indices among the middle tokens
            positions = positions.expand(*stay.shape[:2], -1).gather(-1, stay)
            self._keep_memory(stay)
            if packed.shape[-1] < self.sealed_tokens:
                self.sealed = {
                    name: held.take(cut.granules, self._share(held, granule)) for name, held in self.sealed.items()
                }
                self.sealed_tokens = packed.shape[-1]
                self._forget_sealed()
        block: list[KV] = []
        for buffers in self.raw:
            kept = []
            for buffer in buffers:
                x = buffer.view
                mid = x[:, :, sinks : sinks + middle]
                if cut is not None:
                    mid = take_tokens(mid, cut.raw)
                kept.append(mid[:, :, :seal])
                buffer.replace(torch.cat([x[:, :, :sinks], mid[:, :, seal:], x[:, :, sinks + middle :]], dim=2))
            block.append(KV(*kept))
        if seal:
            self._seal(block, positions[..., self.sealed_tokens : self.sealed_tokens + seal])
        if cut is not None or self.kept is not None:
            self.kept = positions.to(torch.int32)

    def _seal(self, block: list[KV], positions: Tensor) -> None:
        plan = self.plan
        assert plan.encode is not None
        for name, latent in self._latents_of(block, positions):
            encode, channels = (PLAIN, None) if latent.exact else (plan.encode, latent.channels)
            try:
                packed = replace(encode.encode(latent.data, name[1], channels), exact=latent.exact)
            except UseError as error:
                # without an encoder of the user's, what the transform made is stored
                named = plan.transform if isinstance(encode, Plain) else encode
                raise UseError(f"{named!r} on layer {self.layers[name[0]]}: {error}") from None
            self.sealed[name] = self.sealed[name].append(packed) if name in self.sealed else packed
        self.sealed_tokens += positions.shape[-1]

    def _share(self, packed: Packed, tokens: int) -> int:
        """How many of `tokens` sealed tokens a latent holds that may hold only some."""
        return tokens * packed.tokens // self.sealed_tokens

    def _latents_of(self, block: list[KV], positions: Tensor) -> list[tuple[tuple[int, str], Latent]]:
        """What is to be encoded, by (first slot, role)."""
        if not self.transforms:
            pairs = enumerate(block)
            return [((i, role), Latent(getattr(kv, role))) for i, kv in pairs for role in ("keys", "values")]
        found = []
        for start, transform in self.transforms.items():
            chunk = block[start : start + (transform.layers or 1)]
            if transform.unrotated:
                chunk = [
                    replace(kv, keys=self._rope(start + i).unrotate(kv.keys, positions.to(kv.keys.device)))
                    for i, kv in enumerate(chunk)
                ]
            fitted, chunk = self._fitted(start, chunk)
            found += [((start, role), latent) for role, latent in fitted.forward(chunk).items()]
        return found

    def _fitted(self, start: int, chunk: list[KV]) -> tuple[Transform, list[KV]]:
        """The transform of a group, fitted to its text, and what it shall seal: the new tokens or, where it is fitted
        anew, the decoded ones before them too."""
        transform = self.transforms[start]
        if not self.sealed_tokens:
            fitted = transform.fit(chunk)
        elif transform.strays(chunk):
            self._latents.clear()  # decoded before tokens were evicted
            latents = self._decoded(start)
            old = [transform.inverse(latents, i) for i in range(len(chunk))]
            chunk = [_joined(was, new) for was, new in zip(old, chunk, strict=True)]
            self.sealed = {name: packed for name, packed in self.sealed.items() if name[0] != start}
            fitted = transform.fit(chunk, self.sealed_tokens)
        else:
            return transform, chunk
        self.transforms[start] = fitted
        return fitted, chunk

    def _forget_sealed(self) -> None:
        """Codes of no tokens, and what was fitted to tokens, go with the last of them: the next fit may be of another
        width."""
        if not self.sealed_tokens:
            self.sealed = {}
            self.transforms = {start: stage.hold({}) for start, stage in self.transforms.items()}

    def _rope(self, slot: int) -> Rope:
        rope = self.ropes.get(self.layers[slot])
        assert rope is not None  # checked when the stack was bound
        return rope

    # ---- reading

    def read(self, slot: int, seen: int, work: Workspace) -> KV:
        """All held tokens of one layer in position order. Views of the raw part where nothing is sealed, scratch
        memory (valid until the next read) otherwise."""
        keys, values = self._raw(slot)
        if not self.sealed_tokens:
            return KV(keys, values)
        return KV(
            *(
                self._assemble(name, raw, decode, work)
                for name, raw, decode in zip(
                    ("keys", "values"), (keys, values), self._decoders(slot, seen), strict=True
                )
            )
        )

    def _assemble(self, name: str, raw: Tensor, decode: Callable[[Tensor], object], work: Workspace) -> Tensor:
        b, h, n, d = raw.shape
        out = work.get(name, (b, h, n + self.sealed_tokens, d), raw.dtype, raw.device)
        first, second = self.sinks, self.sinks + self.sealed_tokens
        out[:, :, :first] = raw[:, :, :first]
        out[:, :, second:] = raw[:, :, first:]
        decode(out[:, :, first:second])
        return out

    def _decoders(self, slot: int, seen: int) -> tuple[Callable[[Tensor], object], Callable[[Tensor], object]]:
        """Two functions that write the sealed keys and values of a layer into a given tensor."""
        encode = self.plan.encode
        assert encode is not None
        if not self.transforms:

            def write(role: str) -> Callable[[Tensor], object]:
                return lambda out: encode.decode(self.sealed[slot, role], role, out)

            return write("keys"), write("values")
        start, transform = self._transform_of(slot)
        kv = transform.inverse(self._decoded(start), slot - start)
        keys = self._rotated(slot, kv.keys, seen)
        return lambda out: out.copy_(keys), lambda out: out.copy_(kv.values)

    def _raw(self, slot: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer.view for buffer in self.raw[slot][:2])
        return keys, values

    def _transform_of(self, slot: int) -> tuple[int, Transform]:
        """The transform that stores a layer, and the slot of its first one."""
        start = max(first for first in self.transforms if first <= slot)
        return start, self.transforms[start]

    def _decoded(self, start: int) -> dict[str, Tensor]:
        """The latents of a group of layers, decoded once per forward for all of them."""
        if start not in self._latents:
            encode = self.plan.encode
            assert encode is not None
            mine = {role: packed for (first, role), packed in self.sealed.items() if first == start}
            self._latents = {
                start: {role: (PLAIN if packed.exact else encode).decode(packed, role) for role, packed in mine.items()}
            }
        return self._latents[start]

    def _rotated(self, slot: int, keys: Tensor, seen: int, places: Tensor | None = None) -> Tensor:
        """Keys that a transform rebuilt, as attention wants them: of all sealed tokens, or of those at `places`."""
        if not self._transform_of(slot)[1].unrotated:
            return keys
        if self._sealed_positions is None:
            self._sealed_positions = self.positions(seen)[..., self.sinks : self.sinks + self.sealed_tokens]
        positions = self._sealed_positions.to(keys.device)
        rope = self._rope(slot)
        if places is not None:
            return rope.rotate(keys, positions.take_along_dim(places.to(keys.device), dim=-1))
        rope.remember(positions)
        return rope.rotate(keys, positions)

    def attend(self, slot: int, query: Tensor, seen: int, scaling: float, work: Workspace) -> tuple[Tensor, Tensor]:
        """Attention of one query per row over sealed codes and raw tokens, without a decoded copy of both.

        query (B, H*G, 1, D) -> output (B, 1, H*G, D), weights (B, H*G, 1, held) with the sealed tokens first:
        softmax does not care for their order.
        """
        keys, values = self._raw(slot)
        b, h, _, d = keys.shape
        grouped = query.reshape(b, h, -1, d) * scaling  # (B, H, G, D)
        picked = self._picked(slot, grouped, seen)
        packed = self._dot(slot, grouped, picked, seen, work)
        logits = torch.cat([packed, torch.matmul(grouped, keys.transpose(-1, -2)).to(packed.dtype)], dim=-1)
        weights = logits.softmax(dim=-1, dtype=torch.float32)
        sealed, loose = weights.tensor_split([packed.shape[-1]], dim=-1)
        mixed = self._mix(slot, sealed, picked, work)
        mixed = mixed.to(values.dtype) + torch.matmul(loose.to(values.dtype), values)
        if picked is not None:
            places = picked[1].to(sealed.device).unsqueeze(2).expand_as(sealed)
            sealed = sealed.new_zeros(*sealed.shape[:3], self.sealed_tokens).scatter_(3, places, sealed)
            weights = torch.cat([sealed, loose], dim=-1)
        return mixed.reshape(b, 1, query.shape[1], -1), weights.reshape(b, query.shape[1], 1, -1)

    def _picked(self, slot: int, query: Tensor, seen: int) -> Picked | None:
        """What the transform answers a query from, where that is not all of the sealed tokens."""
        if not self.transforms:
            return None
        start, transform = self._transform_of(slot)
        latents = self._decoded(start)
        query = query.to(next(iter(latents.values())).device)
        return transform.pick(query, latents, slot - start, lambda keys, at: self._rotated(slot, keys, seen, at))

    def _dot(self, slot: int, query: Tensor, picked: Picked | None, seen: int, work: Workspace) -> Tensor:
        """`query` (B, H, G, D) times the sealed keys: (B, H, G, sealed or picked)."""
        encode = self.plan.encode
        assert encode is not None
        if not self.transforms:
            return encode.dot(query, self.sealed[slot, "keys"], "keys", work)
        start, transform = self._transform_of(slot)
        latents, places = picked or (self._decoded(start), None)
        keys = self._rotated(slot, transform.keys(latents, slot - start), seen, places)
        return torch.matmul(query.float(), keys.transpose(-1, -2).to(query.device, torch.float32))

    def _mix(self, slot: int, weights: Tensor, picked: Picked | None, work: Workspace) -> Tensor:
        """`weights` (B, H, G, sealed or picked) times the sealed values: (B, H, G, D)."""
        encode = self.plan.encode
        assert encode is not None
        if not self.transforms:
            return encode.mix(weights, self.sealed[slot, "values"], "values", work)
        start, transform = self._transform_of(slot)
        latents = picked[0] if picked else self._decoded(start)
        there = next(iter(latents.values())).device  # layers of a group may live on several devices
        return transform.weigh(weights.to(there), latents, slot - start).to(weights.device)

    def in_order(self, weights: Tensor) -> Tensor:
        """`weights` of `attend`, their last axis in the order of positions."""
        sealed, sinks = self.sealed_tokens, self.sealed_tokens + self.sinks
        return torch.cat([weights[..., sealed:sinks], weights[..., :sealed], weights[..., sinks:]], dim=-1)

    def end_forward(self) -> None:
        """Drop what was decoded for all layers of a group."""
        self._latents.clear()
        if self._sealed_positions is not None:
            self._sealed_positions = None
            for slot in range(len(self.layers)):
                self._rope(slot).forget()

    # ---- rows and crops

    def rows(self, index: Tensor) -> Store:
        """A store with the batch rows at `index`; nothing is shared with this one."""
        other = Store(self.plan, self.layers, self.ropes)
        other.sealed_tokens, other.dirty = self.sealed_tokens, self.dirty

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index.to(x.device))

        for buffers, old_buffers in zip(other.raw, self.raw, strict=True):
            for new, old in zip(buffers, old_buffers, strict=True):
                if old.tensors:
                    new.replace(old.view.index_select(0, index.to(old.view.device)))
        other.sealed = {name: packed.rows(index) for name, packed in self.sealed.items()}
        for start, stage in self.transforms.items():
            if stage.fitted:
                fitted = {name: x.index_select(0, index.to(x.device)) for name, x in stage.fitted.items()}
                other.transforms[start] = stage.hold(fitted)
        other.kept = pick(self.kept)
        other.recent = [pick(x) for x in self.recent]
        other.memory = [{name: x.index_select(0, index.to(x.device)) for name, x in m.items()} for m in self.memory]
        return other

    def older_than(self, limit: int, seen: int) -> int:
        """How many middle tokens every head holds whose position is below `limit`."""
        if not self.held:
            return 0
        middle = self.positions(seen)[..., self.sinks : self.held]
        return int((middle < limit).sum(-1).min())

    def crop(self, seen: int, remove: int, stay: int) -> None:
        """Forget the newest `remove` of `seen` tokens. `stay` tokens beside the sinks are left, in every layer."""
        limit = seen - remove
        sinks = min(self.sinks, limit)
        granule = self.plan.granule(self.raw[0][0].view.shape[-1])
        whole = min(self.sealed_tokens, stay) // granule * granule
        rest = max(0, min(self.sealed_tokens, stay) - whole)
        loose = max(0, stay - self.sealed_tokens)  # raw tokens beside the sinks that stay
        if rest:  # the crop cuts through a granule: what stays of it becomes raw again
            if self.plan.hidden:
                raise UseError(
                    f"{self.plan.transform!r} merges hidden states, and those of compressed tokens are gone: crop "
                    f"back to a multiple of {granule} compressed tokens, or use merge='project'."
                )
            work, start = Workspace(), self.sinks + whole
            index = torch.arange(start, start + rest, device=self.raw[0][0].view.device)[None, None]
            thawed = [self.read(slot, seen, work).take(index) for slot in range(len(self.raw))]
            for (keys, values, *_), kv in zip(self.raw, thawed, strict=True):
                keys.replace(torch.cat([keys.view[:, :, :sinks], kv.keys], dim=2))
                values.replace(torch.cat([values.view[:, :, :sinks], kv.values], dim=2))
        else:
            for pair in self.raw:
                for buffer in pair:
                    buffer.truncate(sinks + loose)
        self._forget_memory(sinks + stay)
        if self.kept is not None:
            self.kept = self.kept[..., : min(self.kept.shape[-1], stay)].clone()
        if whole < self.sealed_tokens:
            self.sealed = {name: packed.first(self._share(packed, whole)) for name, packed in self.sealed.items()}
            self.sealed_tokens = whole
            self._forget_sealed()
        self.recent = [None if x is None or x.shape[2] <= remove else x[:, :, :-remove].clone() for x in self.recent]
        self.end_forward()

    def _keep_memory(self, stay: Tensor) -> None:
        first, last = self.sinks, self.sinks + self.sealed_tokens + self.middle
        for memory in self.memory:
            for name, x in memory.items():
                middle = take_tokens(x[:, :, first:last], stay)
                memory[name] = torch.cat([x[:, :, :first], middle, x[:, :, last:]], dim=2)

    def _forget_memory(self, tokens: int) -> None:
        for memory in self.memory:
            for name, x in memory.items():
                memory[name] = x[:, :, :tokens].clone()

    # ---- bytes

    def parts(self) -> list[tuple[str, str, Tensor]]:
        """Every tensor held, as (who pays for it, part, tensor)."""
        found: list[tuple[str, str, Tensor]] = []
        for pair in self.raw:
            found += [(*RAW, tensor) for buffer in pair for tensor in buffer.tensors]
        for (_, role), packed in self.sealed.items():
            own = packed.exact or isinstance(self.plan.encode, Plain)  # no encoder of the user's had a part in it
            payer = repr(self.plan.transform if own else self.plan.encode)
            found += [(payer, f"{role}: {part}", tensor) for part, tensor in packed.parts.items()]
        for stage in self.transforms.values():
            found += [(repr(self.plan.transform), "bases", x) for x in stage.fitted.values()]
        chooser = repr(self.plan.select)
        if self.kept is not None:
            found.append((chooser, "positions", self.kept))
        found += [(chooser, name, x) for memory in self.memory for name, x in memory.items()]
        found += [(chooser, "recent queries", x) for x in (*self.recent, *self.fresh) if x is not None]
        return found

    def raw_bytes(self) -> list[tuple[str, int]]:
        """What the raw buffers spend on sinks, window, the tail between them, and reserve."""
        found: list[tuple[str, int]] = []
        for buffer in (buffer for pair in self.raw for buffer in pair):
            whole = storage_bytes(buffer.tensors)
            token = buffer.view[:, :, :1].numel() * buffer.view.element_size() if buffer.length else 0
            window = min(self.plan.window, buffer.length - self.sinks)
            tokens = {"sinks": self.sinks, "window": window, "tail": buffer.length - self.sinks - window}
            found += [(name, n * token) for name, n in tokens.items()]
            found.append(("reserve", whole - buffer.length * token))
        return found


def _joined(old: KV, new: KV) -> KV:
    """Decoded tokens, followed by new ones; they are where the new ones are."""
    keys = torch.cat([old.keys.to(new.keys), new.keys], dim=2)
    return KV(keys, torch.cat([old.values.to(new.values), new.values], dim=2))
