"""Reading latents from rough scores, beside keys that are all rebuilt."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstack import CommonKV, Evict, KVStack, Quant, Tiers
from kvstack.abilities import Linear, PackedAxes
from kvstack.encode.bits import MOST
from kvstack.encode.channel_codes import ChannelCodes
from kvstack.model.attention import attention_modules
from kvstack.model.rope import find_ropes
from kvstack.read import linear as reading
from kvstack.read.latents import reader_of
from kvstack.read.linear import Decoded, LatentReader
from kvstack.read.linear_numba import Codes, CodesReader
from kvstack.store.tiered import TieredLatents
from kvstack.turns import Blocks, Pairs, Turns, find_pairs
from kvstack.workspace import Workspace
from tests import tiny

B, H, G, D = 2, 2, 3, 16


def draw(seed):
    return torch.Generator().manual_seed(seed)


def encoder(widths, seed=0):
    bits = torch.tensor(sorted(widths, reverse=True), dtype=torch.uint8)
    return ChannelCodes(torch.rand(len(bits), generator=draw(seed)).sort(descending=True).values, bits)


def assert_close(found, expected, loose=1e-5):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= loose * max(1e-30, float(expected.abs().max()))


# ---- kernels beside plain torch


def pairs_of(count, width):
    """The first channels of a head in pairs, in any order; the others do not turn."""
    order = torch.randperm(width, generator=draw(count))
    return Pairs(order[:count], order[count : 2 * count], order[2 * count :].sort().values)


class Guarded(Workspace):
    """Scratch memory that tells when something is written behind it."""

    def get(self, name, shape, dtype, device):
        whole = super().get(name, (shape[0] + 256,), dtype, device)
        self.behind = whole[shape[0] :].fill_(90)
        return whole[: shape[0]]


def readers(codes, packed, linear, turns, exact, rough):
    """A reader in plain torch, and one with kernels, of the same latent for keys and values."""
    for latent in (Decoded(codes.decode(packed, "latent")), Codes(codes, packed)):
        yield reader_of(*linear, (latent, latent), turns, exact, rough, Guarded())


def axes_of(rank, heads, width, fine, seed):
    """As numbers, or in codes, the first `fine` with fine parts."""
    if fine is None:
        return torch.randn(1, rank, heads, width, generator=draw(seed))
    codes = torch.randint(-127, 128, (rank, heads, width), generator=draw(seed)).to(torch.int8)
    sizes = (torch.rand(*shape, generator=draw(seed)) for shape in ((rank, heads), (heads, width)))
    scale, unit = sizes
    return PackedAxes(codes, codes[:fine].flip(0).contiguous(), scale / 64, unit)


def assert_same_scores(plain, expected, found, query, keys):
    """Each score is the rough or the exact one of its token, and the same tokens are exact. Of tokens of equal shares,
    up to rounding, one may be exact for one reader and another for the other, or one more where shares just count."""
    tolerance = {"atol": 1e-4 * float(expected.abs().max()), "rtol": 1e-4}
    same = torch.isclose(found, expected, **tolerance).all(2)
    if bool(same.all()):
        return
    rough = torch.cat([plain._rough(query), query @ keys.mT], -1)
    everything = LatentReader(
        plain.keys, plain.values, (plain.for_keys, plain.for_values), plain.turns, 10**6, plain.rough
    )
    exact = everything.dot(query, keys)
    assert bool((torch.isclose(found, rough, **tolerance) | torch.isclose(found, exact, **tolerance)).all())
    shares = (rough - rough.logsumexp(-1, keepdim=True)).amax(2)
    for other, share in zip(~same.flatten(0, 1), shares.flatten(0, 1), strict=True):
        if bool(other.any()):
            assert float(share[other].max() - share[other].min()) <= 1e-3


@given(
    widths=st.lists(st.integers(1, MOST), min_size=1, max_size=150),
    rows=st.integers(1, 3),
    units=st.integers(1, 40),
    heads=st.integers(1, 3),
    queries=st.integers(1, 7),
    width=st.sampled_from([8, 16, 24, 40]),
    value_width=st.sampled_from([8, 16, 40, 72]),
    fine=st.sampled_from([None, 0, 3, 150]),
    turning=st.sampled_from([0, 1, 4]),
    rough=st.integers(1, 150),
    exact=st.sampled_from([1, 6, 1000]),
    mean=st.booleans(),
    raw=st.integers(1, 9),
    apart=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_kernels_read_as_plain_torch_does(
    widths, rows, units, heads, queries, width, value_width, fine, turning, rough, exact, mean, raw, apart, seed
):
    codes, tokens = encoder(widths, seed), 8 * units
    z = torch.randn(rows, 1, tokens, len(widths), generator=draw(seed)) * codes.deviation
    packed = codes.encode(z, "latent")
    packed = packed.with_room(8 * apart) if apart else packed
    linear = [
        Linear(
            "latent",
            axes_of(len(widths), heads, size, fine, seed + i),
            torch.randn(heads, size, generator=draw(seed + i)) if mean else None,
        )
        for i, size in enumerate((width, value_width), start=1)
    ]
    angles = torch.rand(rows, turning, 1, generator=draw(seed)) * torch.arange(tokens) / 4
    turns = Turns(pairs_of(turning, width), angles.cos(), angles.sin())
    query, keys = (torch.randn(rows, heads, n, width, generator=draw(n)) for n in (queries, raw))
    values = torch.randn(rows, heads, raw + 1, value_width, generator=draw(raw + 1))
    plain, fast = readers(codes, packed, linear, turns, exact, rough)
    assert isinstance(fast, CodesReader)
    expected, found = plain.dot(query, keys), fast.dot(query, keys)
    assert_same_scores(plain, expected, found, query, keys)
    weights = torch.rand(rows, heads, queries, tokens + raw, generator=draw(seed))
    assert_close(fast.mix(weights, values[:, :, :raw]), plain.mix(weights, values[:, :, :raw]))
    assert bool((fast.work.behind == 90).all())


BEHIND = """
import ctypes, mmap, sys, torch
from kvstack.encode.channel_codes import ChannelCodes
from kvstack.abilities import Linear
from kvstack.turns import Pairs, Turns
from kvstack.read.latents import reader_of
from kvstack.read.linear import Decoded
from kvstack.read.linear_numba import Codes
from kvstack.workspace import Workspace

