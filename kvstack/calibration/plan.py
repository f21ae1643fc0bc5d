"""The plan of a calibration, made before it runs: the numbers that share axes, the tokens to read, the memory.

A group has as many layers as `block` numbers allow, and a layer that is wider alone is cut into runs of kv heads. Where
the sums of all blocks are more than `memory`, the texts are read again for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CalibrationError
from ..model.adapters import unwrapped
from ..model.attention import device_of
from ..model.layers import LayerGroups
from ..model.ranks import whole_shapes
from .axes import Shapes, fine_rows, widths
from .calibration import Heads, Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BLOCK",
    "EACH",
    "KEPT",
    "MEMORY",
    "TOKENS",
    "Block",
    "CalibrationPlan",
    "calibrated_groups",
    "calibration_plan",
    "check_tokens",
]

TOKENS, EACH = 10_240, 2.5
"""Tokens read by default, scored ones not counted; and for each axis of the largest block, where that is more."""
BLOCK = 8192
"""Numbers that share axes, at most: their sums take 256 MiB, and finding their axes some minutes on a processor."""
KEPT = 0.5
"""Share of the axes that is kept: enough for any budget of two bits a number."""
BITS = (8, 16)
MEMORY = 4.0
"""GiB for the sums of one pass over the texts."""
GIB = 2**30


@dataclass(frozen=True)
class Block:
    """Numbers that share axes.

    Attributes:
        layers: the group, indices in the model.
        shapes: (H, D of keys, D of values) of each of them, in this block.
        heads: the kv heads of each layer; empty: all.
    """

    layers: tuple[int, ...]
    shapes: Shapes
    heads: Heads = ()

    @property
    def numbers(self) -> int:
        """Numbers a token."""
        return sum(widths(self.shapes))

    @property
    def sums_nbytes(self) -> int:
        """Bytes of the sums of their products."""
        return 4 * self.numbers**2


@dataclass(frozen=True, eq=False)
class CalibrationPlan:
    """The plan of a calibration.

    Attributes:
        groups: the layers that are stored together.
        metric: the weights of numbers.
        blocks: the numbers that share axes, group after group.
        tokens: number of tokens to read.
        passes: the blocks to add up in each pass over the texts.
        keep_axes: share of the axes that is kept.
        bits: of each number of an axis.
    """

    groups: LayerGroups
    metric: Metric
    blocks: Sequence[Block]
    tokens: int
    passes: Sequence[Sequence[int]]
    keep_axes: float
    bits: int

    @property
    def widest(self) -> int:
        """Numbers of the largest block."""
        return max(block.numbers for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the calibration: of axes, their scales, and mean, weight and energy of each number. Where blocks
        differ in size, as if all kept the same share of their axes."""
        total = 0.0
        for block in self.blocks:
            n, kept = block.numbers, self.keep_axes * block.numbers
            total += kept * (n + 4 * len(widths(block.shapes))) + min(kept, fine_rows(n, self.bits)) * n + 12 * n
        return int(total)

    @property
    def peak_nbytes(self) -> int:
        """Peak bytes in addition to the model: the sums of a pass, all axes in codes, and four times the sums of the
        largest block while its axes are found. The model's own forward is not counted."""
        sums = max(sum(self.blocks[number].sums_nbytes for number in some) for some in self.passes)
        codes = sum(block.numbers**2 * self.bits // 8 for block in self.blocks)
        return sums + codes + 4 * max(block.sums_nbytes for block in self.blocks)


def calibration_plan(
    model: PreTrainedModel,
    tokens: int | None = None,
    *,
    layers: int | None = None,
    metric: Metric = "fisher",
    only: Sequence[int] | None = None,
    keep_axes: float = KEPT,
    bits: int = 8,
    block: int = BLOCK,
    memory: float = MEMORY,
) -> CalibrationPlan:
    """Return the plan of `calibrate` with these arguments. It runs one token through the model, which may be on the
    meta device: so you can plan for a model that does not fit here.

    Raises:
        CalibrationError: it cannot be done.
    """
    model = unwrapped(model)
    _check_settings(model, metric, keep_axes, bits, block, memory)
    groups = calibrated_groups(model, layers, only, metric, block)
    # without numbers nobody can tell how keys are rotated
    if groups.refusal and device_of(model).type != "meta":
        raise CalibrationError(
            f"calibration takes the rotary embedding off the keys of {type(model).__name__}, which cannot be done in "
            f"{groups.refusal}. Use stages that take keys as they are cached, such as Quant."
        )
    blocks = _blocks(model, groups, metric, block)
    least = math.ceil(EACH * max(each.numbers for each in blocks))
    passes = _passes([each.sums_nbytes for each in blocks], memory)
    return CalibrationPlan(
        groups, metric, blocks, max(TOKENS, least) if tokens is None else tokens, passes, keep_axes, bits
    )


def calibrated_groups(
    model: PreTrainedModel,
    layers: int | None,
    only: Sequence[int] | None = None,
    metric: Metric = "fisher",
    block: int = BLOCK,
) -> LayerGroups:
    """The groups of `layers` that a calibration is for; by default as many as one block of `block` numbers holds. Where
    processes share the kv heads they are those of one process with all heads."""
    if layers is not None:
        return LayerGroups(model, layers, only)
    full = LayerGroups(model, 1, only).full
    most = max(1, block // max(_numbers(model, metric)[i] for i in full))
    if metric == "fisher":
        return LayerGroups(model, None, only, most=most)
    return LayerGroups(model, max(n for n in range(1, len(full) + 1) if len(full) % n == 0 and n <= most), only)


def _check_settings(
    model: PreTrainedModel, metric: str, keep_axes: float, bits: int, block: int, memory: float
) -> None:
    if metric not in ("fisher", "variance"):
        raise CalibrationError(f'{metric!r} is not a metric. Use "fisher" or "variance".')
    if not 0 < keep_axes <= 1:
        raise CalibrationError(f"keep_axes={keep_axes} is not a share of the axes. Use a number in (0, 1].")
    if bits not in BITS:
        raise CalibrationError(f"bits={bits}: axes are kept in 8 or 16 bits. Use bits=8.")
    if block < 1 or not memory > 0:
        raise CalibrationError(
            f"block={block} counts numbers, and memory={memory} GiB. Use block={BLOCK}, memory={MEMORY}."
        )
    if metric == "fisher" and model.get_output_embeddings() is None:
        raise CalibrationError(
            f"{type(model).__name__} predicts no tokens, and calibration asks how its predictions change. "
            "Pass the causal model it is part of: KVStack([...], model=...)."
        )


def _numbers(model: PreTrainedModel, metric: Metric) -> dict[int, int]:
    """Return the numbers that a token has in each layer: of keys and values, or of the larger of the two."""
    return {
        i: heads * (max(keys, values) if metric == "variance" else keys + values)
        for i, (heads, keys, values) in whole_shapes(model).items()
    }


def _blocks(model: PreTrainedModel, groups: LayerGroups, metric: Metric, block: int) -> list[Block]:
    """The blocks of all groups; of keys and values apart, those of the keys first."""
    numbers, shapes = _numbers(model, metric), whole_shapes(model)
    joint = max(sum(numbers[i] for i in group) for group in groups.groups)
    heads = {shapes[i][0] for i in groups.full}
    parts = [1]
    if metric == "fisher":
        parts = [n for n in range(1, min(heads) + 1) if all(count % n == 0 for count in heads)]
    # as many runs of kv heads in every group, as few as the widest one needs
    runs = next((n for n in parts if joint <= n * block), None)
    if runs is None:
        most, size = parts[-1], joint // groups.size
        raise CalibrationError(
            f"{groups.size} layers of {type(model).__name__} cache {joint} numbers a token that would share axes"
            f"{f', {joint // most} for each run of kv heads' * (most > 1)}, and block={block} of them may. "
            f"Use {_fewer(groups, size, block * most)}block={joint // most}."
        )
    made = []
    for group in groups.groups:
        each = [shapes[i] for i in group]
        if metric == "variance":
            made.append(Block(tuple(group), tuple((count, keys, 0) for count, keys, _ in each)))
            made.append(Block(tuple(group), tuple((count, 0, values) for count, _, values in each)))
            continue
        for run in range(runs):
            cut = tuple((count // runs, keys, values) for count, keys, values in each)
            mine = tuple((count * run, count * (run + 1)) for count, _, _ in cut)
            made.append(Block(tuple(group), cut, mine if runs > 1 else ()))
    return made


def _fewer(groups: LayerGroups, each: int, most: int) -> str:
    """Groups of fewer layers that have `most` numbers or less, as an error offers them."""
    count = len(groups.full)
    fewer = [n for n in range(1, groups.size) if count % n == 0 and n * each <= most]
    return f"layers= one of {fewer}, or " * bool(fewer)


def check_tokens(plan: CalibrationPlan, name: str, tokens: int) -> None:
    """Refuse fewer tokens than axes, for the model of this name: they tell of no more axes than that many."""
    widest, groups = plan.widest, plan.groups
    if widest <= tokens:
        return
    kind = " of keys or of values" * (plan.metric == "variance")
    raise CalibrationError(
        f"{groups.size} layers of {name} cache {widest} numbers a token{kind} that share axes, and {tokens} tokens "
        f"tell of no more axes than that many. "
        f"Use {_fewer(groups, widest // groups.size, tokens)}tokens={math.ceil(EACH * widest)} or more."
    )


def _passes(sizes: Sequence[int], memory: float) -> list[list[int]]:
    """Return the blocks to add up in each pass over the texts, so that their sums, `sizes` bytes, fit into `memory`
    GiB; at least one each."""
    passes, room = list[list[int]](), 0.0
    for number, nbytes in enumerate(sizes):
        if not passes or nbytes > room:
            passes.append([])
            room = memory * GIB
        passes[-1].append(number)
        room -= nbytes
    return passes
