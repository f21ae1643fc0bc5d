"""Bits go where the energy is, and exactly as many as there are."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from kvstack import Channels, Quant
from kvstack.encode.bits import MOST
from kvstack.encode.channel_codes import bits_of
from kvstack.waterfilling import DISTORTION, STEPS, spread

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