libc, page = ctypes.CDLL(None), mmap.PAGESIZE

def at_the_end(x):
    # the last byte of a page, and nothing may be read in the next one
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
    made = torch.frombuffer(memory, dtype=torch.uint8, count=x.numel(), offset=page - x.numel()).view(x.shape)
    return made.copy_(x)

for widths in ([1], [2, 1], [3] * 5, [12, 9, 5, 2, 1, 1], [2] * 40):
    codes = ChannelCodes(torch.ones(len(widths)), torch.tensor(widths, dtype=torch.uint8))
    packed = codes.encode(torch.randn(1, 1, 48, len(widths)), "latent").mapped(at_the_end)
    linear = Linear("latent", torch.ones(1, len(widths), 1, 8))
    pairs = Pairs(torch.arange(4), torch.arange(4, 8), torch.arange(0))
    turns = Turns(pairs, torch.ones(1, 4, 48), torch.zeros(1, 4, 48))
    query = torch.ones(1, 1, 2, 8)
    results = []
    for latent in (Codes(codes, packed), Decoded(codes.decode(packed, "latent"))):
        reader = reader_of(linear, linear, (latent, latent), turns, 48, 200, Workspace())
        results.append((reader.dot(query, query), reader.mix(torch.ones(1, 1, 2, 50), query)))
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
print("read")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_nothing_is_read_behind_the_codes():
    """In a process of its own: it would not survive."""
    done = subprocess.run([sys.executable, "-c", BEHIND], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "read"), done.stderr


