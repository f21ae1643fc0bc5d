"""The contracts of the four kinds of stage. A stage is settings: frozen, equal, printable; it holds nothing else.

    kind        write                                        it decides
    share       Share.bind(model)                            which layers read another layer's keys and values
    select      Score.score(kv, context), given to Evict     which tokens stay (Tiers: how many bits they get)
    transform   Transform.forward(group), .inverse           how adjacent layers become named latents, and back
    encode      Encode.encode(x, role), .decode              how one tensor is stored in fewer bytes

What depends on the model is made when a stack is bound to it, and lives in objects of its own:

    CommonKV(keep=0.5)           settings
      .bind(model, layers)   ->  BoundTransform     how layers are grouped, and what they may spend
        .for_group(layers)   ->  Codec              forward and inverse of one group, a plain object

    KVzap()                      settings
      .bind(model, layers)   ->  Ranking            ranks tokens of this model

What else a codec or a bound transform can do is in `abilities.py`. Stages never name each other: each states plain
facts about itself, and the stack settles the rest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from .errors import StageError
from .floats import wide
from .packed import Packed
from .types import KV, Channels, Context, Latent
from .workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BoundTransform",
    "ChannelEncoder",
    "Codec",
    "Encode",
    "Encoder",
    "Ranking",
    "Reader",
    "Score",
    "Settings",
    "Share",
    "Stage",
    "Transform",
    "as_path",
    "check",
]

Kind = Literal["share", "select", "transform", "encode"]


def check(condition: bool, stage: object, problem: str, fix: str) -> None:
    """Raise a `StageError` that names the stage, the problem and what to write instead."""
    if not condition:
        raise StageError(f"{stage!r}: {problem} {fix}")


def as_path(stage: object, name: str, thing: type) -> Any:
    """The setting `name` of a stage, which is a path, None or a `thing`: a path comes back as the string it travels as.

    Raises:
        StageError: the setting is something else.
    """
    value = getattr(stage, name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    quoted = "/".join(map(str, value)) if isinstance(value, tuple) else "FILE"  # a/b in a spec is a pair
    fits = value is None or isinstance(value, str | thing)
    check(fits, stage, f"{name} is not a path.", f"Quote it in a spec: {name}={quoted!r}.")
    return value


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
    """Base of all stages. Subclass one of the kinds, not this."""

    kind: ClassVar[Kind]
    saves: ClassVar[str] = ""
    """The saving, in a few words, for the catalogue."""


# ---- select


class Ranking:
    """Ranks the tokens of one model. `Score` is one; `Score.bind` may make others, fitted to the model."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors that were fitted to the model; all its caches share them."""
        return ()

    def score(self, kv: KV, context: Context) -> Tensor:
        """Rank all held tokens of one layer: (B, H, T), higher stays. Sinks and window are kept whatever it says."""
        raise NotImplementedError  # the one method a score must write

    def track(self, kv: KV, context: Context) -> Mapping[str, Tensor]:
        """Memory per token (B, H, T) after a forward, from `context.memory` and the forward's queries."""
        return {}


class Score(Settings, Ranking):
    """Ranks tokens: give it to `Evict(keep, score=...)`.

    Any object with a `score` method works; this base only holds the defaults. A score that is fitted to a model writes
    `bind` instead, and its `score` is that of the ranking it returns.
    """

    queries: int = 0
    """The number of newest queries that `score` wants in `Context.queries`; -1 for all of the running forward."""
    references: ClassVar[bool] = False
    """True if `score` wants queries of the whole forward, evenly spaced, in `Context.references`."""
    tracks: ClassVar[bool] = False
    """True if `track` keeps a memory per token."""
    rereads: ClassVar[bool] = False
    """True if the model reads every prompt and every later turn a second time before it is compressed. `track` then
    gets the queries of that second reading, and no others."""
    needs_rope: ClassVar[bool | None] = None
    """True if `score` uses `Context.rope`: a model whose rotation cannot be found is then refused when bound.
    False: it never does, so positions are not noted. None (the default): it may."""
    layers: int = 1
    """Adjacent layers that keep the same tokens where neither the user nor a transform says how many."""
    is_fitted: ClassVar[bool] = False
    """True if `bind` fits it to the weights of a model, so that it has no `score` without one."""

    def bind(self, model: PreTrainedModel, layers: Sequence[int]) -> Ranking:
        """Return the ranking for the tokens of `model`: this score itself, or something that was fitted to the model.

        Args:
            layers: the full-attention layers that hold keys and values.

        Raises:
            BindError, CalibrationError: the score and the model cannot work together.
        """
        return self


