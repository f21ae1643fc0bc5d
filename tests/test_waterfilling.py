"""Bits go where the energy is, and exactly as many as there are."""

import itertools

import hypothesis.strategies as st
import torch
from hypothesis import assume, given

from kvstack import Channels, Quant
from kvstack.encode.bits import MOST
from kvstack.encode.channel_codes import bits_of
from kvstack.waterfilling import DISTORTION, STEPS, spread, spread_by_class

spectra = st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), min_size=1, max_size=4)


def distortion(energies, counts):
    """What quantizers of these widths leave, summed over all channels."""
    table = torch.tensor(DISTORTION, dtype=torch.float64)
    pairs = zip(energies, counts, strict=True)
    return sum(float((energy.double() * table[count.long()]).sum()) for energy, count in pairs)


@given(spectra, st.integers(0, 400))
def test_spends_exactly_the_budget(spectrum, bits):
    energies = [torch.tensor(part) for part in spectrum]
    counts = spread(energies, bits)
    assert sum(int(count.sum()) for count in counts) == min(bits, MOST * sum(map(len, energies)))
    for count, energy in zip(counts, energies, strict=True):
        assert count.shape == energy.shape
        assert int(count.max()) <= MOST


@given(spectra, st.integers(0, 400))
def test_more_energy_never_gets_fewer_bits(spectrum, bits):
    energies = [torch.tensor(part) for part in spectrum]
    energy, count = torch.cat(energies), torch.cat(spread(energies, bits)).long()
    more = energy[:, None] > energy[None]
    assert bool((count[:, None] >= count[None])[more].all())


@given(st.floats(0.3, 0.95), st.integers(1, 6), st.integers(8, 60))
def test_beats_uniform_bits_on_a_decaying_spectrum(decay, bits, channels):
    energy = decay ** torch.arange(channels, dtype=torch.float64)
    ours = distortion([energy], spread([energy], bits * channels))
    uniform = distortion([energy], [torch.full((channels,), bits)])
    assert ours <= uniform * (1 + 1e-12)
    # a bit moves where the energies differ by more than what one more bit takes off
    if energy[0] > 3.4 * energy[-1]:
        assert ours < uniform


classes = st.integers(1, 4).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(1, 64), min_size=n, max_size=n) for _ in range(2)))
)


def shares_of(parts):
    return [part / sum(parts) for part in parts]


@given(spectra, st.integers(0, 200), classes)
def test_classes_spend_one_budget_per_token(spectrum, bits, some):
    energies, (parts, weights) = [torch.tensor(part) for part in spectrum], some
    shares = shares_of(parts)
    counts = spread_by_class(energies, bits, shares, weights)
    spent = sum(share * int(count.sum()) for share, each in zip(shares, counts, strict=True) for count in each)
    full = MOST * sum(map(len, energies))
    assert spent <= bits * (1 + 1e-6)
    assert spent > min(bits, full) - max(shares) - 1e-6
    for energy, *each in zip(energies, *counts, strict=True):
        assert all(count.shape == energy.shape for count in each)


@given(spectra, st.integers(0, 200), classes)
def test_no_class_of_more_weight_gets_fewer_bits(spectrum, bits, some):
    energies, (parts, weights) = [torch.tensor(part) for part in spectrum], some
    weights = sorted(weights, reverse=True)
    counts = spread_by_class(energies, bits, shares_of(parts), weights)
    for heavy, light in itertools.pairwise(counts):
        assert all(bool((more >= fewer).all()) for more, fewer in zip(heavy, light, strict=True))


@given(spectra, st.integers(0, 200), classes)
def test_classes_of_one_weight_are_one_class(spectrum, bits, some):
    """They differ by the bits that the budget cannot give to all of them: one in a channel. If a channel has no energy,
    no bit is worth more than another."""
    energies, (parts, _) = [torch.tensor(part) for part in spectrum], some
    assume(all(bool((energy > 0).all()) for energy in energies))
    whole = spread(energies, bits)
    for each in spread_by_class(energies, bits, shares_of(parts), [3.0] * len(parts)):
        assert max(int((x.int() - y.int()).abs().max()) for x, y in zip(each, whole, strict=True)) <= 1


def test_classes_leave_less_than_any_other_split_of_the_budget():
    """Against every split of what it spent among two classes, each spread as well as can be."""
    energies, shares, weights = [0.8 ** torch.arange(12, dtype=torch.float64)], (0.25, 0.75), (16.0, 1.0)

    def left(counts):
        each = zip(shares, weights, counts, strict=True)
        return sum(share * weight * distortion(energies, count) for share, weight, count in each)

    counts = spread_by_class(energies, 24, shares, weights)
    ours, (many, few) = left(counts), (int(count.sum()) for (count,) in counts)
    others = [left([spread(energies, many + 3 * (few - n)), spread(energies, n)]) for n in range(few + many // 3)]
    assert ours <= min(others) * (1 + 1e-12)
    assert ours < 0.7 * left([spread(energies, 24)] * 2)


def test_distortions_are_those_of_the_quantizers():
    """The table against an integral over the Gaussian density, which random numbers are too few for: what is clipped is
    a part of the error, and rare."""
    x = torch.linspace(-8, 8, 2**20, dtype=torch.float64)
    density = (-x.square() / 2).softmax(0)
    for bits, step in enumerate(STEPS, 1):
        middle = (2**bits - 1) / 2
        codes = (x / step + middle).round().clamp(0, 2**bits - 1)
        error = float((((codes - middle) * step) - x).square() @ density)
        assert abs(error / DISTORTION[bits] - 1) < 0.01, bits


@given(spectra, st.sampled_from([2, 4, 8]), st.integers(1, 200))
def test_gains_are_paid_from_the_budget(spectrum, bits, numbers):
    """More is spent only where the budget does not pay for one bit of each latent."""
    energies = [torch.tensor(part).sort(descending=True).values for part in spectrum]
    found = Quant(bits).allot([Channels(energy) for energy in energies], numbers)
    assert found is not None
    spent = sum(bits_of(channels.bits) for channels in found)
    assert spent <= bits * numbers or all(channels.bits.tolist() == [1] for channels in found)
    packed = [channels.encode(torch.zeros(1, 1, 8, channels.rank), "latent") for channels in found]
    assert sum(part.nbytes for each in packed for part in each.parts.values()) == spent


def test_one_budget_for_all_groups_and_little_of_it_is_left():
    rich, poor = (Channels(scale * 0.9 ** torch.arange(64.0)) for scale in (10.0, 1.0))
    found = Quant(2).allot([rich, poor], numbers=64)
    assert found is not None
    assert 2 * 64 - 4 <= sum(bits_of(channels.bits) for channels in found) <= 2 * 64
    assert int(found[0].bits.sum()) > int(found[1].bits.sum())
    assert all(int(channels.bits.min()) >= 1 for channels in found), "channels without bits are not emitted"


def test_a_codec_of_fixed_width_spreads_nothing():
    assert Quant(4, codec="nf4").allot([Channels(torch.ones(8))], 4) is None
