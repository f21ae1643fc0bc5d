"""Packed tokens beside plain tensors: whatever is appended, taken, cropped or copied, and whoever shares a buffer."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvstack import KVStack
from kvstack import packed as packing
from kvstack.encode.channel_codes import ChannelCodes
from kvstack.encode.exact import EXACT
from kvstack.encode.quant import Quant
from kvstack.packed import SPARE, storage_bytes
from tests import tiny

GRANULE = 8
BITS = torch.tensor([5, 3, 3, 1] * 4, dtype=torch.uint8).sort(descending=True).values
ENCODERS = {
    "kivi": Quant(4, group=8),
    "channels": ChannelCodes(torch.ones(len(BITS)), BITS),
    "exact": EXACT,
}


def block(encoder, granules, rows, heads, seed, scale=1.0):
    x = torch.randn(rows, heads, granules * GRANULE, 16, generator=torch.Generator().manual_seed(seed))
    return encoder.encode(scale * x, "keys")


def as_they_are(packed):
    """Copies of the parts, which nobody else can write to."""
    return {name: part.clone(memory_format=torch.contiguous_format) for name, part in packed.parts.items()}


def assert_equal(packed, parts):
    assert packed.parts.keys() == parts.keys()
    for name, part in packed.parts.items():
        assert part.dtype == parts[name].dtype
        assert torch.equal(part, parts[name])


def joined(parts, newer):
    return {name: torch.cat([part, newer.parts[name]], dim=2) for name, part in parts.items()}


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "take", "first", "rows", "copy", "compact"]),
        st.sampled_from([0, 0, 1, 2, 5]),  # of which of those that are there, the newest first
        st.integers(1, 3),  # granules that are appended
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=25,
)


@given(
    kind=st.sampled_from(list(ENCODERS)),
    rows=st.integers(1, 2),
    heads=st.integers(1, 2),
    share=st.sampled_from([1, 2, 4, SPARE]),
    moves=MOVES,
)
def test_any_moves_give_what_plain_tensors_give(kind, rows, heads, share, moves):
    """All that was ever made is kept, with a copy of it: nobody writes into what another one holds."""
    encoder = ENCODERS[kind]
    first = block(encoder, 8, rows, heads, 0)
    first = first.with_room(first.tokens // share // GRANULE * GRANULE)
    held = [(first, as_they_are(first))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SPARE", share)
        for move, which, granules, seed in moves:
            made = moved(encoder, *held[-1 - which % len(held)], move, granules, seed)
            held.append(made)
            for packed, parts in held:
                assert_equal(packed, parts)
                needed = sum(part.numel() * part.element_size() for part in parts.values())
                assert storage_bytes(list(packed.parts.values())) <= needed * (1 + 1 / share)


def moved(encoder, packed, parts, move, granules, seed):
    """What a move makes of packed tokens, and of the plain tensors that stand for them."""
    rows, heads = next(iter(parts.values())).shape[:2]
    count = packed.tokens // GRANULE
    draw = torch.Generator().manual_seed(seed)
    if move == "append":
        newer = block(encoder, granules, rows, heads, seed, scale=1e6 if seed % 7 == 0 else 1.0)
        return packed.append(newer, spare=seed % 5 > 0), joined(parts, newer)
    if move == "take":
        index = torch.randperm(count, generator=draw)[: max(1, count // 2)].sort().values
        units = {n: x.unflatten(2, (count, -1))[:, :, index].flatten(2, 3) for n, x in parts.items()}
        return packed.take(index[None, None], GRANULE), units
    if move == "first":
        left = seed % count + 1
        units = {n: x.unflatten(2, (count, -1))[:, :, :left].flatten(2, 3) for n, x in parts.items()}
        return packed.first(left * GRANULE), units
    if move == "rows":
        index = torch.randint(rows, (rows,), generator=draw)
        return packed.rows(index), {n: x[index] for n, x in parts.items()}
    if move == "copy":
        return copy.deepcopy(packed), parts
    return packed.compact(), parts


def test_two_that_grow_from_one_do_not_write_into_each_other():
    encoder = ENCODERS["kivi"]
    one = block(encoder, 4, 1, 2, 0).with_room(4 * GRANULE)
    left, right = block(encoder, 1, 1, 2, 1), block(encoder, 1, 1, 2, 2)
    first = one.append(left)
    second = one.append(right)
    assert first.parts["codes"].data_ptr() == one.parts["codes"].data_ptr() != second.parts["codes"].data_ptr()
    assert_equal(first, joined(as_they_are(one), left))
    assert_equal(second, joined(as_they_are(one), right))


def test_parts_that_were_replaced_are_not_taken_for_those_in_the_buffer():
    encoder = ENCODERS["exact"]
    one, newer = block(encoder, 4, 1, 2, 0).with_room(4 * GRANULE), block(encoder, 1, 1, 2, 1)
    other = packing.replace(one, parts={"data": -one.parts["data"]})
    assert_equal(other.append(newer), joined(as_they_are(other), newer))


def test_a_buffer_made_in_inference_mode_is_not_written_to_outside_of_it():
    encoder = ENCODERS["exact"]
    with torch.inference_mode():
        one = block(encoder, 4, 1, 2, 0).with_room(4 * GRANULE)
    newer = block(encoder, 1, 1, 2, 1)
    assert_equal(one.append(newer), joined(as_they_are(one), newer))


@pytest.mark.parametrize("heads", [1, 3])
def test_who_does_not_ask_for_room_gets_parts_as_they_are_read(heads):
    encoder = ENCODERS["kivi"]
    packed = block(encoder, 2 * SPARE, 2, heads, 0)
    for seed in range(3):
        packed = packed.append(block(encoder, 1, 2, heads, seed))
        assert all(part.is_contiguous() for part in packed.parts.values())
    assert storage_bytes(list(packed.parts.values())) == sum(x.nbytes for x in packed.parts.values())


ATEN = torch.ops.aten
WRITES_NOTHING = (ATEN.slice.Tensor, ATEN.alias.default, ATEN.new_empty.default)


class Copied(TorchDispatchMode):
    """Counts the numbers that operators write."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numbers += out.numel() if isinstance(out, torch.Tensor) and function not in WRITES_NOTHING else 0
        return out


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_long_text_copies_each_token_a_bounded_number_of_times(kind):
    """Not once for every block behind it: of so many blocks, that would be many times more."""
    encoder, blocks = ENCODERS[kind], 20 * SPARE
    packed = newer = block(encoder, 1, 1, 2, 0)
    with Copied() as copied:
        for _ in range(blocks - 1):
            packed = packed.append(newer, spare=True)
    one = sum(part.numel() for part in newer.parts.values())
    assert blocks * one <= copied.numbers <= (SPARE + 1) * blocks * one < blocks * blocks * one / 4


