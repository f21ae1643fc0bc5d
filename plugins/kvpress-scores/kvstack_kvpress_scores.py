"""Scores of kvpress in kvstack: any press that ranks tokens by their keys and values, given to `Evict`.

from kvstack import Evict
from kvstack_kvpress_scores import KVPressScore
Evict(0.2, score=KVPressScore("KeyDiffPress"))
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvstack import KV, Context, Score, StageError
from kvstack.authoring import check

__all__ = ["KVPressScore"]

INSTEAD = {
    "ExpectedAttentionPress": "expected",
    "ObservedAttentionPress": "h2o",
    "PyramidKVPress": "snapkv",
    "RandomPress": "random",
    "SnapKVPress": "snapkv",
    "StreamingLLMPress": "streaming",
    "TOVAPress": "tova",
}
"""Presses that need more than keys and values, or an order that is chance, and what kvstack calls the same method."""

PROBE = 320
"""Tokens a press is tried on when the score is built: some presses do nothing on short texts."""


@dataclass(frozen=True, repr=False, init=False)
class KVPressScore(Score):
    """The score of a press of kvpress for each token, in the place of one of kvstack's own scores.

    Args:
        press: the class name of a press, such as `"KeyDiffPress"`, or any object with kvpress' method
            `score(module, hidden_states, keys, values, attentions, kwargs) -> (B, H, T)`.
        arguments: the settings of a press that is named, such as `lag_size=64`.

    A press sees the keys (as cached, and un-rotated by `module.k_proj`) and the values of all tokens that are held,
    decoded where they are packed. It sees no hidden states, queries or attention: kvstack holds none. A press that asks
    for them is refused when the score is built. Sinks and window stay whatever it says, and `compression_ratio` is
    `Evict`'s to say.

    Random numbers that a press draws are the same every time: two looks at the same tokens give the same ranking. That
    holds in one thread: torch has one generator for all, and threads that draw meanwhile disturb each other.

    Raises:
        StageError: kvpress is not installed, has no such press, or the press needs what a cache does not hold.

    Source: kvpress' ScorerPress, https://github.com/NVIDIA/kvpress. Differs from kvpress: the budget also holds while
    decoding, a block at a time, so a score is asked of tokens from which others have gone already.

    Example:
        Evict(0.2, score=KVPressScore("LagKVPress", lag_size=64))
    """

    press: Any
    arguments: tuple[tuple[str, Any], ...] = ()

    name = "kvpress"
    source = "NVIDIA/kvpress"

    def __init__(self, press: Any, **arguments: Any) -> None:
        vars(self).update(press=press, arguments=tuple(sorted(arguments.items())))
        named = isinstance(press, str)
        check(named or not arguments, self, "arguments build a press that is named.", "Give them to the press.")
        self._check_known(press if named else type(press).__name__)
        built = self._built
        scores = callable(getattr(built, "score", None)) and not isinstance(built, type)
        check(scores, self, "a press has a method score.", 'Use a press that ranks tokens, such as "KnormPress".')
        ratio = getattr(built, "compression_ratio", 0.0)
        check(not ratio, self, f"compression_ratio={ratio} has no say here.", "Leave it out: Evict(keep) cuts.")
        self._check_needs()

    def settings(self) -> dict[str, Any]:
        return {"press": self.press, **dict(self.arguments)}

    def score(self, kv: KV, context: Context) -> Tensor:
        module = _Module(kv, context)
        with _drawn_from(context.layer, kv.keys.device):
            # presses take norms and sums, which may be too large for a half
            keys, values = (x.float() if x.dtype == torch.float16 else x for x in (kv.keys, kv.values))
            scores: Tensor = self._built.score(module, module.hidden, keys, values, None, {})
        return scores

    # ---- refused when it is built

    def _check_known(self, press: str) -> None:
        own = INSTEAD.get(press)
        check(own is None, self, "this press needs what kvstack gives to scores of its own.", f'Use score="{own}".')

    @cached_property
    def _built(self) -> Any:
        """The press, built once where it is named."""
        if not isinstance(self.press, str):
            return self.press
        kind = _find(self)
        try:
            return kind(**dict(self.arguments))
        except (TypeError, AssertionError) as error:
            raise StageError(f"{self!r}: the press cannot be built: {error}. See its arguments in kvpress.") from None

    def _check_needs(self) -> None:
        """Try the press: what it needs beyond keys and values, it asks for."""
        draw = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(1, 2, PROBE, 16, generator=draw) for _ in range(2))
        context = Context(layer=0, seen=PROBE, positions=torch.arange(PROBE)[None, None])
        problem = ""
        try:
            with torch.no_grad():
                shape = tuple(self.score(KV(keys, values), context).shape)
            if shape != (1, 2, PROBE):
                problem = f"it gave {shape} for {PROBE} tokens of 2 heads"
        except Exception as error:  # whatever a stranger's press raises
            problem = f"{type(error).__name__}: {error}"
        check(
            not problem,
            self,
            f"this press does not work on keys and values alone ({problem}).",
            'Use "KnormPress", "KeyDiffPress", "LagKVPress", "CURPress" or "LeverageScorePress", or a score of '
            "kvstack: snapkv, expected.",
        )


class _Hidden:
    """Stands where a press expects hidden states: it has their rows and tokens, and no numbers."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = torch.Size(shape)