def test_weights_that_do_not_count_are_left_out():
    """Of an attention that sums to one, less than a hundredth; of an even one, nothing."""
    codes = encoder([4] * 70)
    z = torch.randn(1, 1, 800, 70, generator=draw(1)) * codes.deviation
    linear = [Linear("latent", torch.eye(70).view(1, 70, 1, 70))] * 2
    turns, nothing = Turns.none(800, 70, torch.device("cpu")), torch.zeros(1, 1, 0, 70)
    plain, fast = readers(codes, codes.encode(z, "latent"), linear, turns, 384, 70)
    weights = (5 * torch.randn(1, 1, 3, 800, generator=draw(2))).softmax(-1)
    apart = (fast.mix(weights, nothing) - plain.mix(weights, nothing)).abs()
    assert 1e-5 < float(apart.max()) < 0.01 * float(plain.for_values.z.abs().max())
    even = torch.full((1, 1, 3, 800), 1 / 800)
    assert_close(fast.mix(even, nothing), plain.mix(even, nothing))


def test_latents_with_room_behind_them_are_not_copied():
    codes = encoder([4] * 20)
    packed = codes.encode(torch.randn(3, 1, 48, 20, generator=draw(1)), "latent").with_room(16)
    opened = Codes(codes, packed)
    assert not opened.codes.is_contiguous()
    assert opened.codes is packed.parts["codes"]


# ---- turning queries instead of keys

ROTATING = [name for name in tiny.MODELS if name not in ("opt", "deepseek_v3")]


@pytest.mark.parametrize("name", ROTATING)
def test_a_rotation_is_pairs_that_turn(name):
    """Rotating keys by pairs, or turning the query back, is what the model's own function does."""
    model = tiny.model(name)
    ropes = find_ropes(model, attention_modules(model))
    rope = next(rope for rope in ropes.values() if rope is not None)
    head = model.config.get_text_config().head_dim if hasattr(model.config, "head_dim") else 16
    positions = torch.tensor([[3, 4, 9, 10, 50, 51, 52]])[None]
    query, keys = torch.randn(B, 4, 2, head, generator=draw(0)), torch.randn(B, 4, 7, head, generator=draw(1))
    turns = rope.turns(positions, head)
    rotated = rope.rotate(keys, positions)
    places = torch.tensor([[[0, 6], [1, 1], [3, 2], [5, 4]]]).expand(B, -1, -1)
    index = places[..., None].expand(-1, -1, -1, head)
    found = turns.rotate_at(keys.gather(2, index), places)
    torch.testing.assert_close(found, rotated.gather(2, index), atol=1e-5, rtol=1e-5)
    blocks = Blocks.of(turns, 4)  # of 4 and of 3 tokens, their middles at places 2 and 6
    facing = blocks.facing(query)  # (B, H, blocks, G, C)
    met = torch.einsum("bhngc,bhnc->bhng", facing, keys[:, :, [2, 6]][..., blocks.channels])
    expected = torch.einsum("bhgd,bhnd->bhng", query, rotated[:, :, [2, 6]])
    torch.testing.assert_close(met, expected, atol=1e-4, rtol=1e-4)
    mean = torch.randn(4, head, generator=draw(2))
    turning, still = turns.facing(query, mean)
    expected = query @ rope.rotate(mean[None, :, None].expand(1, -1, 7, -1), positions).mT
    torch.testing.assert_close(
        turning @ turns.angles.unsqueeze(1) + still.unsqueeze(-1), expected, atol=1e-4, rtol=1e-4
    )
    again = rope.turns(positions.clone(), head)
    assert again is turns, "the same positions, in a tensor of another group"
    rope.forget()


def test_what_is_no_rotation_of_pairs():
    mixes = torch.linalg.qr(torch.randn(6, 6, generator=draw(0)))[0]
    assert find_pairs(lambda x, position: x @ mixes, 6, torch.device("cpu")) is None
    assert find_pairs(lambda x, position: 2 * x, 6, torch.device("cpu")) is None, "it would be scaled"
    assert len(find_pairs(lambda x, position: x, 6, torch.device("cpu")).still) == 6


