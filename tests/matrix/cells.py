"""One cell of the matrix: a model, a mode and a stack give a verdict."""

from __future__ import annotations

import copy
import functools
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvstack.errors import KVStackError

from .architectures import build
from .modes import MODES
from .oracles import NotChecked, Recorded, Told, difference, loss, record, replay
from .stacks import STACKS

__all__ = ["Verdict", "run"]

TOLERANCE = 1e-3
"""Log-probabilities that differ less are equal: float32 in another order, in models of random weights."""


@dataclass(frozen=True)
class Verdict:
    """What came of a cell.

    Attributes:
        kind: exact (equal to the dense cache, evicted tokens masked), close (equal to a dense cache of what is held,
            which is as near to what was fed as the stage promises), works (the same, of a stage that promises
            nothing), refused, not checked (the dense cache cannot be told), none (the model itself cannot do it), or
            wrong.
        words: of a refusal, or what was wrong.
    """

    kind: str
    words: str = ""


@functools.lru_cache(maxsize=2)
def _model(name: str, attention: str) -> Any:
    return build(name, attention)


@functools.lru_cache(maxsize=32)
def _dense(name: str, attention: str, mode: str) -> list[torch.Tensor] | str:
    """Logits of the mode with a `DynamicCache`, or why there are none."""
    model = _model(name, attention)
    recorded = Recorded()
    try:
        record(model, DynamicCache(config=model.config), MODES[mode], recorded)
    except Exception as error:
        return _first_line(error)
    own = [forward.logits for forward in recorded.forwards if forward.logits is not None]
    return own if difference(recorded, own) < torch.inf else "its logits are not finite"


def run(name: str, attention: str, mode: str, stack_name: str) -> Verdict:
    """The verdict on a cell."""
    with warnings.catch_warnings(action="ignore"):
        return _run(name, attention, mode, stack_name)


def _run(name: str, attention: str, mode: str, stack_name: str) -> Verdict:
    model = _model(name, attention)
    dense = _dense(name, attention, mode)
    if isinstance(dense, str):
        return Verdict("none", dense)
    entry, recorded, stack = STACKS[stack_name], Recorded(), None
    try:
        stack = entry.stack(model)
        record(model, stack, MODES[mode], recorded)
    except Exception as error:
        stopped = _stopped(error, recorded, stack)
        if stack_name == "empty" and stopped.kind == "refused":
            return Verdict("wrong", f"refused, and a DynamicCache works: {error}")
        return stopped
    finally:
        if stack is not None:
            stack.unbind()
    if recorded.replaced:
        return Verdict("wrong", f"a {recorded.replaced} took the stack's place")
    return _same_bits(recorded, dense) if stack_name == "empty" else _as_told(model, stack, recorded, entry.loss)


def _stopped(error: Exception, recorded: Recorded, stack: Any) -> Verdict:
    if not isinstance(error, KVStackError):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the harness"
        return Verdict("wrong", f"{type(error).__name__}: {_first_line(error)} ({place})")
    try:
        copy.deepcopy(stack)  # which a stack whose last forward did not end refuses
    except KVStackError:
        return Verdict("wrong", f"refused in the middle of a forward: {error}")
    if recorded.forwards and recorded.forwards[-1].attended:
        return Verdict("wrong", f"refused after a layer had run: {error}")
    return Verdict("refused", str(error))


def _same_bits(recorded: Recorded, dense: list[torch.Tensor]) -> Verdict:
    found = [forward.logits for forward in recorded.forwards]
    same = len(found) == len(dense) and all(
        one is not None and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(found, dense, strict=True)
    )
    if same:
        return Verdict("exact")
    if [x.shape for x in found if x is not None] != [x.shape for x in dense]:
        return Verdict("wrong", "other forwards than with a DynamicCache")
    return Verdict("wrong", f"not bit-equal to a DynamicCache: {difference(recorded, dense):.2g}")


def _as_told(model: Any, stack: Any, recorded: Recorded, most: float | None) -> Verdict:
    told = Told(config=model.config)
    told.shares = stack.binding.shares
    try:
        expected = replay(model, recorded, told)
    except NotChecked as why:
        return Verdict("not checked", str(why))
    gap = difference(recorded, expected)
    if gap > TOLERANCE:
        return Verdict("wrong", f"differs by {gap:.2g} from a dense cache that sees what the stack held")
    lost = loss(stack, recorded, told)
    if most is None:
        return Verdict("works", f"loss {lost:.2g}")
    if lost > max(most, 1e-5):
        return Verdict("wrong", f"what it holds is {lost:.2g} of its norm from what it was fed")
    return Verdict("close" if most else "exact", f"{gap:.1g}, loss {lost:.1g}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
