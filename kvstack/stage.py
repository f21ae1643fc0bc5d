"""The contracts: the three kinds of stage, each with one thing to write.

    Select.score(kv, context)            which tokens stay        -> (B, H, T), higher stays
    Transform.forward(group) / .inverse  layers -> named latents -> layers
    Encode.encode(x, role) / .decode     one tensor -> packed parts -> one tensor

Stages are frozen settings: equal settings, equal stage, and `repr` is the line that builds it. They hold no
state; what must be remembered per token lives in the store. Stages never name each other: each states plain
facts about itself and the stack settles the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from .errors import StageError
from .packed import Packed
from .types import KV, Channels, Context, Latent
from .workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Encode", "Score", "Select", "Settings", "Stage", "Transform", "check", "hold_path"]

Kind = Literal["select", "transform", "encode"]
Turn = Callable[[Tensor, Tensor], Tensor]


def check(condition: bool, stage: object, problem: str, fix: str) -> None:
    """Raise a `StageError` that names the stage, what is wrong and what to write instead."""
    if not condition:
        raise StageError(f"{stage!r}: {problem} {fix}")


def hold_path(stage: object, name: str, thing: type) -> None:
    """Hold the setting `name` of a frozen stage, a path, as the string it travels as; refuse what is neither None, nor
    a path, nor a `thing`."""
    value = getattr(stage, name)
    if isinstance(value, os.PathLike):
        object.__setattr__(stage, name, os.fspath(value))
        return
    quoted = "/".join(map(str, value)) if isinstance(value, tuple) else "FILE"  # a/b in a spec is a pair
    fits = value is None or isinstance(value, str | thing)
    check(fits, stage, f"{name} is no path.", f"Quote it in a spec: {name}={quoted!r}.")


class Settings:
    """Something made of settings alone: `repr` is the line that builds it, and equal settings make equal things.

    Subclasses are frozen dataclasses (`@dataclass(frozen=True, repr=False)`).
    """

    name: ClassVar[str]
    """The word that stands for it in a spec string."""
    source: ClassVar[str] = ""
    """The paper or project it comes from."""

    def settings(self) -> dict[str, Any]:
        """The arguments that build this again, without those that have their default."""
        own: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        return {f.name: getattr(self, f.name) for f in own if f.init and getattr(self, f.name) != f.default}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"


class Stage(Settings):
    """Base of all stages. Subclass one of the three kinds, not this."""

    kind: ClassVar[Kind]
    saves: ClassVar[str] = ""
    """What is smaller afterwards, in a few words, for the catalogue."""

    def bind(self, model: PreTrainedModel) -> Self:
        """A copy of this stage fitted to `model`; raise `BindError` where the two cannot work together."""
        return self


class Score(Settings):
    """What ranks tokens: give it to `Evict(keep, score=...)`.

    Any object with a `score` method works; this base only holds the defaults.
    """

    queries: int = 0
    """How many of the most recent queries `score` wants in `Context.queries`; -1 for all of the running forward."""
    tracks: ClassVar[bool] = False
    """True where `track` keeps a per-token memory."""
    layers: int = 1
    """Adjacent layers that should keep the same tokens where neither the user nor a transform says how many."""

    def score(self, kv: KV, context: Context) -> Tensor:
        """Rank all held tokens of one layer: (B, H, T), higher stays. Sinks and window are kept whatever it says."""
        raise NotImplementedError  # the one method a score must write

    def track(self, kv: KV, context: Context) -> Mapping[str, Tensor]:
        """Per-token memory (B, H, T) after a forward, from `context.memory` and the forward's queries."""
        return {}


class Select(Stage):
    """Chooses which tokens stay. The stack pools the scores to the coarsest token set a stage needs, cuts to the
    budget and gathers; a selector never sees indices."""

    kind = "select"
    keep: float | int
    layers: int | None = None
    """Adjacent layers that share one token set; None leaves it to the transform, or to `usual_layers`."""
    share_heads: bool = False
    """Whether all kv heads of a layer keep the same tokens."""

    @property
    def usual_layers(self) -> int:
        return 1

    @property
    def queries(self) -> int:
        return 0

    @property
    def tracks(self) -> bool:
        return False

    def score(self, kv: KV, context: Context) -> Tensor:
        """(B, H, T), higher stays."""
        raise NotImplementedError  # the one method a selector must write

    def track(self, kv: KV, context: Context) -> Mapping[str, Tensor]:
        """Per-token memory after a forward; only called where `tracks` is true."""
        return {}

    def pool(self, scores: Sequence[Tensor]) -> Tensor:
        """One ranking (B, 1, T) for all heads of all `scores`, one (B, H, T) per layer that must agree."""
        return torch.cat(list(scores), dim=1).mean(dim=1, keepdim=True)