def test_fast_and_slow_pairs():
    """Every pair is in the blocks that it needs; one that turns around within a small block is in none."""
    speeds = torch.tensor([1.0, 0.1, 0.03, 0.001, 0.0])
    angles = torch.arange(400) * speeds[:, None]
    turns = Turns(
        Pairs(torch.arange(5), torch.arange(5, 10), torch.tensor([10])), angles.cos()[None], angles.sin()[None]
    )
    assert (turns.fast.first.tolist(), turns.slow.first.tolist()) == ([1, 2], [3, 4])
    assert (turns.fast.channels.tolist(), turns.slow.channels.tolist()) == ([1, 2, 6, 7], [3, 4, 8, 9, 10])
    scaled = Turns(turns.pairs, 3 * turns.cos, 3 * turns.sin)
    assert scaled.fast.first.tolist() == [1, 2], "yarn scales rotations"


# ---- one layer


def reader(tokens, rank, exact, rough, rope, mean=True, seed=0, rows=B):
    z = torch.randn(rows, 1, tokens, rank, generator=draw(seed))
    keys, values = (
        Linear(
            "latent",
            torch.randn(1, rank, H, D, generator=draw(seed + i)),
            torch.randn(H, D, generator=draw(seed + i)) if mean else None,
        )
        for i in (1, 2)
    )
    positions = torch.arange(5, 5 + tokens)[None, None]
    turns = Turns.none(tokens, D, torch.device("cpu")) if rope is None else rope.turns(positions, D)
    opened = Decoded(z)
    made = reader_of(keys, values, (opened, opened), turns, exact, rough, Workspace())
    plain = [
        torch.einsum("btr,rhd->bhtd", z[:, 0], x.axes[0]) + (x.mean[:, None] if mean else 0) for x in (keys, values)
    ]
    return made, (plain[0] if rope is None else rope.rotate(plain[0], positions)), plain[1]


def a_rope():
    model = tiny.model("llama")
    return find_ropes(model, attention_modules(model))[0]


RAW = torch.randn(B, H, 3, D, generator=draw(8))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rotates", [True, False])
def test_exact_scores_and_weighed_values(rotates, mean):
    """Tokens are few enough to count, all of them."""
    made, keys, values = reader(37, 12, 100, 5, a_rope() if rotates else None, mean)
    query = torch.randn(B, H, G, D, generator=draw(9)) / 20
    torch.testing.assert_close(made.dot(query, RAW), query @ torch.cat([keys, RAW], 2).mT, atol=1e-3, rtol=1e-3)
    weights = torch.rand(B, H, G, 40, generator=draw(3))
    expected = weights @ torch.cat([values, RAW], 2)
    torch.testing.assert_close(made.mix(weights, RAW), expected, atol=1e-3, rtol=1e-3)


