"""Forks of a stack: bit for bit what copies are, without a copy, and none of them sees what becomes of another."""

import copy
import importlib.util
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstack import CommonKV, Evict, KVStack, Quant, Tiers, UseError, nbytes_of
from kvstack.spec import parse
from kvstack.testing import tiny_model
from tests import tiny
from tests.stages import Centred, Pairs, Third

SMALL = {"sinks": 2, "window": 6, "block": 8}
GROUPED = Quant(4, group=8)
STACKS = {
    "empty": ("llama", []),
    "quant": ("llama", [GROUPED]),
    "nf4": ("llama", [Quant(4, codec="nf4")]),
    "h2o": ("llama", [Evict(0.4, "h2o"), GROUPED]),
    "refit": ("llama", [Evict(0.4, refit=True), GROUPED]),
    "count": ("llama", [Evict(20, "keydiff", layers=2)]),
    "budgets": ("llama", [Evict(0.4, budgets="heads"), GROUPED]),
    "places": ("llama", [Evict(20, "keydiff", positions="cache")]),
    "places_sealed": ("llama", [Pairs(), Evict(0.4, positions="cache")]),
    "transform": ("llama", [Pairs(), Quant(8, group=8), Evict(0.5)]),
    "commonkv": ("llama", [CommonKV(0.5, layers=2), Quant(2), Evict(0.5)]),
    "merged": ("llama", [CommonKV(0.5, layers=2, basis="weights", merge="mean")]),
    "tiers": ("llama", [CommonKV(1.0, layers=2), Quant(8), Tiers("keydiff", shares=(0.25, 0.75), weights=(2, 1))]),
    "shares": ("llama", [Third(3, 1), GROUPED]),
    "fitted": ("llama", [Centred(far=1.0), Evict(0.5)]),
    "sliding": ("gemma3", [GROUPED]),
    "states": ("qwen3_next", [Quant(4, group=8), Evict(0.5)]),
    "rotation": ("phi3", [CommonKV(0.5, layers=2), GROUPED]),
}
PLUGINS = {
    "kvtc": "kvtc",
    "minicache": "minicache+quant:8",
    "xkv": "xkv:layers=2+quant:8",
    "kvsharer": "kvsharer:0.5,threshold=-1.0",
}
STACKS |= {name: ("llama", spec) for name, spec in PLUGINS.items() if importlib.util.find_spec(f"kvstack_{name}")}


def filled_by(name):
    """The model of a stack's line in the table, and the stages."""
    architecture, stages = STACKS[name]
    return tiny.model(architecture), parse(stages)[0] if isinstance(stages, str) else stages


def read(model, ids, mask, *stacks):
    """Logits of new tokens (rows, n), the same for all `stacks`; the mask is of the whole text."""
    found = []
    for stack in stacks:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            found.append(model(ids, attention_mask=mask, past_key_values=stack, position_ids=positions).logits)
    assert all(torch.equal(found[0], logits) for logits in found)
    return found[0]


def content(stack):
    """All that a stack holds: positions, and keys and values of each row and head."""
    for layer in stack.compressed_layers:
        for row in range(stack.batch_size):
            for head in range(stack.batch.shape_of(layer, "keys")[0][1]):
                kv = stack.read(layer, row, head)
                yield from (stack.positions(layer, row, head), kv.keys, kv.values)


def equal(one, other):
    pairs = list(zip(content(one), content(other), strict=True))
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


class Branch:
    """A fork, the copy that it must be equal to, and the mask of their text."""

    def __init__(self, model, stack, copied, mask):
        self.model, self.stack, self.copied, self.mask = model, stack, copied, mask

    @property
    def both(self):
        return self.stack, self.copied

    def feed(self, length, seed, pads=0):
        ids = tiny.tokens(len(self.mask), length, seed)
        mask = torch.ones_like(ids)
        mask[0, :pads] = 0
        self.mask = torch.cat([self.mask, mask], dim=1)
        read(self.model, ids, self.mask, *self.both)

    def act(self, what, n, seed):
        getattr(self, what)(n, seed)

    def decode(self, n, seed):
        for i in range(n):
            self.feed(1, seed + i)

    def turn(self, n, seed):
        self.feed(n + 2, seed, pads=seed % 3)

    def crop(self, n, seed):
        columns = self.mask.shape[1]
        n = max(k for k in range(n + 1) if bool(self.mask[:, : columns - k].any(1).all()))
        refused = 0
        for stack in self.both:
            try:
                stack.crop(-n)
            except (UseError, RuntimeError, ValueError):  # states and sliding windows are not taken back
                refused += 1
        assert refused in (0, 2)
        if n and not refused:
            self.mask = self.mask[:, :-n]

    def rows(self, n, seed):
        rows = torch.tensor([seed % len(self.mask), *range(len(self.mask))][: max(1, n % 3)])
        for stack in self.both:
            stack.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def reorder(self, n, seed):
        rows = torch.arange(len(self.mask)).flip(0)
        for stack in self.both:
            stack.reorder_cache(rows)
        self.mask = self.mask[rows]

    def fork(self, n, seed):
        self.stack, self.copied = self.stack.fork(), copy.deepcopy(self.copied)

    def reset(self, n, seed):
        for stack in self.both:
            stack.reset()
        self.mask = self.mask[:, :0]
        self.feed(20, seed)