# ---- share


class Share(Stage):
    """Lets some layers hold nothing: they read the keys and values of an earlier layer."""

    kind = "share"

    def bind(self, model: PreTrainedModel) -> Mapping[int, int]:
        """Layer -> the earlier layer whose keys and values it reads, for full-attention layers of `model`.

        Raises:
            BindError: the stage and the model cannot work together.
        """
        raise NotImplementedError  # the one method such a stage must write


# ---- encode


class Reader(Protocol):
    """Answers one query from what an encoder packed."""

    reads_with: str
    """The name of the library that does the work, for the report."""

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """`query` (B, H, G, R) times the transposed packed tensor: (B, H, G, T)."""

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """`weights` (B, H, G, T) times the packed tensor: (B, H, G, R)."""


class Encoder:
    """Stores one tensor in fewer bytes, and gives it back. `Encode` is one; `Encode.allot` may make others."""

    reads_with = "torch"

    @property
    def reads_room(self) -> bool:
        """True if `decode`, `dot`, `mix` and the `reader` take parts that are not contiguous: there is room for more
        tokens behind those of every head. Operators of torch do, `view` and pointers may not. False (the default):
        parts are contiguous, so all of them are copied for every block of new tokens."""
        return False

    def reader(self, device: torch.device) -> Reader:
        """Return the reader that answers a single query from tensors packed on `device`, chosen when a stack is bound:
        this encoder itself (the default), or something faster that agrees with it."""
        return self

    def granule(self, width: int) -> int:
        """Tokens that are encoded, and dropped, together when a token has `width` channels."""
        return 1

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors that describe the channels of one latent. They belong to the model: all its caches share them."""
        return ()

    def encode(self, x: Tensor, role: str) -> Packed:
        """Pack `x` (B, H, T, R), T a multiple of the granule. `role` is `keys`, `values` or a latent's name."""
        raise NotImplementedError  # one of the two methods an encoder must write

    def decode(self, packed: Packed, role: str, out: Tensor | None = None) -> Tensor:
        """The tensor (B, H, T, R) again, written into `out` where given."""
        raise NotImplementedError  # the other method an encoder must write

    def dot(self, query: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """`query` (B, H, G, R) times the transposed packed tensor: (B, H, G, T). Override to read codes directly."""
        query = wide(query)
        return torch.matmul(query, self.decode(packed, role).transpose(-1, -2).to(query.dtype))

    def mix(self, weights: Tensor, packed: Packed, role: str, work: Workspace) -> Tensor:
        """`weights` (B, H, G, T) times the packed tensor: (B, H, G, R). Override to read codes directly."""
        weights = wide(weights)
        return torch.matmul(weights, self.decode(packed, role).to(weights.dtype))


class ChannelEncoder(Encoder):
    """An encoder for the leading channels of one latent."""

    @property
    def rank(self) -> int:
        """The number of channels that it stores."""
        raise NotImplementedError


class Encode(Stage, Encoder):
    """The stage that stores tensors in fewer bytes: write `encode` and `decode`, side by side."""

    kind = "encode"

    def bind(self, model: PreTrainedModel) -> Self:
        """This stage, for `model`; raise `BindError` where the two cannot work together."""
        return self

    def allot_by_class(
        self, channels: Sequence[Channels], numbers: int, shares: Sequence[float], weights: Sequence[float]
    ) -> Sequence[Sequence[ChannelEncoder]] | None:
        """The same for tokens of several classes, which spend one budget: for each class what `allot` gives.

        Args:
            shares: of the tokens, 1 in all, the most important class first.
            weights: the weight of an error in each class, falling.
        """
        return None

    def allot(self, channels: Sequence[Channels], numbers: int) -> Sequence[ChannelEncoder] | None:
        """Spread the bits of `numbers` numbers a token over the channels of all groups: one encoder for each group's
        latent. None (the default) where every number takes the same."""
        return None


# ---- transform


class Codec:
    """Turns the keys and values of one group of layers into named latents, and back. A plain object, and read-only:
    all caches of a model share it."""

    granule: int = 1
    """Tokens that are transformed, and dropped, together: `forward` gets multiples of it."""
    latent_multiple: int = 1
    """A latent that an encoder packs holds all tokens of a granule, or a multiple of this number."""
    reads_room: bool = False
    """True if latents that are stored exactly need not be contiguous, see `Encoder.reads_room`."""
    encoders: Mapping[str, Encoder] = {}
    """Encoders of its own by the name of the latent. Name all latents that are not exact, or none."""
    lower: Mapping[str, Sequence[Encoder]] = {}
    """If tokens are in classes, the encoders of the classes below the first, whose encoder is in `encoders`."""
    tensors: Sequence[Tensor] = ()
    """The tensors that were fitted to the model for this group; all caches of the model share them."""
    fingerprint: str = ""
    """The fitted data in short: a saved cache is refused if this has changed."""

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        """Latents of one block of tokens; `group` holds one `KV` per layer, in layer order."""
        raise NotImplementedError  # one of the two methods a codec must write

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        """Keys and values of the group's layer number `layer` (0 first) from the decoded latents."""
        raise NotImplementedError  # the other method a codec must write

    def check_latents(self, latents: Mapping[str, Tensor]) -> None:
        """Raise `UseError` where decoded latents from a file hold values that `forward` never makes. Their names,
        shapes and types are right, and no number is infinite; places of tokens may still be out of bounds."""


class BoundTransform:
    """A transform for one model: how its layers are grouped, and the codec of each group.

    Args:
        stage: the settings.
        layers: adjacent layers that are stored together.
        unrotated: True if keys are wanted without rotary embedding; the stack rotates what `inverse` gives back.
        codec: the codec of all groups, where they need none of their own.
        remainder: True if the last group may hold fewer layers, if their number does not divide (default False).
    """

    def __init__(
        self,
        stage: Transform,
        layers: int,
        *,
        unrotated: bool = False,
        codec: Codec | None = None,
        remainder: bool = False,
    ) -> None:
        self.stage, self.layers, self.unrotated, self.remainder = stage, layers, unrotated, remainder
        self._codec = codec

    def for_group(self, layers: Sequence[int]) -> Codec:
        """The codec for the group of `layers` (indices in the model)."""
        assert self._codec is not None, "a bound transform has one codec for all groups, or writes for_group"
        return self._codec


class Transform(Stage):
    """Stores the keys and values of adjacent layers together, as named latents.

    Write `forward` and `inverse`; such a transform is the same for every model. One that looks at the text or reads
    without rebuilding writes `codec`, one that is fitted to the model writes `bind`.
    """

    kind = "transform"
    layers: int | None
    """Adjacent layers that are stored together; None: settled when the stack is bound."""
    share_heads: bool = True
    """True if a token must be kept by all heads of the group or by none."""
    unrotated: bool = False
    """True if keys are wanted without rotary embedding."""
    encodes_itself: ClassVar[bool] = False
    """True if it packs its latents itself, so that a stack can have no encoder next to it."""
    usual_window: int = 64
    """Newest tokens that a stack leaves as they are, if it is not told how many and evicts none."""

    def bind(self, model: PreTrainedModel, layers: Sequence[int] | None = None) -> BoundTransform:
        """This transform for `model`.

        Args:
            layers: the full-attention layers that hold keys and values; None: all.

        Raises:
            BindError: the stage and the model cannot work together.
        """
        return BoundTransform(self, self.layers or 1, unrotated=self.unrotated, codec=self.codec())

    def codec(self) -> Codec:
        """One codec for every group of every model."""
        return StageCodec(self)

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        """Latents of one block of tokens, see `Codec.forward`."""
        raise NotImplementedError  # one of the two methods of a plain transform

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        """Keys and values of one layer, see `Codec.inverse`."""
        raise NotImplementedError  # the other method of a plain transform


class StageCodec(Codec):
    """The codec of a plain transform: its own `forward` and `inverse`."""

    def __init__(self, stage: Transform) -> None:
        self.stage = stage

    def forward(self, group: Sequence[KV]) -> Mapping[str, Latent]:
        return self.stage.forward(group)

    def inverse(self, latents: Mapping[str, Tensor], layer: int) -> KV:
        return self.stage.inverse(latents, layer)
