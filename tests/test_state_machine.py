"""Random conversations, beside a slow cache made of lists.

The list cache remembers every key and value that was ever handed to the stack, token by token. Whatever the
stack does, each token it still holds must be the one with that position, exactly where it is raw and within half
a step where it is quantized; lengths, budget, sinks and window must hold.
"""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from hypothesis.stateful import (
    run_state_machine_as_test as check_machine,
)

from kvstack import CommonKV, Evict, KVStack, Quant, Tiers, Transform
from tests import tiny
from tests.stages import Centred, Pairs, Third
from tests.test_numbering import turned

SINKS, WINDOW, BLOCK = 2, 6, 8
LAYERS = 2

STACKS = {
    "empty": [],
    "quant8": [Quant(8, group=8)],
    "quant3": [Quant(3, group=8)],
    "evict_share": [Evict(0.4)],
    "evict_heads": [Evict(0.4, layers=1)],
    "evict_count": [Evict(10, "h2o")],
    "quant_evict": [Quant(8, group=8), Evict(0.5, layers=1)],
    "kvzip": [Evict(0.4, "kvzip")],
    "quant_kvzip": [Quant(8, group=8), Evict(0.5, "kvzip")],
    "quant_count": [Evict(20, "keydiff", layers=2), Quant(4, group=8)],
    "transform": [Pairs(), Quant(8, group=8), Evict(0.5)],
    "commonkv": [CommonKV(1.0, layers=2), Evict(0.5)],
    "tiers": [CommonKV(1.0, layers=2), Quant(8), Tiers("keydiff", shares=(0.25, 0.75), weights=(2, 1))],
    "tiers_queries": [CommonKV(1.0, layers=2), Quant(8), Tiers("snapkv", shares=(0.5, 0.3, 0.2), weights=(2, 1, 1))],
    "shares": [Third(1, 0), Quant(8, group=8), Evict(0.5)],
    "fitted": [Centred(far=1.0), Evict(0.5)],
    "fitted_once": [Centred(once=True), Evict(0.5)],
    "places": [Evict(10, "keydiff", positions="cache")],
    "places_transform": [Pairs(), Evict(0.5, positions="cache")],
}