ACTS = st.tuples(
    st.integers(0, 1),
    st.sampled_from(["decode", "turn", "crop", "rows", "reorder", "fork", "reset"]),
    st.integers(1, 20),
    st.integers(0, 99),
)


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(30, 60), min_size=1, max_size=2), acts=st.lists(ACTS, min_size=2, max_size=8))
def test_a_fork_is_a_copy_and_disturbs_nobody(name, lengths, acts):
    model, stages = filled_by(name)
    stack = KVStack(stages, model=model, **SMALL)
    lengths = lengths if stages and STACKS[name][0] == "llama" else [max(lengths)] * len(lengths)
    ids, mask = tiny.left_padded(lengths)
    read(model, ids, mask, stack)
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
    read(model, ids[:, -1:], mask, stack)  # so that buffers have room behind their tokens
    copies = copy.deepcopy(stack), copy.deepcopy(stack)
    branches = [Branch(model, stack, copies[0], mask), Branch(model, stack.fork(), copies[1], mask)]
    for which, what, n, seed in acts:
        branches[which].act(what, n, seed)
        assert all(equal(*branch.both) for branch in branches)


@pytest.mark.parametrize("name", STACKS)
def test_forking_takes_no_memory(name):
    model, stages = filled_by(name)
    stack = KVStack(stages, model=model, **SMALL)
    read(model, tiny.tokens(2, 200), torch.ones(2, 200, dtype=torch.long), stack)
    branches = [stack.fork() for _ in range(4)]
    assert len({branch.nbytes for branch in branches}) == 1
    # states of linear attention are written to, so each branch has its own
    states = name == "states"
    assert (nbytes_of([stack, *branches]) == stack.nbytes) != states
    assert nbytes_of([stack, *branches]) - stack.nbytes <= 4 * (stack.nbytes if states else 0)


def test_compressed_tokens_are_shared_until_a_branch_compresses_a_block():
    model = tiny.model("llama")
    stack = KVStack([Quant(4)], model=model, block=128)
    ids = tiny.tokens(1, 2000)
    with torch.no_grad():
        model(ids, past_key_values=stack)
    sealed = sum(part.nbytes for part in stack.report().parts if part.payer != "stack")
    assert sealed > 0.6 * stack.nbytes
    branches = [stack.fork() for _ in range(3)]
    settings = {"do_sample": False, "max_new_tokens": 40}
    for seed, branch in enumerate(branches):
        model.generate(torch.cat([ids, tiny.tokens(1, 10, seed)], dim=1), past_key_values=branch, **settings)
    raw = stack.nbytes - sealed
    assert 0 < nbytes_of([stack, *branches]) - stack.nbytes < 3 * 2 * raw
    whole = branches[0]
    mask = torch.ones(1, whole.seen + 120, dtype=torch.long)
    read(model, tiny.tokens(1, 120), mask, whole)
    assert nbytes_of([stack, whole]) - stack.nbytes > sealed


def test_a_branch_may_be_all_that_is_left():
    model = tiny.model("llama")
    ids = tiny.tokens(1, 300)
    stack = KVStack([GROUPED, Evict(0.5)], model=model, **SMALL)
    read(model, ids, torch.ones_like(ids), stack)
    branch, copied = stack.fork(), copy.deepcopy(stack)
    stack.reset()
    assert nbytes_of([stack]) == 0
    assert equal(branch, copied)
    del stack
    read(model, tiny.tokens(1, 20), torch.ones(1, 320, dtype=torch.long), branch, copied)
    assert equal(branch, copied)


