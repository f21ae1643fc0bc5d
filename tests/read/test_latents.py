"""Reading latents from rough scores, beside keys that are all rebuilt."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstack import CommonKV, Evict, KVStack, Quant
from kvstack.abilities import Linear
from kvstack.encode.channel_codes import ChannelCodes
from kvstack.model.attention import attention_modules
from kvstack.model.rope import find_ropes
from kvstack.read import latents
from kvstack.read.latents import CompiledChannels, Decoded, LatentReader
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


# ---- codes that are read in place


@given(
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=150),
    rows=st.integers(1, 3),
    units=st.integers(1, 9),
    heads=st.integers(1, 5),
    block=st.sampled_from([8, 16, 64]),
    leading=st.integers(1, 150),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_compiled_channels_are_decoded_ones(widths, rows, units, heads, block, leading, seed):
    codes, tokens = encoder(widths, seed), 8 * units
    z = torch.randn(rows, 1, tokens, len(widths), generator=draw(seed)) * codes.deviation
    packed = codes.encode(z, "latent")
    plain, compiled = Decoded(codes.decode(packed, "latent")), CompiledChannels(codes, packed, Workspace())
    leading = min(leading, len(widths))
    vectors = torch.randn(rows, -(-tokens // block), heads, leading, generator=draw(seed))
    assert_close(compiled.products(vectors, block), plain.products(vectors, block))
    places = torch.randint(0, tokens, (rows, 11), generator=draw(seed))
    assert_close(compiled.at(places), plain.at(places))
    weights = torch.rand(rows, heads, tokens, generator=draw(seed))
    assert_close(compiled.mixed(weights), plain.mixed(weights))


BEHIND = """
import ctypes, mmap, sys, torch
from kvstack.encode.channel_codes import ChannelCodes
from kvstack.read.latents import CompiledChannels, Decoded
from kvstack.workspace import Workspace

libc, page = ctypes.CDLL(None), mmap.PAGESIZE

def at_the_end(x):
    # the last byte of a page, and nothing may be read in the next one
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
    made = torch.frombuffer(memory, dtype=torch.uint8, count=x.numel(), offset=page - x.numel()).view(x.shape)
    return made.copy_(x)

for widths in ([1], [2, 1], [3] * 5, [8, 5, 2, 1, 1], [2] * 40):
    codes = ChannelCodes(torch.ones(len(widths)), torch.tensor(widths, dtype=torch.uint8))
    packed = codes.encode(torch.randn(1, 1, 48, len(widths)), "latent")._map(at_the_end)
    found, plain = CompiledChannels(codes, packed, Workspace()), Decoded(codes.decode(packed, "latent"))
    for x, y in (
        (found.products(torch.ones(1, 3, 2, len(widths)), 16), plain.products(torch.ones(1, 3, 2, len(widths)), 16)),
        (found.mixed(torch.ones(1, 2, 48)), plain.mixed(torch.ones(1, 2, 48))),
        (found.at(torch.arange(48)[None]), plain.at(torch.arange(48)[None])),
    ):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
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
    packed = codes.encode(z, "latent")
    compiled, plain = CompiledChannels(codes, packed, Workspace()), Decoded(codes.decode(packed, "latent"))
    weights = (5 * torch.randn(1, 3, 800, generator=draw(2))).softmax(-1)
    apart = (compiled.mixed(weights, 100) - plain.mixed(weights)).abs()
    assert 1e-5 < float(apart.max()) < 0.01 * float(plain.z.abs().max())
    even = torch.full((1, 3, 800), 1 / 800)
    assert_close(compiled.mixed(even, 100), plain.mixed(even))