class Listed(KVStack):
    """A stack that copies all it is given into lists: rows[row][layer] is a list of (key, value, place in the cache),
    one for each token."""

    rows: list
    before: list

    least, most = 0.0, 0.0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.batch.reading:  # a second time: nothing of it stays
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.least = min(self.least, float(key_states.min()), float(value_states.min()))
        self.most = max(self.most, float(key_states.max()), float(value_states.max()))
        for row, layers in enumerate(self.rows):
            new = self.real[row]
            for token in range(key_states.shape[2] - new, key_states.shape[2]):
                place = self.before[row] + token - (key_states.shape[2] - new)
                layers[layer_idx].append(
                    (key_states[row, :, token].clone(), value_states[row, :, token].clone(), place)
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Conversation(RuleBasedStateMachine):
    stages: list

    @initialize(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3))
    def begin(self, lengths):
        self.model = tiny.model("llama", num_hidden_layers=LAYERS)
        self.stack = Listed(self.stages, sinks=SINKS, window=WINDOW, block=BLOCK)
        self.stack.rows = [[[] for _ in range(LAYERS)] for _ in lengths]
        self.mask = torch.zeros(len(lengths), 0, dtype=torch.long)
        self.steps = self.crops = 0
        if not self.stages:
            lengths = [max(lengths)] * len(lengths)  # without stages padding is held like any token
        ids, mask = tiny.left_padded(lengths, seed=7)
        self.feed(ids, mask)

    def feed(self, ids, mask):
        self.steps += 1
        self.just_cropped = False
        self.mask = torch.cat([self.mask, mask], dim=1)
        self.stack.real = mask.sum(1).tolist()
        known = range(len(mask)) if self.stack.seen else ()
        self.stack.before = [self.stack.positions(0, row).shape[-1] for row in known] or [0] * len(mask)
        places = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            self.model(ids, attention_mask=self.mask, past_key_values=self.stack, position_ids=places)

    def lengths(self):
        return [len(layers[0]) for layers in self.stack.rows]

    @rule(count=st.integers(1, 12))
    def decode(self, count):
        for _ in range(count):
            rows = len(self.stack.rows)
            self.feed(tiny.tokens(rows, 1, seed=self.steps), torch.ones(rows, 1, dtype=torch.long))

    @rule(length=st.integers(2, 40))
    def turn(self, length):
        rows = len(self.stack.rows)
        self.feed(tiny.tokens(rows, length, seed=self.steps), torch.ones(rows, length, dtype=torch.long))

    @precondition(lambda self: self.stages)
    @rule(data=st.data())
    def padded_turn(self, data):
        lengths = [data.draw(st.integers(1, 12)) for _ in self.stack.rows]
        self.feed(*tiny.left_padded(lengths, seed=self.steps))

    @rule(data=st.data())
    def crop(self, data):
        columns = self.mask.shape[1]
        most = max(n for n in range(min(columns, 21)) if bool(self.mask[:, : columns - n].any(1).all()))
        remove = data.draw(st.integers(0, most))
        self.stack.crop(-remove)
        if remove:
            self.crops += 1
            self.just_cropped = True
            # columns go, as in a dense cache: of a row whose last turn was padded, fewer tokens
            gone = self.mask[:, columns - remove :].sum(1).tolist()
            self.mask = self.mask[:, :-remove]
            for layers, tokens_gone in zip(self.stack.rows, gone, strict=True):
                for tokens in layers:
                    del tokens[len(tokens) - tokens_gone :]

    def choose_rows(self, indices):
        self.stack.rows = [copy.deepcopy(self.stack.rows[i]) for i in indices]
        self.mask = self.mask[indices]

    @rule(data=st.data())
    def reorder(self, data):
        rows = len(self.stack.rows)
        indices = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        self.stack.reorder_cache(torch.tensor(indices))
        self.choose_rows(indices)

    @precondition(lambda self: len(self.stack.rows) < 4)
    @rule()
    def repeat(self):
        rows = len(self.stack.rows)
        self.stack.batch_repeat_interleave(2)
        self.choose_rows([i for i in range(rows) for _ in range(2)])

    @rule(data=st.data())
    def select(self, data):
        rows = len(self.stack.rows)
        indices = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
        self.stack.batch_select_indices(torch.tensor(indices))
        self.choose_rows(indices)

    @rule()
    def go_on_with_a_copy(self):
        """The copy goes on; the original must not notice."""
        old = self.stack
        before = [old.read(layer, 0).keys for layer in range(LAYERS)]
        new = copy.deepcopy(old)
        made = Listed(self.stages, sinks=SINKS, window=WINDOW, block=BLOCK, model=self.model)
        made.__dict__.update({k: v for k, v in new.__dict__.items() if k not in ("_finish", "_disarm")})
        made.rows = copy.deepcopy(old.rows)
        self.stack = made
        self.decode(3)
        after = [old.read(layer, 0).keys for layer in range(LAYERS)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))

    @rule()
    def reset(self):
        self.stack.reset()
        rows = len(self.stack.rows)
        self.stack.rows = [[[] for _ in range(LAYERS)] for _ in range(rows)]
        self.mask = self.mask[:, :0]
        self.feed(tiny.tokens(rows, 20, seed=self.steps), torch.ones(rows, 20, dtype=torch.long))

    @invariant()
    def holds_what_it_was_given(self):
        if not hasattr(self, "stack"):
            return
        for row, layers in enumerate(self.stack.rows):
            for layer in range(LAYERS):
                tokens = layers[self.stack.binding.shares.get(layer, layer)]
                held = self.stack.positions(layer, row).long()
                kv = self.stack.read(layer, row)
                assert held.shape[-1] == kv.tokens
                assert bool((held.diff(dim=-1) > 0).all())
                # a crop may reach back to tokens that some head had evicted
                assert int(held.max()) <= len(tokens) - 1 if self.crops else int(held.max()) == len(tokens) - 1
                keys = torch.stack([key for key, _, _ in tokens], dim=1)  # (H, T, D)
                values = torch.stack([value for _, value, _ in tokens], dim=1)
                index = held.expand(keys.shape[0], -1)[..., None]
                keys = keys.gather(1, index.expand(-1, -1, keys.shape[2]))
                if any(isinstance(stage, Evict) and stage.positions == "cache" for stage in self.stages):
                    places = torch.tensor([place for _, _, place in tokens])
                    now = places[-1] - held.shape[-1] + 1 + torch.arange(held.shape[-1])
                    keys = turned(self.model, keys[None], now - places[index[..., 0]])[0].to(keys)
                self.compare(kv.keys[0], keys)
                self.compare(kv.values[0], values.gather(1, index.expand(-1, -1, values.shape[2])))

    def compare(self, held, given):
        bits = next((stage.bits for stage in self.stages if isinstance(stage, Quant)), None)
        if bits is None:
            moves = any(isinstance(stage, Evict) and stage.positions == "cache" for stage in self.stages)
            exact = not moves and not any(isinstance(stage, Transform) for stage in self.stages)
            assert torch.equal(held, given) if exact else torch.allclose(held, given, atol=2e-3, rtol=1e-3)
            return
        if any(isinstance(stage, Tiers) for stage in self.stages):
            # codes of channels have no bound for a single number; another token in its place is all wrong
            rounds = 1 + self.crops
            assert float((held - given).norm()) <= 0.02 * rounds * float(given.norm())
            return
        # no group spans more than all numbers do; un-rotated keys span more, and two latents bring two errors
        span = (self.stack.most - self.stack.least) * (2.9 if Pairs() in self.stages else 1)
        # a crop through a granule makes its tokens raw again, so they may be encoded once more
        rounds = 1 + self.crops
        assert float((held - given).abs().max()) <= span / (2**bits - 1) / 2 * rounds + 1e-3 * span

    @invariant()
    def holds_no_more_than_its_budget(self):
        if not hasattr(self, "stack") or self.just_cropped:
            return  # a cropped text has a smaller budget, which the next forward enforces
        for row, length in enumerate(self.lengths()):
            held = self.stack.positions(0, row).shape[-1]
            keep = next((stage.keep for stage in self.stages if isinstance(stage, Evict)), 1.0)
            middle = max(0, length - SINKS - WINDOW)
            budget = min(middle, keep) if isinstance(keep, int) else keep * middle
            assert held <= budget + SINKS + WINDOW + 1e-6

    @invariant()
    def sinks_and_window_survive(self):
        if not hasattr(self, "stack") or self.just_cropped or self.crops:
            return  # tokens evicted before a crop cannot come back into the window
        for row, length in enumerate(self.lengths()):
            ends = torch.cat([torch.arange(min(SINKS, length)), torch.arange(max(0, length - WINDOW), length)])
            for held in self.stack.positions(0, row):
                assert bool(torch.isin(ends, held.long()).all())

    @invariant()
    def bytes_are_those_of_its_tensors(self):
        if hasattr(self, "stack"):
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage()
                for t in tensors_in([self.stack.batch.cohorts, self.stack.batch.ids])
            }
            assert self.stack.nbytes == sum(storage.nbytes() for storage in storages.values())


def tensors_in(thing, seen=None):
    """All tensors reachable from `thing`, found without kvstack's help; row numbers are not what is cached, and what
    was fitted to the model (codecs), not to the text, belongs to all its caches."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for name, value in thing.items():
            if name == "codec":
                yield from getattr(value, "fitted", {}).values()
            elif name not in ("rows", "ropes", "plan", "codecs"):
                yield from tensors_in(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_in(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from tensors_in(vars(thing), seen)


@pytest.mark.parametrize("name", STACKS)
def test_conversations(name):
    machine = type(f"Conversation_{name}", (Conversation,), {"stages": STACKS[name]})
    check_machine(machine, settings=settings(max_examples=10, stateful_step_count=10, deadline=None))
