"""The stacks of the matrix: every stage, and how much each may lose."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvstack import Calibration, CommonKV, Evict, KVStack, Quant, Tiers, calibrate
from kvstack.model.layers import find_layers

from .modes import tokens

__all__ = ["STACKS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One stack of the matrix.

    Attributes:
        make: its stages, for a model.
        loss: how far, as a share of their norm, decoded keys and values may be from those that were fed; None where the
            stage promises nothing.
        fused: as in `KVStack`.
    """

    make: Callable[[Any], list[Any]]
    loss: float | None = 0.0
    fused: bool = True

    def stack(self, model: Any) -> KVStack:
        """A new stack, small enough that texts of 70 tokens are compressed."""
        return KVStack(self.make(model), sinks=2, window=8, block=8, fused=self.fused)


@functools.lru_cache(maxsize=4)
def _calibration(model: Any, **settings: Any) -> Calibration | None:
    """A calibration on one window of random tokens, which is all that the plumbing needs; None where a stack has
    nothing to compress, so that nobody is asked for one."""
    if not find_layers(model).full:
        return None

    def tokenizer(text: str, **options: Any) -> dict[str, Any]:
        return {"input_ids": tokens(1, 2048)}

    return calibrate(model, {"random": "numbers"}, tokens=1024, tokenizer=tokenizer, **settings)  # type: ignore[arg-type]


def _scores() -> dict[str, Entry]:
    names = ("h2o", "tova", "expected", "lookahead", "kvzap", "kvzip", "triattention", "knorm", "streaming", "random")
    return {f"Evict, {name}": Entry(lambda model, name=name: [Evict(0.4, name)]) for name in names}


def _plugins() -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    if importlib.util.find_spec("kvstack_xkv"):
        from kvstack_xkv import XKV

        entries["XKV"] = Entry(lambda model: [XKV(keep=1.0, layers=1)], 0.02)
    if importlib.util.find_spec("kvstack_kvtc"):
        from kvstack_kvtc import KVTC

        entries["KVTC"] = Entry(lambda model: [KVTC(2, calibration=_calibration(model, metric="variance"))], None)
    if importlib.util.find_spec("kvstack_minicache"):
        from kvstack_minicache import MiniCache

        entries["MiniCache"] = Entry(lambda model: [MiniCache()], None)
    if importlib.util.find_spec("kvstack_kvsharer"):
        from kvstack_kvsharer import KVSharer

        entries["KVSharer"] = Entry(lambda model: [KVSharer()], None)
    return entries


STACKS: dict[str, Entry] = {
    "empty": Entry(lambda model: []),
    "Evict": Entry(lambda model: [Evict(0.4)]),
    "Evict, budgets": Entry(lambda model: [Evict(0.4, "knorm", budgets="layers"), Quant(8)], 0.02),
    "Evict, keydiff": Entry(lambda model: [Evict(0.4, "keydiff", layers=1)]),
    "Quant(8)": Entry(lambda model: [Quant(8)], 0.02),
    "Quant(8), not fused": Entry(lambda model: [Quant(8)], 0.02, fused=False),
    "Quant(2)": Entry(lambda model: [Quant(2)], None),
    "CommonKV": Entry(lambda model: [CommonKV(1.0, layers=1, calibration=_calibration(model, layers=1))], 0.01),
    "CommonKV, weights": Entry(lambda model: [CommonKV(1.0, layers=1, basis="weights")], 0.01),
    "the line": Entry(lambda model: [CommonKV(calibration=_calibration(model)), Quant(2), Evict(0.2)], None),
    "the line, Tiers": Entry(
        lambda model: [CommonKV(calibration=_calibration(model)), Quant(2), Tiers("snapkv")], None
    ),
    **_scores(),
    **_plugins(),
}
