"""KVSharer: some layers hold nothing and attend with the keys and values of an earlier, unlike layer."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from kvstack import BindError, KVStackWarning, StageError
from kvstack.authoring import Share, as_path, check, kv_fingerprint, load_or_make

from .strategy import Strategy, kinds_of, layers_of, search, what_is_wrong

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KVSharer", "Strategy", "search"]


@dataclass(frozen=True, repr=False)
class KVSharer(Share):
    """Let some layers hold nothing: they attend with the keys and values of an earlier layer, in the prompt too.

    Args:
        share: the part of the full-attention layers that holds NOTHING, 0 or more and below 1 (default 0.25). That part
            of the cache is not stored. Where the default is less than half a layer, none shares, and a warning says so.
        strategy: the layers that read another: a `Strategy` or the path of a saved one, made by
            `kvstack_kvsharer.search`. It says all that the other settings would. Default: searched for at first use
            with these settings, and kept in the user's cache folder.
        rank: the pairs of layers tried first. `different` (default, the paper's): those whose keys and values are
            furthest apart. `similar`: the nearest. `random`: in a random order.
        threshold: a pair is taken where the cosine of the last hidden state with that of the dense model stays above
            this (default 0.5).
        seed: of the random order (default 0).

    Source: KVSharer, arXiv 2410.18517, section 3. Differs from the paper: the texts searched with by default
    are not Wikipedia; layers that hold different shapes, and layers without full attention, are never paired. Models
    that cache latents (DeepSeek V2 and V3) are refused: a layer would expand another's with its own weights.

    Example:
        >>> from kvstack import KVStack, Quant
        >>> from kvstack_kvsharer import KVSharer
        >>> KVStack([KVSharer(0.25), Quant(4)])
        KVStack([KVSharer(), Quant(bits=4)])
    """

    share: float = 0.25
    strategy: str | os.PathLike[str] | Strategy | None = None
    rank: Literal["different", "similar", "random"] = "different"
    threshold: float = 0.5
    seed: int = 0

    name = "kvsharer"
    source = "arXiv 2410.18517"
    saves = "layers: some read what others hold"

    def __post_init__(self) -> None:
        if problem := what_is_wrong(self.share, self.rank, self.threshold):
            raise StageError(f"{self!r}: {problem}")
        object.__setattr__(self, "strategy", as_path(self, "strategy", Strategy))
        alone = not self.settings().keys() - {"strategy"}
        says = "a strategy says which layers share."
        check(self.strategy is None or alone, self, says, "Leave the other settings out, or search with them.")

    def bind(self, model: PreTrainedModel) -> Mapping[int, int]:
        kinds, name = kinds_of(model), type(model).__name__
        by_default = self.strategy is None and self.share == KVSharer.share
        if by_default and not layers_of(self.share, len(kinds)):
            more = "Leave it out for this model." if len(kinds) < 2 else f"Use share={1 / len(kinds):.2g} or more."
            warnings.warn(
                f"{self!r}: a share of {self.share} is not a whole layer of the {len(kinds)} full-attention layers of "
                f"{name}, so all of them hold their own keys and values. {more}",
                KVStackWarning,
                stacklevel=2,
            )
            return {}
        if len(kinds) < 2:
            raise BindError(
                f"{self!r} needs two full-attention layers that one can read the other, and {name} has {len(kinds)}. "
                "Leave it out for this model."
            )
        strategy = self._strategy_for(model, kinds)
        for layer, read in strategy.shares.items():
            if layer not in kinds or read not in kinds:
                raise BindError(
                    f"{self!r}: layer {layer} should read layer {read}, and the full-attention layers of {name} are "
                    f"{list(kinds)}. Search a strategy for this model."
                )
            if kinds[layer] != kinds[read]:
                raise BindError(
                    f"{self!r}: layer {layer} cannot read layer {read} of {name}: they hold {kinds[layer]} and "
                    f"{kinds[read]}. Use a strategy that pairs like with like."
                )
        return strategy.shares

    def _strategy_for(self, model: PreTrainedModel, kinds: Mapping[int, str]) -> Strategy:
        def read(path: str | os.PathLike[str]) -> Strategy:
            strategy = Strategy.load(path)
            strategy.check(model)
            return strategy

        if isinstance(self.strategy, Strategy):
            self.strategy.check(model)
            return self.strategy
        if self.strategy is not None:
            return read(self.strategy)
        share, rank, threshold, seed = self.share, self.rank, self.threshold, self.seed
        # a pair of layers may lie on two devices where the model is spread in another way
        alike = [list(kinds.values()).index(kind) for kind in kinds.values()]
        words = f"{share}-{rank}-{threshold}-{seed}-{hashlib.sha256(bytes(str(alike), 'ascii')).hexdigest()[:8]}"
        file_name = f"{model.config.model_type}-{kv_fingerprint(model)}-kvsharer-{words}.json"
        notice = f"KVSharer searches which layers of this {type(model).__name__} can share, once."
        make = partial(search, model, share=share, rank=rank, threshold=threshold, seed=seed)
        return load_or_make(model, file_name, read, make, notice)