def test_products_in_plain_loops():
    z = torch.randn(1, 1, 13, 6, generator=draw(0))
    vectors = torch.randn(1, 4, 2, 3, generator=draw(1))
    found = Decoded(z).products(vectors, 4)
    for token in range(13):
        for head in range(2):
            expected = sum(float(z[0, 0, token, i] * vectors[0, token // 4, head, i]) for i in range(3))
            assert float(found[0, head, token]) == pytest.approx(expected, abs=1e-5)


# ---- turning queries instead of keys

ROTATING = [name for name in tiny.MODELS if name not in ("opt", "deepseek_v3")]


@pytest.mark.parametrize("name", ROTATING)
def test_a_turned_query_meets_keys_as_they_were(name):
    """For every token of its own position, and for a block those of its middle."""
    model = tiny.model(name)
    ropes = find_ropes(model, attention_modules(model))
    rope = next(rope for rope in ropes.values() if rope is not None)
    head = model.config.get_text_config().head_dim if hasattr(model.config, "head_dim") else 16
    positions = torch.tensor([[3, 4, 9, 10, 50, 51, 52]])[None]
    query, keys = torch.randn(B, 4, head, generator=draw(0)), torch.randn(B, 4, 7, head, generator=draw(1))
    expected = (query.unsqueeze(2) @ rope.rotate(keys, positions).mT)[:, :, 0]
    found = (rope.facing(query, positions, 1) * keys).sum(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    turned = rope.facing(query, positions, 4)  # blocks of 4 and of 3 tokens, their middles at places 2 and 6
    torch.testing.assert_close((turned[:, :, 0] * keys[:, :, 2]).sum(-1), expected[..., 2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((turned[:, :, 1] * keys[:, :, 6]).sum(-1), expected[..., 6], atol=1e-4, rtol=1e-4)
    assert rope.facing(query, positions[..., :5], 4).shape == (B, 4, 2, head)
    places = torch.tensor([[[0, 6], [1, 1], [3, 2], [5, 4]]]).expand(B, -1, -1)
    some = keys.gather(2, places[..., None].expand(-1, -1, -1, head))
    assert torch.equal(
        rope.rotate_at(some, positions, places),
        rope.rotate(keys, positions).gather(2, places[..., None].expand(-1, -1, -1, head)),
    )
    rope.forget()


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
    opened = Decoded(z)
    made = LatentReader(keys, values, (opened, opened), rope, positions, exact, rough)
    plain = [
        torch.einsum("btr,rhd->bhtd", z[:, 0], x.axes[0]) + (x.mean[:, None] if mean else 0) for x in (keys, values)
    ]
    return made, (plain[0] if rope is None else rope.rotate(plain[0], positions)), plain[1]


def a_rope():
    model = tiny.model("llama")
    return find_ropes(model, attention_modules(model))[0]


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("exact", [4, 30, 100])
def test_exact_scores_and_weighed_values(exact, rotates, mean):
    made, keys, values = reader(37, 12, exact, 5, a_rope() if rotates else None, mean)
    query = torch.randn(B, H, G, D, generator=draw(9))
    found, expected = made.dot(query), query @ keys.mT
    assert found.shape == expected.shape == (B, H, G, 37)
    same = torch.isclose(found, expected, atol=1e-3, rtol=1e-3)
    if not rotates:
        assert same.all(), "what is not rotated is scored exactly without any key"
    else:
        assert (same.all(2).sum(-1) >= min(exact, 37)).all()
        assert same.all() == (exact >= 37)
    weights = torch.rand(B, H, G, 37, generator=draw(3))
    torch.testing.assert_close(made.mix(weights), weights @ values, atol=1e-3, rtol=1e-3)


def test_all_channels_and_a_block_for_each_token_are_exact(monkeypatch):
    monkeypatch.setattr(latents, "BLOCK", 1)
    made, keys, _ = reader(29, 12, 1, 12, a_rope())
    query = torch.randn(B, H, G, D, generator=draw(9))
    torch.testing.assert_close(made.dot(query), query @ keys.mT, atol=1e-3, rtol=1e-3)


def test_which_tokens_are_exact():
    """Those that weigh most for some query of their kv head, by scores of their blocks' middles, in plain loops."""
    rope, tokens, exact, rough = a_rope(), 70, 9, 6
    made, keys, _ = reader(tokens, 12, exact, rough, rope)
    query = torch.randn(B, H, G, D, generator=draw(9))
    found = made.dot(query)
    plain = torch.einsum("btr,rhd->bhtd", made.for_keys.z[..., :rough], made.keys.axes[0, :rough])
    plain = plain + made.keys.mean[:, None]
    middles = torch.tensor(
        [min(tokens - 1, token // latents.BLOCK * latents.BLOCK + latents.BLOCK // 2) + 5 for token in range(tokens)]
    )[None, None]
    scores = query @ rope.rotate(plain, middles).mT
    for row in range(B):
        for head in range(H):
            matters = scores[row, head].softmax(-1).amax(0)
            chosen = set(matters.topk(exact).indices.tolist())
            for token in range(tokens):
                expected = (
                    (query[row, head] @ keys[row, head, token]) if token in chosen else scores[row, head, :, token]
                )
                torch.testing.assert_close(found[row, head, :, token], expected, atol=1e-3, rtol=1e-3)


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
}


@pytest.mark.parametrize("stages", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(("rows", "padded"), [(1, 0), (3, 0), (2, 150)])
def test_as_many_exact_tokens_as_there_are(stages, rows, padded):
    """Then nothing is left to be rough."""
    found = logits(KVStack(stages, window=8), rows=rows, padded=padded)
    slow = [CommonKV(0.9, exact=None), *stages[1:]]
    expected = logits(KVStack(slow, window=8), rows=rows, padded=padded)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_the_report_names_the_reader():
    for stages, names in (
        ([CommonKV(exact=8), Quant(2)], ["numba"]),
        ([CommonKV(exact=8)], ["torch"]),
        ([CommonKV(exact=None), Quant(2)], ["torch"]),
    ):
        assert KVStack(stages, model=tiny.model()).report().reads_with == names
