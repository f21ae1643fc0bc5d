"""The cost and the gain of axes that fewer numbers share: bytes, products, and the error at equal bytes.

One calibration of all axes is cut into smaller blocks, in several ways: fewer layers, keys and values apart, some kv
heads. The error is what theory expects of the numbers that calibration has seen: the energy that bits leave, each
number weighed by what it matters, as a share of all of it. Bits are spread over all blocks of the model.

The bytes of axes are those of half of them in 8 bits. They are held once for all texts, so how much they matter
depends on how long these are: with `total` bytes, cache and axes together, what axes take is missing in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ... import CommonKV
from ...calibration.blocks import covariance, numbers_of
from ...calibration.calibrate import calibration_for
from ...calibration.calibration import Calibration, GroupAxes
from ...calibration.plan import KEPT, calibrated_groups
from ...waterfilling import error_left, leading, spread
from .. import terminal
from ..results import Figures, Results
from .run import Run, environment
from .subject import opened

__all__ = ["CONTEXTS", "KEEPS", "TOTAL", "measure", "run"]

CONTEXTS = (4096, 32768, 131072)
KEEPS = (0.65, 0.35, 0.136)
"""Of `CommonKV(keep)` with `Quant(2)`: bits for each number of the cache are twice as many."""
TOTAL = 0.1
"""Cache and axes together, as a share of a bfloat16 dense cache."""
DENSE_BITS = 16

Parts = Sequence[Tensor]
"""The numbers of a group that are in each block."""


def run(run: Run, layers: int | None) -> Iterator[Figures]:
    """One row for each way to cut a group of `layers`, or of the usual size."""
    with opened(run) as subject:
        groups = calibrated_groups(subject.model, layers)
        stage = CommonKV(layers=groups.size)
        calibration = calibration_for(stage, None, subject.model, groups, "fisher", complete=True)
        results = Results("axes", run.out, environment(run, subject.name, subject.identity))
        keys = [{"variant": name, "layers": groups.size} for name in _splits(calibration.groups[0])]
        with terminal.working("finding axes of smaller blocks"):
            for key in keys:
                if results.get(**key) is None:
                    results.add(measure(calibration, str(key["variant"]), run.contexts or CONTEXTS), **key)
        yield results.figures(keys)


def measure(calibration: Calibration, split: str, contexts: Sequence[int]) -> dict[str, object]:
    """The figures of one way to cut every group."""
    energies, sizes, keys = list[Tensor](), list[int](), list[int]()
    for group in calibration.groups:
        whole, of_keys = covariance(group), _is_key(group)
        for part in _splits(group)[split]:
            found = torch.linalg.eigvalsh(whole[part][:, part]).flip(0).clamp_min(0)
            energies.append(found)
            sizes.append(len(part))
            keys.append(int(of_keys[part].sum()))
    numbers = sum(sizes)
    dense = sum(len(group.energy) for group in calibration.groups) * DENSE_BITS / 8
    nbytes = sum(rank * size for rank, size in zip(leading(energies, int(KEPT * numbers)), sizes, strict=True))
    figures: dict[str, object] = {"block": max(sizes), "axes_nbytes": nbytes}
    power = sum(float(energy.sum()) for energy in energies)
    for keep in KEEPS:
        bits = spread(energies, int(2 * keep * numbers))
        ranks = [int((some > 0).sum()) for some in bits]
        figures[f"error_{keep:g}"] = error_left(energies, bits) / power
        figures[f"products_{keep:g}"] = sum(rank * count for rank, count in zip(ranks, keys, strict=True))
    for context in contexts:
        left = TOTAL * dense * context - nbytes
        share = error_left(energies, spread(energies, int(8 * left / context))) / power if left > 0 else None
        figures[f"error_at_{context}"] = share
    return figures


def _splits(group: GroupAxes) -> Mapping[str, Parts]:
    """The ways to cut a group: the numbers of each block."""
    count, heads = len(group.layers), group.shapes[0][0]
    each = [[numbers_of(group, layer, keys) for keys in (True, False)] for layer in range(count)]  # (H, D)

    def of(layers: Sequence[int], kinds: Sequence[int] = (0, 1), first: int = 0, last: int | None = None) -> Tensor:
        return torch.cat([each[layer][kind][first:last].flatten() for layer in layers for kind in kinds])

    every, half = range(count), -(-count // 2)
    splits = {"joint": [of(every)]}
    if count > 1:
        splits["half the layers"] = [of(every[:half]), of(every[half:])]
    splits["keys and values apart"] = [of(every, [0]), of(every, [1])]
    if heads > 1:
        splits["half the kv heads"] = [of(every, last=-(-heads // 2)), of(every, first=-(-heads // 2))]
        splits["one kv head"] = [of(every, first=head, last=head + 1) for head in range(heads)]
    if count > 1:
        splits["one layer"] = [of([layer]) for layer in every]
        splits["keys of one layer, values joint"] = [*(of([layer], [0]) for layer in every), of(every, [1])]
        splits["one layer, apart"] = [of([layer], [kind]) for layer in every for kind in (0, 1)]
    return splits


def _is_key(group: GroupAxes) -> Tensor:
    """(N,) which numbers of a group are of keys."""
    found = torch.zeros(len(group.energy), dtype=torch.bool)
    for layer in range(len(group.layers)):
        found[numbers_of(group, layer, keys=True).flatten()] = True
    return found