def test_which_tokens_are_exact():
    """Those whose share of the attention of some query of their kv head counts, at most so many and at least a quarter
    of them; the others are scored from leading channels, turned as in the middle of their block, or not at all. In
    plain loops."""
    rope, tokens, rough = a_rope(), 300, 6
    query = torch.randn(B, H, G, D, generator=draw(9)) / 4
    for exact in (5, 80, 299):
        made, keys, _ = reader(tokens, 12, exact, rough, rope)
        found = made.dot(query, RAW)[..., :tokens]
        turns = made.turns
        plain = torch.einsum("btr,rhd->bhtd", made.for_keys.z[..., :rough], made.keys.axes[0, :rough])
        scores = torch.zeros(B, H, G, tokens)
        angle = torch.atan2(turns.sin[0], turns.cos[0])  # (P, T)
        for token in range(tokens):
            mean = rope.rotate(made.keys.mean[None, :, None], torch.tensor([[[5 + token]]]))
            scores[..., token] = (query @ mean.mT)[..., 0]
            for blocks in (turns.fast, turns.slow):
                middle = min(tokens - 1, token // blocks.size * blocks.size + blocks.size // 2)
                for x, y in zip(blocks.first.tolist(), blocks.second.tolist(), strict=True):
                    turned = angle[turns.pairs.first.tolist().index(x), middle]
                    cos, sin = turned.cos(), turned.sin()
                    one, other = plain[:, :, token, x], plain[:, :, token, y]
                    scores[..., token] += query[..., x] * (cos * one - sin * other).unsqueeze(-1)
                    scores[..., token] += query[..., y] * (sin * one + cos * other).unsqueeze(-1)
        shares = torch.cat([scores, query @ RAW.mT], -1).softmax(-1)[..., :tokens].amax(2)
        rank = shares.argsort(-1, descending=True).argsort(-1)
        counts = shares >= min(reading.COUNTS, reading.EVEN / tokens)
        chosen = (rank < exact) & (counts | (rank < -(-exact // reading.FEWEST)))
        assert 0 < int(chosen.sum()) < B * H * tokens
        expected = torch.where(chosen.unsqueeze(2), query @ keys.mT, scores)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("exact", [300, 1000])
def test_of_few_tokens_all_are_exact(exact):
    """Also those of no attention at all, with axes of any size and only one rough channel."""
    query = torch.randn(B, H, G, D, generator=draw(9)) * 9
    made, keys, _ = reader(300, 12, exact, 1, a_rope())
    found = made.dot(query, RAW)
    torch.testing.assert_close(found, query @ torch.cat([keys, RAW], dim=2).mT, atol=1e-3, rtol=1e-3)


# ---- in a stack


def logits(stack, name="llama", rows=1, length=400, padded=0):
    model, ids = tiny.model(name), tiny.tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=stack)
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
        return model(ids[:, :1], attention_mask=mask, past_key_values=stack).logits


STACKS = {
    "channels": [CommonKV(0.9, exact=1000), Quant(4)],
    "numbers": [CommonKV(0.9, exact=1000)],
    "evict": [CommonKV(0.9, exact=1000), Quant(4), Evict(0.5)],
    "classes": [CommonKV(0.9, exact=1000), Quant(4), Tiers("keydiff")],
    "two classes": [CommonKV(0.9, exact=1000), Quant(4), Tiers("snapkv", shares=(0.1, 0.9), weights=(1e4, 1))],
}


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(("rows", "padded"), [(1, 0), (3, 0), (2, 150)])
def test_as_many_exact_tokens_as_there_are(stages, rows, padded):
    """Then nothing is left to be rough."""
    found = logits(KVStack(stages, window=8), rows=rows, padded=padded)
    slow = [CommonKV(0.9, exact=None), *stages[1:]]
    expected = logits(KVStack(slow, window=8), rows=rows, padded=padded)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("rows", "padded"), [(1, 0), (3, 0), (2, 150)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3"])  # smollm3 does not rotate in every layer
def test_classes_are_read_as_plain_torch_reads_them(name, rows, padded, monkeypatch):
    """Rough scores, the choice of exact keys and the values: torch joins all classes."""
    stages = [CommonKV(0.7, exact=60, rough=20, layers=2), Quant(2), Tiers("keydiff")]
    found = logits(KVStack(stages, window=8), name, rows=rows, padded=padded)
    monkeypatch.setattr(TieredLatents, "_codes_of", lambda self, name: None)
    expected = logits(KVStack(stages, window=8), name, rows=rows, padded=padded)
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_the_report_names_the_reader():
    for stages, names in (
        ([CommonKV(exact=8), Quant(2)], ["numba"]),
        ([CommonKV(exact=8), Quant(2), Tiers()], ["numba"]),
        ([CommonKV(exact=8)], ["torch"]),
        ([CommonKV(exact=None), Quant(2)], ["torch"]),
    ):
        assert KVStack(stages, model=tiny.model()).report().reads_with == names