def test_a_branch_is_saved_and_loaded(tmp_path):
    model = tiny.model("llama")
    stack = KVStack([GROUPED], model=model, **SMALL)
    read(model, tiny.tokens(1, 100), torch.ones(1, 100, dtype=torch.long), stack)
    branch = stack.fork()
    branch.save(tmp_path / "branch.safetensors")
    assert equal(KVStack.load(tmp_path / "branch.safetensors", model=model), stack)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_and_all_ways_to_generate(dtype):
    model = tiny.model("llama", dtype=dtype)
    ids, more = tiny.tokens(1, 150), tiny.tokens(1, 9, seed=1)
    stack = KVStack([GROUPED, Evict(0.5)], model=model, **SMALL)
    read(model, ids, torch.ones_like(ids), stack)
    before = copy.deepcopy(stack)
    for name, mode in tiny.MODES.items():
        if name == "prompt_lookup":  # reads the whole text again
            continue
        found = []
        for branch in (stack.fork(), copy.deepcopy(stack)):
            rows = mode.get("num_beams", mode.get("num_return_sequences", 1))
            branch.batch_repeat_interleave(rows)
            torch.manual_seed(0)
            text = torch.cat([ids, more], dim=1)
            found.append(model.generate(text, past_key_values=branch, max_new_tokens=20, **mode))
        assert torch.equal(*found)
        assert equal(stack, before)


def test_eager_attention_gives_the_same_weights():
    model = tiny.model("llama", "eager")
    ids = tiny.tokens(1, 100)
    stack = KVStack([GROUPED, Evict(0.5)], model=model, **SMALL)
    with torch.no_grad():
        model(ids, past_key_values=stack)
        found = [
            model(tiny.tokens(1, 1), past_key_values=one, output_attentions=True).attentions
            for one in (stack.fork(), copy.deepcopy(stack))
        ]
    assert all(torch.equal(*weights) for weights in zip(*found, strict=True))


def test_a_fork_of_assisted_decoding_waits_for_crop():
    model = tiny.model("llama")
    stack = KVStack([GROUPED, Evict(0.5)], model=model, **SMALL)
    stack.activate_past_recording()
    read(model, tiny.tokens(1, 100), torch.ones(1, 100, dtype=torch.long), stack)
    branch, copied = stack.fork(), copy.deepcopy(stack)
    for one in (branch, copied):
        one.crop(-3)
    assert equal(branch, copied)
    assert (stack.seen, stack.held, branch.seen) == (100, 100, 97)


def test_a_stack_that_holds_nothing_and_one_without_a_model():
    model, ids = tiny.model("llama"), tiny.tokens(1, 80)
    for stack in (KVStack([GROUPED], **SMALL), KVStack([GROUPED], model=model, **SMALL)):
        branch = stack.fork()
        read(model, ids, torch.ones_like(ids), branch, stack)
        assert equal(branch, stack)
    unbound = KVStack([GROUPED], **SMALL)
    keys = torch.randn(1, 2, 40, 16)
    for layer in range(2):
        unbound.update(keys, keys, layer)
    branch, copied = unbound.fork(), copy.deepcopy(unbound)
    for one in (branch, copied):
        one.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert torch.equal(branch.read(0).keys, copied.read(0).keys)
    assert unbound.read(0).tokens == 40


def test_a_fork_made_in_inference_mode_goes_on_outside():
    model, ids = tiny.model("llama"), tiny.tokens(1, 300)
    with torch.inference_mode():
        stack = KVStack([GROUPED], model=model, **SMALL)
        model(ids, past_key_values=stack)
        branch = stack.fork()
    mask = torch.ones(1, 340, dtype=torch.long)
    read(model, tiny.tokens(1, 40), mask, branch, copy.deepcopy(stack))
    assert stack.seen == 300


def test_a_stopped_stack_cannot_be_forked():
    model, ids = tiny_model(), tiny.tokens(1, 50)
    stack = KVStack([GROUPED], model=model)
    layer = model.model.layers[2].mlp

    def stop(*args):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=stack)
    handle.remove()
    with pytest.raises(UseError, match=r"did not end.* Call reset\(\)"):
        stack.fork()


def test_branches_grow_in_several_threads():
    """They may write into the same buffers: only one of them gets the room that is left there."""
    model = tiny.model("llama")
    stack = KVStack([Quant(4)], model=model, sinks=2, window=8, block=8)
    ids = tiny.tokens(1, 3000)
    with torch.no_grad():
        model(ids, past_key_values=stack)
        for seed in range(20):  # sealed while decoding, so there is room behind the codes
            model(tiny.tokens(1, 1, seed), past_key_values=stack)
    text = torch.cat([ids, *(tiny.tokens(1, 1, seed) for seed in range(20))], dim=1)
    questions = [torch.cat([text, tiny.tokens(1, 5, seed)], dim=1) for seed in range(4)]
    settings = {"max_new_tokens": 30, "do_sample": False}
    expected = [model.generate(ids, past_key_values=copy.deepcopy(stack), **settings) for ids in questions]
    found = [None] * len(questions)
    branches = [stack.fork() for _ in questions]

    def answer(i):
        found[i] = model.generate(questions[i], past_key_values=branches[i], **settings)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=answer, args=(i,)) for i in range(len(questions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