# ---- in a stack


STACKS = {
    "codes": "quant:4,group=8",
    "latents": "commonkv:0.5,layers=2+quant:4",
    "exact": "commonkv:0.5,layers=2,basis=weights",
}


def fed(spec, model, ids):
    stack = KVStack.from_spec(spec, model=model)
    model(ids, past_key_values=stack)
    return stack


def parts_of(stack):
    return [x for store in stack.batch.stores for packed in store.packed.values() for x in packed.parts.values()]


@pytest.mark.parametrize("spec", STACKS.values(), ids=STACKS)
def test_decoding_copies_what_is_sealed_now_and_then(spec):
    """Seen by the addresses of the parts: they change only when a buffer is full."""
    model, blocks = tiny.model("llama"), 20
    stack = fed(spec + f"@window=8,block={GRANULE}", model, tiny.tokens(2, 100 * GRANULE))
    assert storage_bytes(parts_of(stack)) == sum(x.nbytes for x in parts_of(stack)), "a prompt leaves room"
    moves, held = 0, [x.data_ptr() for x in parts_of(stack)]
    for token in tiny.tokens(2, blocks * GRANULE, seed=1).split(1, dim=1):
        model(token, past_key_values=stack)
        now = [x.data_ptr() for x in parts_of(stack)]
        moves, held = moves + (now != held), now
    sealed = stack.batch.stores[0].sealed_tokens
    assert sealed >= (100 + blocks - 3) * GRANULE  # sinks and window are not
    # at first, and then when as many blocks have come as there was room for
    assert 1 < moves <= 1 + blocks // (sealed // GRANULE // SPARE)
    assert storage_bytes(parts_of(stack)) <= sum(x.nbytes for x in parts_of(stack)) * (1 + 1 / SPARE)


@pytest.mark.parametrize("spec", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("move", ["nothing", "copy", "rows", "repeat", "crop", "file", "inference"])
def test_room_changes_no_answer(spec, move, monkeypatch, tmp_path):
    """Wherever buffers have room, a stack and those that are made from it go on as where none has."""
    model = tiny.model("llama")

    def run(share):
        monkeypatch.setattr(packing, "SPARE", share)
        stack = fed(spec + f"@window=8,block={GRANULE}", model, tiny.tokens(2, 60))
        answers = decoded(model, stack, 1)
        assert any(not x.is_contiguous() for x in parts_of(stack)) == (share == 1)
        others = changed(stack, move, model, tmp_path)
        for other in (*others, stack):
            with torch.inference_mode(move == "inference"):
                answers += decoded(model, other, len(answers))
        return answers

    for with_room, without in zip(run(1), run(10**6), strict=True):
        torch.testing.assert_close(with_room, without)


def decoded(model, stack, seed):
    ids = tiny.tokens(stack.batch_size, 2 * GRANULE, seed=seed)
    return [model(token, past_key_values=stack).logits.clone() for token in ids.split(1, dim=1)]


def changed(stack, move, model, folder):
    """Stacks that are made from this one; it is changed in place where it has to be."""
    if move == "copy":
        return [copy.deepcopy(stack), copy.copy(stack)]
    if move == "rows":
        other = copy.deepcopy(stack)
        other.reorder_cache(torch.tensor([1, 1]))
        return [other]
    if move == "repeat":
        stack.batch_repeat_interleave(2)
    if move == "crop":
        other = copy.deepcopy(stack)
        other.crop(-20)
        return [other]
    if move == "file":
        stack.save(folder / "cache.safetensors")
        return [KVStack.load(folder / "cache.safetensors", model=model)]
    return []