class _Module:
    """Stands where a press expects the attention module: its shape, and the projection whose result is known."""

    def __init__(self, kv: KV, context: Context) -> None:
        rows, heads, tokens, self.head_dim = kv.keys.shape
        self.layer_idx = context.layer
        self.hidden = _Hidden((rows, tokens, heads * self.head_dim))
        self._keys, self._context = kv.keys, context

    def k_proj(self, hidden: _Hidden) -> Tensor:
        """Keys before rotary embedding (B, T, H*D), of the tokens that are held."""
        if hidden is not self.hidden:
            raise TypeError("only the keys of all tokens are known")
        keys, rope = self._keys, self._context.rope
        if rope is not None:
            keys = rope.unrotate(keys, self._context.positions)
        return keys.transpose(1, 2).flatten(2)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"it asks the attention module for {name!r}, which a score does not get")


@contextmanager
def _drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers start from `seed`, and go on afterwards as if none had been drawn. Not across threads: what others
    draw meanwhile is drawn from `seed` too, and again afterwards."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _find(score: KVPressScore) -> Any:
    """The class of a press, from its own file.

    kvpress' package, when it is imported, wraps transformers' attention functions for good and needs packages that no
    score does. So only the file is imported, and what it left in `sys.modules` is taken out again: a later `import
    kvpress` finds things as they were.
    """
    loaded = sys.modules.get("kvpress")
    if loaded is None:
        spec = importlib.util.find_spec("kvpress")
        check(
            spec is not None,
            score,
            "kvpress is not installed.",
            "Run: pip install --no-deps kvpress (its other requirements exclude kvstack's, and are not needed).",
        )
        assert spec is not None
        loaded = _without_running(spec, score.press)
    kind = getattr(loaded, score.press, None)
    known = isinstance(kind, type)
    check(known, score, f"kvpress has no press called {score.press!r}.", 'Use its class name, such as "KnormPress".')
    return kind


def _without_running(spec: Any, press: str) -> Any:
    """The module of kvpress that holds `press`, or None."""
    places = spec.submodule_search_locations or []
    sys.modules["kvpress"] = importlib.util.module_from_spec(spec)
    try:
        holder = _file_of(press, places)
        return None if holder is None else importlib.import_module(f"kvpress.presses.{holder}")
    except ImportError as error:
        raise StageError(f"{press} of kvpress cannot be imported: {error}. Update kvpress or transformers.") from error
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "kvpress"]:
            del sys.modules[name]


def _file_of(press: str, places: list[str]) -> str | None:
    wanted = re.compile(rf"^class {re.escape(press)}\b", re.MULTILINE)
    files = (file for place in places for file in sorted(Path(place, "presses").glob("*.py")))
    return next((file.stem for file in files if wanted.search(file.read_text(encoding="utf-8"))), None)
