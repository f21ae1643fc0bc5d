"""A stack for a byte budget: settings are computed, not measured.

Caches      how many numbers a model caches for a token, layer by layer
predicted   the bytes that a stack holds after a prompt, computed from its settings
candidates  stacks of several kinds that spend a budget, those that drifted least in our benchmarks first
for_budget  the first of them that works with the model

Bytes are shares of a dense cache in 16 bits, as in all tables of the benchmarks. Where the model runs in float32, a
stack holds a smaller share of its dense cache: codes do not grow with the type of the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .accounting import tensors_in
from .cache import KVStack
from .calibration.plan import BLOCK
from .encode.quant import Quant
from .errors import BindError, CalibrationError, KVStackError, KVStackWarning, StageError
from .model.layers import find_layers, group_size
from .model.probing import cached_layers
from .packed import storage_bytes
from .select.evict import Evict
from .select.lookahead import LookAhead
from .select.tiers import Tiers
from .stage import Stage
from .store.budget import allowance, how_many
from .transform.commonkv import CommonKV

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Caches", "Candidate", "candidates", "for_budget", "predicted", "smallest"]

RAW = 2
"""Bytes of a number that no stage packs."""
SCALES = 4
"""Bytes of the scale and the least number of a group, two halves."""
WINDOW, NARROW = 64, 16
"""The usual window of a stack, and the one of stacks for small budgets."""
TEXT_HASH = 8
"""Bytes of the hash of the ids of a row."""
LATENT_GRANULE = 8
"""Tokens whose latents are packed together."""
WIDE = 10
"""Layers that share a latent where few bytes are left: more layers have more in common."""
LEAST_BITS = 0.1
"""Bits for each cached number below which nothing was measured that one would want to read."""
LEAST_KEPT = 0.05
"""The same of tokens that `Evict` keeps."""
UNEVEN = 64
"""Tokens added to those in classes: a class has whole granules, and those of the most important class weigh most."""


@dataclass(frozen=True)
class Caches:
    """The numbers that a model caches for a token.

    Args:
        layers: for each layer with full attention: kv heads, channels of a key, channels of a value.
        windows: for each layer with a sliding window: numbers of a token, tokens of its window.
        fixed: bytes that other layers hold, whatever the length of the text.
        counters: bytes that layers with a sliding window hold in addition to their tokens.
    """

    layers: tuple[tuple[int, int, int], ...] = ((8, 128, 128),) * 32
    windows: tuple[tuple[int, int], ...] = ()
    fixed: int = 0
    counters: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Caches:
        """Seen by running one token through the model."""
        full, layers, windows, fixed, counters = set(find_layers(model).full), [], [], 0, 0
        for number, layer in enumerate(cached_layers(model)):
            if number in full:
                layers.append((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
            elif getattr(layer, "is_sliding", False):
                windows.append((layer.keys.numel() + layer.values.numel(), int(layer.sliding_window)))
                counters += storage_bytes(
                    [x for x in tensors_in(vars(layer)) if x is not layer.keys and x is not layer.values]
                )
            else:
                fixed += storage_bytes(tensors_in(vars(layer))) * RAW // model.dtype.itemsize
        return cls(tuple(layers), tuple(windows), fixed, counters)

    @property
    def numbers(self) -> int:
        """Numbers of a token in all layers with full attention."""
        return sum(heads * (keys + values) for heads, keys, values in self.layers)

    def rest(self, context: int) -> int:
        """Bytes that no stack compresses."""
        sliding = sum(numbers * min(context, window - 1) for numbers, window in self.windows)
        return sliding * RAW + self.fixed

    def dense(self, context: int) -> int:
        """Bytes of a dense cache."""
        return self.numbers * context * RAW + self.rest(context)


@dataclass(frozen=True)
class Candidate:
    """A stack that spends a budget.

    Attributes:
        kind: the work of the stack, in words.
        stages, settings: the parts of the stack.
        share: the bytes it holds after the prompt, as a share of a dense cache's, predicted.
    """

    kind: str
    stages: tuple[Stage, ...]
    settings: dict[str, int]
    share: float

    def stack(self, model: PreTrainedModel | None = None) -> KVStack:
        """An empty stack, bound to `model` where there is one."""
        return KVStack(self.stages, model=model, **self.settings)  # type: ignore[arg-type]


# ---- bytes


def predicted(stack: KVStack, caches: Caches, context: int) -> int:
    """Bytes that `stack` holds after a prompt of `context` tokens, at most: sinks, window, positions, scales and what
    is left over from whole granules included.

    Only of stacks with the stages `Quant` (`kivi`), `CommonKV` (calibrated), `Evict` and `Tiers`.

    Raises:
        StageError: it has another stage, or one with other settings.
    """
    quant, common, evict, tiers = (_only(stack, kind) for kind in (Quant, CommonKV, Evict, Tiers))
    others = [stage for stage in stack.stages if stage not in (quant, common, evict, tiers)]
    odd = others or [stage for stage in (quant, common) if stage is not None and not _known(stage)]
    odd += [evict] if evict is not None and not _plain(evict) else []
    if odd:
        raise StageError(f"the bytes of {odd[0]!r} cannot be predicted. Measure them: stack.nbytes after a prompt.")
    middle = max(0, context - stack.sinks - stack.window)
    granule = 1
    if quant is not None:
        granule = LATENT_GRANULE if common is not None else quant.group or 32
    left = middle
    if evict is not None:
        budget = allowance(evict.keep, context, stack.sinks, stack.window)
        left -= how_many(middle, middle, budget, granule, stack.block)
    compresses = quant is not None or common is not None
    enough = left >= granule and (left < middle or left >= max(stack.block, granule))
    sealed = left // granule * granule if compresses and enough else 0
    raw = min(context, stack.sinks + stack.window) + left - sealed
    held = caches.rest(context) + caches.counters + caches.numbers * raw * RAW + TEXT_HASH
    held += math.ceil(_sealed(sealed, quant, common, tiers, caches))
    if evict is not None and left < middle:
        held += 4 * left * _sets(evict, common, caches)
    return held


def _plain(evict: Evict) -> bool:
    """Return True if all heads keep equally many tokens, and nothing is held in addition to their positions."""
    return evict.budgets == "equal" and evict.positions == "text" and not evict.refit


def _sealed(tokens: int, quant: Quant | None, common: CommonKV | None, tiers: Tiers | None, caches: Caches) -> float:
    if not tokens:
        return 0
    if common is None:
        assert quant is not None
        return sum(_kivi(tokens, quant, *layer) for layer in caches.layers)
    groups = len(caches.layers) // _together(common, caches)
    kept = int(common.keep * caches.numbers) if isinstance(common.keep, float) else common.keep * groups
    if quant is None:
        return kept * tokens * RAW
    classes = 0.0
    if tiers is not None:
        classes = tokens * groups * (len(tiers.shares) - 1).bit_length() / 8
        tokens += UNEVEN
    # a latent has a bit and its gain at least
    return max(quant.bits * kept, 3 * groups) * tokens / 8 + classes


def _kivi(tokens: int, quant: Quant, heads: int, keys: int, values: int) -> float:
    """Bytes of the codes and scales of one layer."""
    group = quant.group or 32
    codes = (keys + values) * tokens * quant.bits / 8
    scales = keys * tokens / group + values / min(group, values) * tokens
    return heads * (codes + scales * SCALES)


def _sets(evict: Evict, common: CommonKV | None, caches: Caches) -> int:
    """Sets of tokens, each of which has its positions."""
    together = evict.layers or (_together(common, caches) if common else evict.usual_layers)
    if together == 1 and not evict.share_heads:
        return sum(heads for heads, _, _ in caches.layers)
    return math.ceil(len(caches.layers) / together)


def _together(common: CommonKV, caches: Caches) -> int:
    return common.layers or group_size(len(caches.layers), most=_most_layers(caches))


def _most_layers(caches: Caches) -> int:
    """Layers whose numbers may share axes."""
    return max(1, BLOCK // max(heads * (keys + values) for heads, keys, values in caches.layers))


def _only(stack: KVStack, kind: type[Any]) -> Any:
    return next((stage for stage in stack.stages if type(stage) is kind), None)


def _known(stage: Quant | CommonKV) -> bool:
    if isinstance(stage, Quant):
        return stage.codec == "kivi"
    return stage.basis == "calibrated" and not stage.unmerged


# ---- stacks


def for_budget(share: float, context: int, model: PreTrainedModel | None = None) -> KVStack:
    """A stack that holds at most `share` of a dense cache's bytes after a prompt of `context` tokens. Nothing is
    measured: it is the kind of stack that drifted least in our benchmarks, with settings that spend the budget.
    `kvstack choose` measures.

    Args:
        share: the budget, above 0, as a share of the bytes of a dense cache in 16 bits. While decoding, the newest
            tokens wait uncompressed, up to `block` of them; and what is fitted to the model (`report().model_nbytes`)
            serves all its caches, and is not counted.
        context: tokens in a prompt.
        model: bind the stack to this model, whose sizes are then used. If the best kind of stack cannot be bound to it,
            the next one is taken, with a `KVStackWarning`. Without a model: 32 layers with 8 kv heads of 128 channels.

    Raises:
        StageError: no stack is so small, and the message names the smallest share; or an argument is no such number.
        BindError: no candidate can be bound to the model.

    Example:
        >>> import kvstack
        >>> kvstack.for_budget(0.6, context=8192)
        KVStack([Quant(bits=8)])
    """
    _check(share, context)
    caches = Caches() if model is None else Caches.of(model)
    found = candidates(share, context, caches)
    if not found:
        raise StageError(
            f"no stack holds {share:g} of a dense cache's bytes after {context:,} tokens. "
            f"Use {smallest(context, caches):g} or more, or a longer context."
        )
    refused: KVStackError | None = None
    for candidate in found:
        try:
            stack = candidate.stack(model)
        except (BindError, CalibrationError) as error:
            refused = refused or error
            continue
        if refused is not None:
            told = f"for_budget({share:g}): {stack!r} takes the place of {found[0].stack()!r}: {refused}"
            warnings.warn(told, KVStackWarning, stacklevel=2)
        return stack
    raise BindError(
        f"for_budget({share:g}): no stack of {len(found)} can be bound to this {type(model).__name__}. The first: "
        f"{refused} Use a larger share, which stacks without CommonKV can hold."
    ) from refused


def _check(share: float, context: int) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
        raise StageError(f"share={share!r} is not a share of a dense cache's bytes. Use 0.1 for a tenth.")
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise StageError(f"context={context!r} is not a number of tokens. Use 1 or more.")


def candidates(share: float, context: int, caches: Caches) -> list[Candidate]:
    """Stacks of several kinds that hold `share` of a dense cache's bytes after `context` tokens, or a little less.

    Those that drifted least in our benchmarks come first (`kvstack bench quality`).
    """
    budget = _Budget(share, context, caches)
    wide = _wide(caches)
    found = [
        budget.fit("quantized", WINDOW, Quant(8)),
        budget.latents("latents in classes", NARROW, wide, Tiers(LookAhead())),
        budget.latents("latents", NARROW, wide),
        budget.latents("latents", WINDOW, None),
        *(budget.fit("quantized", window, Quant(bits)) for bits in (4, 2) for window in (WINDOW, NARROW)),
        budget.fewer("latents of fewer tokens", NARROW, CommonKV(), Quant(2)),
        *(budget.fewer("quantized, fewer tokens", window, Quant(b)) for window in (NARROW, WINDOW) for b in (4, 2)),
    ]
    kept = {candidate.stages: candidate for candidate in reversed(found) if candidate is not None}
    return [candidate for candidate in found if candidate is not None and kept[candidate.stages] is candidate]


@dataclass(frozen=True)
class _Budget:
    """The stacks of one kind that fit into a budget."""

    share: float
    context: int
    caches: Caches

    def fit(self, kind: str, window: int, *stages: Stage) -> Candidate | None:
        """These stages, if they fit."""
        stack = KVStack(stages, window=window)
        settings = {"window": window} if window != KVStack(stages).window else {}
        held = predicted(stack, self.caches, self.context) / self.caches.dense(self.context)
        return Candidate(kind, stack.stages, settings, held) if held <= self.share else None

    def latents(self, kind: str, window: int, layers: int | None, *more: Stage) -> Candidate | None:
        """Of stacks with `CommonKV` the one that keeps most. Only the product of its share and the bits counts, so it
        takes the fewest bits that can spend the budget."""
        found = None
        for bits in (2, 4, 8):
            found = self._most(kind, window, LEAST_BITS / bits, partial(_latents, bits, layers, more)) or found
            if found is not None and found.stages[0] != CommonKV(1.0, layers):
                break
        return found

    def fewer(self, kind: str, window: int, *stages: Stage) -> Candidate | None:
        """Of stacks with these stages and `Evict` the one that keeps most, where they do not fit alone."""
        if self.fit(kind, window, *stages):
            return None
        return self._most(kind, window, LEAST_KEPT, lambda keep: (*stages, Evict(keep)), 0.999)

    def _most(
        self,
        kind: str,
        window: int,
        least: float,
        make: Callable[[float], tuple[Stage, ...]],
        most: float = 1.0,
    ) -> Candidate | None:
        """The stack that keeps most, in steps of a thousandth, by halving."""
        low, high = math.ceil(least * 1000), round(most * 1000)
        best = self.fit(kind, window, *make(low / 1000))
        while best is not None and low < high:
            half = (low + high + 1) // 2
            found = self.fit(kind, window, *make(half / 1000))
            low, high, best = (half, high, found) if found else (low, half - 1, best)
        return best


def _latents(bits: int, layers: int | None, more: tuple[Stage, ...], keep: float) -> tuple[Stage, ...]:
    return (CommonKV(keep, layers), Quant(bits), *more)


def _wide(caches: Caches) -> int | None:
    """Layers for small budgets: a divisor of their number up to `WIDE`; None where the usual number is no smaller."""
    count, most = len(caches.layers), _most_layers(caches)
    wide = max(n for n in range(1, min(WIDE, most) + 1) if count % n == 0)
    return wide if wide > group_size(count, most=most) else None


def smallest(context: int, caches: Caches) -> float:
    """The smallest share of a dense cache's bytes that a candidate holds after `context` tokens, rounded up."""
    budget, evict = _Budget(math.inf, context, caches), Evict(LEAST_KEPT)
    least: list[tuple[Stage, ...]] = [
        *((CommonKV(LEAST_BITS / 2, layers), Quant(2)) for layers in (_wide(caches), None)),
        (CommonKV(), Quant(2), evict),
        (Quant(2), evict),
    ]
    held = (budget.fit("", NARROW, *stages) for stages in least)
    return math.ceil(min(candidate.share for candidate in held if candidate) * 1e4) / 1e4