class Transform(Stage):
    """Turns the keys and values of a group of adjacent layers into named latents, and back."""

    kind = "transform"
    layers: int | None
    """Adjacent layers that are stored together; None: chosen when the stage is bound."""
    share_heads: bool = True
    """Whether a token must be kept by all heads of the group or by none."""
    unrotated: bool = False
    """Whether keys are wanted without rotary embedding; the stack re-rotates what `inverse` gives back."""
    hidden: bool = False
    """Whether `KV.hidden` is wanted; it is held for all tokens that are still raw."""
    granule: int = 1
    """Tokens that are transformed, and dropped, together: `forward` gets multiples of it."""
    allotted: ClassVar[bool] = False
    """Whether its `channels` come with their bits. The stack packs them so, and takes no encoder beside it."""
    unit: int = 1
    """A latent holds all tokens of a granule, or a multiple of this number."""
    shares: Mapping[int, int] | None = None
    """For a transform that leaves layers out, once bound: layer -> the earlier layer whose keys and values it attends
    to. The other layers are held as they come, so `forward` and `inverse` are not asked for. None: layers attend to
    their own."""
    once: bool = False
    """Whether only the first block of a text is sealed, and tokens that come later stay raw."""

    def of(self, layers: Sequence[int]) -> Self:
        """This stage for the group of `layers` (indices in the model), where groups differ."""
        return self

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        """Latents of one block of tokens; `group` holds one `KV` per layer, in layer order."""
        raise NotImplementedError  # one of the two methods a transform must write

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        """Keys and values of the group's layer number `layer` (0 first) from the decoded latents."""
        raise NotImplementedError  # the other method a transform must write

    # ---- optional: fitted to the text

    def first(self, group: Sequence[KV]) -> int:
        """How many tokens the first block of a text needs; fewer stay raw. `group` holds what is raw: its shapes tell
        how much there is to fit."""
        return 0

    def fit(self, group: Sequence[KV], decoded: int = 0) -> Self:
        """A copy fitted to these tokens: the first that are sealed or, where `strays` asked for it, all that are. Of
        those the first `decoded` ones were sealed before."""
        return self

    def strays(self, group: Sequence[KV]) -> bool:
        """Whether what was fitted serves these new tokens so badly that it should be fitted anew: to the decoded tokens
        and these. The decoded ones are then encoded a second time. Not for a transform with `hidden`: no hidden states
        of theirs are held."""
        return False

    @property
    def fitted(self) -> Mapping[str, Tensor]:
        """What `fit` made, each (B, ...). It belongs to the text: the store counts, moves and saves it."""
        return {}

    def hold(self, fitted: Mapping[str, Tensor]) -> Self:
        """A copy with `fitted` in the place of its own: rows of it, or what was saved. Empty: not fitted any more."""
        return self

    # ---- optional: read without rebuilding

    def keys(self, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        """The keys alone (B, H, T, D), as `inverse` gives them."""
        return self.inverse(latents, layer).keys

    def weigh(self, weights: Tensor, latents: Mapping[str, Tensor], layer: int) -> Tensor:
        """`weights` (B, H, G, T) times the values: (B, H, G, D). Override to weigh the latents first."""
        return torch.matmul(weights, self.inverse(latents, layer).values.to(weights.dtype))

    def pick(
        self, query: Tensor, latents: Mapping[str, Tensor], layer: int, turn: Turn
    ) -> tuple[Mapping[str, Tensor], Tensor] | None:
        """Which sealed tokens a scaled query (B, H, G, D) is answered from: their latents, for `keys` and `weigh`, and
        their places among all (B, H, n). None (the default): all. `turn(keys, places)` rotates un-rotated keys
        (B, H, n, D) to the positions of the tokens at `places` (B or 1, H or 1, n). Only asked where attention is
        answered from latents."""
        return None

    # ---- optional: a budget over all groups

    @property
    def numbers(self) -> int:
        """Numbers kept per token in all groups together, where `channels` says what there is to choose from."""
        return 0

    @property
    def channels(self) -> Sequence[Channels]:
        """The channels of every group, once bound; empty where nothing is known of them."""
        return ()

    def trim(self, channels: Sequence[Channels]) -> Self:
        """A copy that emits just the leading channels of each group that are named here."""
        return self

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What was fitted to the model for this group; all caches of the model share it."""
        return ()

    @property
    def mark(self) -> str:
        """What was fitted, in a few words: a saved cache is refused where this has changed."""
        return ""


class Encode(Stage):
    """Stores one tensor in fewer bytes."""

    kind = "encode"

    def granule(self, width: int, channels: Channels | None = None) -> int:
        """Tokens that are encoded together when a token has `width` channels."""
        return 1

    def allot(self, channels: Sequence[Channels], numbers: int) -> Sequence[Channels] | None:
        """Spread the bits of `numbers` numbers over the channels of all groups: the leading channels that got any,
        with their `bits`. None (the default) where every number takes the same."""
        return None

    def encode(self, x: Tensor, role: str, channels: Channels | None = None) -> Packed:
        """Pack `x` (B, H, T, R), T a multiple of the granule. `role` is `keys`, `values` or a latent's name."""
        raise NotImplementedError  # one of the two methods an encoder must write

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        """The tensor (B, H, T, R) again, written into `out` where given."""
        raise NotImplementedError  # the other method an encoder must write

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """`query` (B, H, G, R) times the transposed packed tensor: (B, H, G, T). Override to read codes directly."""
        return torch.matmul(query, self.decode(packed, role).transpose(-1, -2).to(query.dtype))

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """`weights` (B, H, G, T) times the packed tensor: (B, H, G, R). Override to read codes directly."""
        return torch.matmul(weights, self.decode(packed, role).to(weights.dtype))


def is_stage(thing: Any) -> bool:
    return isinstance(thing, Select | Transform | Encode)
