"""Everything that is decided when a stack meets its model: frozen, and shared by all that serves the stack afterwards.

share      which layers hold nothing
transform  how the layers that hold something are grouped, and a codec for each group
encode     whether it fits; which channels of the latents get how many bits
select     nothing: it looks at tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .abilities import Allotment, Budgeted
from .encode.exact import EXACT
from .errors import BindError, KVStackWarning, StageError
from .head_budgets import shares_of
from .heads import Heads
from .model.adapters import AdapterState, AdapterWatch, differ_by_row, in_words, unwrapped
from .model.attention import (
    adds_to_softmax,
    checkpointing,
    counts_tokens,
    decoder_of,
    device_of,
    expands,
    gives_queries,
    reuses,
    takes_cache,
)
from .model.layers import Layers, find_layers
from .model.probing import cached_shapes
from .model.ranks import heads_of
from .model.rope import find_ropes
from .model.rotation import Rope
from .numbering import check_model
from .select.choosing import Select
from .select.evict import Evict
from .select.tiers import Tiers
from .stage import BoundTransform, Codec, Encode, Share, Stage, Transform
from .store.budget import Profile, alike
from .store.plan import Plan, Spans
from .store.split import SplitStore
from .store.store import Expand, Store
from .waterfilling import leading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Binding", "bind", "check_stages", "is_fitted", "needs_model", "unbound", "usual_window"]


@dataclass(frozen=True)
class Binding:
    """A stack's stages fitted to one model.

    Attributes:
        model: None for a caller that is no transformers model; `name` is its class.
        plan: what is done with tokens.
        groups: layers that are handled together (indices in the model), those that hold nothing left out.
        shares: layer that holds nothing -> the layer whose keys and values it reads.
        ropes: how each layer rotates keys, None: not at all; empty where no stage asks.
        modules: the attention module of each layer.
        layer_types, layer_arguments: what transformers' own cache would make of each layer.
        checkpointing: the modules that may be computed again in the backward pass.
        adapters: those that were at work (PEFT): what was fitted to the model was fitted to these. `watch` tells those
            of now.
    """

    plan: Plan
    groups: Sequence[Sequence[int]]
    model: PreTrainedModel | None = None
    name: str = ""
    shares: Mapping[int, int] = field(default_factory=dict)
    ropes: Mapping[int, Rope | None] = field(default_factory=dict)
    modules: Mapping[int, nn.Module] = field(default_factory=dict)
    layer_types: Sequence[str] = ()
    layer_arguments: Sequence[Mapping[str, Any]] = ()
    checkpointing: Sequence[nn.Module] = ()
    adapters: AdapterState = ()
    watch: AdapterWatch | None = None
    places: Mapping[int, tuple[int, int]] = field(init=False)
    """Layer -> its group and its slot in the group; a layer that holds nothing has the place of the one it reads."""
    reuses: bool = field(init=False)
    """Return True if later layers attend to the keys and values of earlier ones."""
    tells_padding: bool = field(init=False)
    """True if padding may be left out: the masks of all layers tell it, and no layer counts tokens for a bias of its
    own."""
    ends: Sequence[int] = field(init=False)
    """Of each group, the last layer that reads it: when that has run, the group is complete."""

    def __post_init__(self) -> None:
        places = {layer: (g, s) for g, group in enumerate(self.groups) for s, layer in enumerate(group)}
        places |= {layer: places[source] for layer, source in self.shares.items()}
        # layers that reuse what an earlier one read (Gemma 3n and 4) must find it as it was then
        late = max((i for i, module in self.modules.items() if reuses(module)), default=-1)
        object.__setattr__(self, "reuses", late >= 0)
        ends = [max(late, *(i for i, (group, _) in places.items() if group == g)) for g in range(len(self.groups))]
        mine = [self.modules[layer] for layer in places if layer in self.modules]
        # a module that does not use the interface may mean anything by its mask
        tells = all(gives_queries(module) and not counts_tokens(module) for module in mine)
        object.__setattr__(self, "tells_padding", tells)
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "ends", ends)

    def stores(self) -> list[Store | SplitStore]:
        """An empty store for every group."""
        size = self.plan.layers // self.plan.stored_together if self.plan.codecs else 0
        return [self._store(group, self.plan.codecs[g * size : (g + 1) * size]) for g, group in enumerate(self.groups)]

    def _store(self, group: Sequence[int], codecs: Sequence[Codec]) -> Store | SplitStore:
        plan, evict, build = self.plan, self.plan.evict, partial(Store, self.plan, group, codecs, self.ropes)
        if plan.budgets is None or evict is None:
            return build(self._expansions)
        if evict.budgets == "layers":
            every = torch.cat([plan.budgets[layer] for layer in group])
            return build(self._expansions, Profile(every.mean(0).tolist()))
        (layer,) = group
        pieces = [
            (heads, build(self._expansions, profile, replace(plan.heads, chosen=heads)))
            for heads, profile in alike(plan.budgets[layer], evict.keep)
        ]
        return pieces[0][1] if len(pieces) == 1 else SplitStore(plan, layer, pieces)

    @property
    def _expansions(self) -> dict[int, Expand]:
        """For each layer that caches latents, the expansion into keys and values."""
        return {i: cast(Any, module).expand_kv for i, module in self.modules.items() if expands(module)}

    def serves(self, model: Any) -> bool:
        """Return True if `model` is the one this is for: the same, or the same one with or without its head."""
        return self.model is not None and decoder_of(unwrapped(model)) is decoder_of(self.model)

    def is_ours_alone(self, layer: int) -> bool:
        """Return True if transformers holds nothing of a layer: a hybrid one has a state and keys and values."""
        return layer in self.places and self.layer_types[layer] != "hybrid"

    def device_of(self, layer: int) -> torch.device:
        return device_of(self.modules[layer])

    @property
    def rotary(self) -> list[Rope]:
        """The rotations that a stage may ask for, each once; first one whose tables depend on a forward's length."""
        ropes = {id(rope): rope for rope in self.ropes.values() if rope is not None and not rope.refusal}
        return sorted(ropes.values(), key=lambda rope: rope.switch is None)

    @property
    def reads_with(self) -> Sequence[str]:
        """Names of the readers that answer a single query from sealed tokens."""
        devices = {self.device_of(layer) for group in self.groups for layer in group if layer in self.modules}
        return sorted({name for device in devices for name in self.plan.reads_with(device)})

    @property
    def query_heads(self) -> int:
        """Query heads of a layer that are computed here; 1 where the model does not say."""
        config = None if self.model is None else self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", 1)
        split = not set(self.places) <= self.plan.heads.whole
        return (heads // self.plan.heads.size if split else heads) if isinstance(heads, int) else 1

    @property
    def last(self) -> int:
        """The last layer of a forward that is compressed."""
        return max(self.ends, default=-1)


def unbound(stages: Sequence[Stage], layers: int, spans: Spans) -> Binding:
    """For a caller that is no transformers model, and that has named `layers` layers so far."""
    select = _of_kind(stages, Select)
    plan = Plan(select, None, _of_kind(stages, Encode), *spans, ranking=select and select.score)
    return Binding(plan, _grouped(range(layers), plan.layers))


def is_fitted(stages: Sequence[Stage]) -> bool:
    """Return True if some of these stages are fitted to the weights of a model."""
    return any(
        isinstance(stage, Transform | Share) or (isinstance(stage, Select) and stage.is_fitted) for stage in stages
    )


def needs_model(stages: Sequence[Stage]) -> bool:
    """Return True if these stages cannot work for a caller that is not a transformers model."""
    select = _of_kind(stages, Select)
    renumbers = isinstance(select, Evict) and select.positions == "cache"
    return is_fitted(stages) or renumbers or (select is not None and select.looks_at_queries)


def bind(who: str, stages: Sequence[Stage], model: PreTrainedModel, spans: Spans) -> Binding:
    """Fit stages to `model`. What is cheap to check comes before what may take a minute to fit.

    Args:
        who: the stack, as messages name it.

    Raises:
        BindError: a stage and the model cannot work together.
    """
    model = unwrapped(model)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise BindError(
            f"{name} is an encoder-decoder: kvstack compresses decoder-only models. Use transformers' own cache for it."
        )
    if getattr(model.config.get_text_config(decoder=True), "add_cross_attention", False):
        raise BindError(
            f"{name} was made with add_cross_attention=True, as the decoder of an encoder-decoder: kvstack compresses "
            "decoder-only models. Use transformers' own cache for it."
        )
    layers = find_layers(model)
    full, modules, types = layers.full, layers.modules, layers.types
    watch = AdapterWatch(model)
    adapters = watch.state()
    if differ_by_row(adapters) and is_fitted(stages):
        raise BindError(
            f"the rows of this batch have an adapter each ({in_words(adapters)}), and {who} is fitted to one. Use one "
            "adapter for all rows, or stages that are not fitted to a model, such as Quant and Evict."
        )
    heads = heads_of(model)
    plan, shares, ropes = Plan(None, None, None, *spans, heads=heads), dict[int, int](), dict[int, Rope | None]()
    if stages and not full:
        _check_takes_cache(name, model)
        warnings.warn(_nothing_to_do(who, name, layers), KVStackWarning, stacklevel=4)
    elif stages:
        _check_model(who, stages, name, full, modules, heads)
        _check_settings(who, stages, heads)
        # what stages keep for all stacks must not be inference tensors, whatever forward this happens in
        with torch.inference_mode(False), torch.no_grad():
            select, transform = (_of_kind(stages, kind) for kind in (Select, Transform))
            if isinstance(select, Evict) and select.positions == "cache":
                check_model(select, model, layers)
            if (transform and transform.unrotated) or (select and select.needs_rope is not False):
                ropes = find_ropes(model, {i: modules[i] for i in full})
                _check_ropes(transform and transform.unrotated and transform, select, name, ropes)
            shares = _shares(stages, model, full, modules)
            plan = _plan(stages, model, [i for i in full if i not in shares], spans, heads)
            _check_agreed(who, plan, shares)
            if plan.transform and plan.transform.unrotated and not ropes:
                ropes = find_ropes(model, {i: modules[i] for i in full})
                _check_ropes(plan.transform.stage, select, name, ropes)
        if layers.growing:
            left = f"{who} leaves layers of {name} to transformers' own cache, where they grow with the text: "
            warnings.warn(left + _by_reason(layers.growing) + ".", KVStackWarning, stacklevel=4)
    groups = _grouped([i for i in full if i not in shares], plan.layers)
    more = layers.arguments, checkpointing(model), adapters, watch
    binding = Binding(plan, groups, model, name, shares, ropes, modules, types, *more)
    _ = binding.reads_with  # readers are chosen now, and compiled where they have to be
    return binding


def _check_takes_cache(name: str, model: PreTrainedModel) -> None:
    if not any(takes_cache(module) for module in model.modules()):
        raise BindError(f"{name} has no kv cache that kvstack can find: no attention module of it takes one.")


def _nothing_to_do(who: str, name: str, layers: Layers) -> str:
    holds = {layer: f"they hold {what}" for layer, what in layers.fixed.items()}
    why = _by_reason({**holds, **layers.growing})
    return f"{who} has nothing to compress in {name} and works as transformers' own cache: {why}."


def _by_reason(reasons: Mapping[int, str]) -> str:
    """`layers 0, 2 (why); layers 1 (another why)`."""
    layers: dict[str, list[int]] = {}
    for layer, reason in sorted(reasons.items()):
        layers.setdefault(reason, []).append(layer)
    return "; ".join(f"layers {', '.join(map(str, which))} ({reason})" for reason, which in layers.items())


def _grouped(layers: Sequence[int], size: int) -> list[list[int]]:
    return [list(layers[i : i + size]) for i in range(0, len(layers), size)]


def _of_kind(stages: Sequence[Stage], kind: type[Any]) -> Any:
    return next((stage for stage in stages if isinstance(stage, kind)), None)


# ---- the stages of one stack

KINDS: dict[str, Any] = {"share": Share, "select": Select, "transform": Transform, "encode": Encode}
"""The class of the stages of each kind."""


def check_stages(stages: Any) -> tuple[Stage, ...]:
    """The stages of a stack, at most one of each kind.

    Raises:
        StageError: they cannot be together.
    """
    if isinstance(stages, str):
        raise StageError(f"KVStack({stages!r}): stages is a list. Use KVStack.from_spec({stages!r}).")
    if isinstance(stages, Stage):
        raise StageError(f"KVStack({stages!r}): stages is a list. Use KVStack([{stages!r}]).")
    by_kind: dict[str, Stage] = {}
    for stage in stages:
        if not (isinstance(stage, Stage) and isinstance(stage, KINDS.get(getattr(stage, "kind", ""), ()))):
            hint = "See `kvstack stages` for the catalogue."
            if isinstance(stage, type):
                hint = f"Use {stage.__name__}(...)."
            elif isinstance(stage, str):
                hint = f"For a spec, use KVStack.from_spec({'+'.join(map(str, stages))!r})."
            raise StageError(f"{stage!r} is not a stage. {hint}")
        if stage.kind in by_kind:
            raise StageError(
                f"{by_kind[stage.kind]!r} and {stage!r} are both of the kind {stage.kind!r}: a stack has one place for "
                "each kind. Keep one of them."
            )
        by_kind[stage.kind] = stage
    transform, encode = by_kind.get("transform"), by_kind.get("encode")
    if isinstance(transform, Transform):
        if transform.encodes_itself and encode:
            raise StageError(f"{transform!r} packs its numbers itself, and {encode!r} has none left. Leave it out.")
        _check_nesting(transform, transform.layers, by_kind.get("select"))
    _check_classes(by_kind.get("select"), transform, encode)
    return tuple(stages)


def usual_window(stages: Sequence[Stage]) -> int:
    """Newest tokens that a stack of `stages` leaves as they are, if nobody says how many."""
    transform = _of_kind(stages, Transform)
    # where tokens are evicted, the window also keeps the newest ones from it
    few = transform is not None and _of_kind(stages, Evict) is None
    return int(transform.usual_window if few else Transform.usual_window)


def _check_classes(select: Any, transform: Any, encode: Any) -> None:
    """Classes of tokens differ in bits: somebody must know which channels are worth them, and somebody spend them."""
    if isinstance(select, Tiers) and not (transform and encode):
        lacks = " and ".join(what for what, there in (("no transform", transform), ("no encoder", encode)) if not there)
        raise StageError(
            f"{select!r} spreads bits over tokens and channels, and this stack has {lacks}. "
            f"Use KVStack([{select!r}, CommonKV(), Quant(2)])."
        )


def _check_nesting(transform: Transform, layers: int | None, evict: Any) -> None:
    """Layers that share tokens and layers that are stored together must nest."""
    if not isinstance(evict, Evict) or not evict.layers or not layers:
        return
    few, many = sorted((layers, evict.layers))
    if many % few:
        raise StageError(
            f"{transform!r} and {evict!r}: {layers} and {evict.layers} layers do not nest. "
            f"Use layers= a divisor or multiple of {layers} in {type(evict).__name__}."
        )


# ---- the stages and the model


def _check_model(
    who: str, stages: Sequence[Stage], name: str, full: Sequence[int], modules: Mapping[int, nn.Module], heads: Heads
) -> None:
    transform, select, share = (_of_kind(stages, kind) for kind in (Transform, Select, Share))
    if share is None and transform and transform.layers and len(full) % transform.layers:
        divisors = [n for n in range(1, len(full) + 1) if len(full) % n == 0]
        raise BindError(
            f"{transform!r} stores {transform.layers} layers together, and {name} has {len(full)} full-attention "
            f"layers, which do not divide. Use layers= one of {divisors}."
        )
    silent = [i for i in full if not gives_queries(modules[i])]
    if isinstance(select, Evict) and select.budgets == "heads":
        _check_apart(select, transform, name, modules, full, heads)
    if select:
        _check_attention(select, name, modules, full)
    if share:
        problem = None
        if silent:
            problem = f"the attention of {name} (layer {silent[0]}) does not go through transformers' interface"
        elif any(expands(modules[i]) for i in full):
            problem = f"{name} expands what it caches with each layer's own weights"
        if problem is not None:
            raise BindError(
                f"{share!r} lets layers read each other's keys and values, and {problem}. "
                f"Leave {share!r} out for this model."
            )


def _check_apart(
    evict: Evict,
    transform: Transform | None,
    name: str,
    modules: Mapping[int, nn.Module],
    full: Sequence[int],
    heads: Heads,
) -> None:
    """Refuse whatever needs all heads of a layer to keep equally many tokens."""
    extra = next((i for i in full if adds_to_softmax(modules[i])), None)
    if transform and transform.share_heads:
        why = f"{transform!r} stores all heads of a token together"
    elif heads.size > 1:
        why = f"{name} is split among {heads.size} processes"
    elif extra is not None:
        why = f"layer {extra} of {name} attends with more than a softmax over keys"
    else:
        return
    raise BindError(f'{evict!r} lets kv heads keep different numbers of tokens, and {why}. Use budgets="layers".')


def _check_attention(select: Select, name: str, modules: Mapping[int, nn.Module], full: Sequence[int]) -> None:
    """Refuse attention without queries where a score looks at them and, where tokens are dropped, masks and position
    biases that are as wide as all that was seen: nobody can cut them to what is held. The one place to lift this."""
    drops = isinstance(select, Evict)
    for layer in full:
        if not gives_queries(modules[layer]) and (drops or select.looks_at_queries):
            lacks = "needs the queries" if select.looks_at_queries else "drops tokens"
            why = (
                "does not go through transformers' interface: it gives no queries, and its masks and biases count "
                "every token it has seen"
            )
        elif drops and counts_tokens(modules[layer]):
            lacks, why = "drops tokens", "makes a bias of its own that counts every token it has seen"
        elif select.refit and (expands(modules[layer]) or adds_to_softmax(modules[layer])):
            latent = "caches latents, of which keys and values are made"
            why = latent if expands(modules[layer]) else "attends with more than a softmax over keys"
            raise BindError(
                f"{select!r} makes tokens stand in for others, and {name} (layer {layer}) {why}. Use refit=False."
            )
        elif select.references and expands(modules[layer]):
            raise BindError(
                f"{select!r} moves queries behind the text, and {name} (layer {layer}) caches latents and rotates its "
                'queries by itself. Use score="snapkv".'
            )
        else:
            continue
        raise BindError(
            f"{select!r} {lacks}, and the attention of {name} (layer {layer}) {why}. Leave it out for this model: "
            "stages that keep all tokens work."
        )


PLACES = ("calibration", "strategy")
"""Settings that may name a file, which each process has where it has it."""


def _check_settings(who: str, stages: Sequence[Stage], heads: Heads) -> None:
    """Refuse processes with other stages or settings, before any of them waits for the others."""
    here = [
        (type(stage).__name__, {name: repr(x) for name, x in sorted(vars(stage).items()) if name not in PLACES})
        for stage in stages
    ]
    _check_same(who, here, heads)


def _check_same(who: str, here: object, heads: Heads) -> None:
    """Refuse processes that say something else than what is said `here`."""
    for rank, there in enumerate(heads.gathered(here)):
        if there != here:
            raise BindError(
                f"{who} is another stack in process {rank} than in process {heads.rank}, which hold heads of one "
                f"model: {there}, and here {here}. Give every process the same stages and settings."
            )


def _check_agreed(who: str, plan: Plan, shares: Mapping[int, int]) -> None:
    """Refuse processes that would choose differently, and then wait for each other for ever."""
    select = plan.select
    here = [
        [
            type(stage).__name__
            for stage in (select and select.score, plan.transform and plan.transform.stage, plan.encode)
        ],
        plan.evict and (plan.evict.keep, plan.evict.budgets, plan.evict.positions),
        plan.tiers and (plan.tiers.shares, plan.tiers.weights),
        select and (select.pool, plan.share_heads),
        (plan.layers, plan.stored_together, plan.sinks, plan.window, plan.block),
        sorted(shares.items()),
    ]
    _check_same(who, here, plan.heads)


def _shares(
    stages: Sequence[Stage], model: PreTrainedModel, full: Sequence[int], modules: Mapping[int, nn.Module]
) -> dict[int, int]:
    """Layer that holds nothing -> the layer it reads."""
    share = _of_kind(stages, Share)
    if share is None:
        return {}
    name, shares = type(model).__name__, dict(share.bind(model))
    for layer, source in shares.items():
        if not (layer in full and source in full and source < layer and source not in shares):
            raise BindError(
                f"{share!r} lets layer {layer} of {name} read layer {source}. A full-attention layer, of {list(full)}, "
                "can read an earlier one that reads no other."
            )
    shapes = cached_shapes(model) if shares else {}
    for layer, source in shares.items():
        one, other = (f"{shapes[i]} on {device_of(modules[i])}" for i in (layer, source))
        if one != other:
            raise BindError(
                f"{share!r} lets layer {layer} of {name} read layer {source}: they hold {one} and {other}. "
                f"Leave {share!r} out, or pair layers alike."
            )
    return shares


def _plan(stages: Sequence[Stage], model: PreTrainedModel, layers: Sequence[int], spans: Spans, heads: Heads) -> Plan:
    """Bind the encoder, then the score and the transform, which may take a minute to fit to the `layers` that hold
    something."""
    select, encode, transform = (_of_kind(stages, kind) for kind in (Select, Encode, Transform))
    encode = encode and encode.bind(model)
    ranking = select and select.bind(model, layers)
    budgets = None
    if isinstance(select, Evict) and select.budgets != "equal":
        budgets = shares_of(model, layers, select, ranking)
    if transform is None:
        return Plan(select, None, encode, *spans, heads=heads, ranking=ranking, budgets=budgets)
    bound: BoundTransform = transform.bind(model, layers)
    _check_nesting(transform, bound.layers, select)
    if len(layers) % bound.layers and not bound.remainder:
        divisors = [n for n in range(1, len(layers) + 1) if len(layers) % n == 0]
        raise BindError(
            f"{transform!r} stores {bound.layers} layers together, and {len(layers)} layers of {type(model).__name__} "
            f"hold keys and values, which do not divide. Use layers= one of {divisors}."
        )
    encode = encode or EXACT
    if isinstance(bound, Budgeted):
        allotments = _allotments(bound, encode, None)
        ample = bound.ample(allotments)
        settled = ample is bound and not isinstance(select, Tiers)
        bound = ample.allotted(allotments if settled else _allotments(ample, encode, select))
    codecs = tuple(bound.for_group(group) for group in _grouped(layers, bound.layers))
    if isinstance(select, Tiers):
        _check_tiered(select, transform, encode, codecs)
    return Plan(select, bound, encode, *spans, codecs=codecs, heads=heads, ranking=ranking, budgets=budgets)


def _check_tiered(tiers: Tiers, transform: Transform, encode: Encode, codecs: Sequence[Codec]) -> None:
    """Refuse latents that cannot be packed class by class."""
    for codec in codecs:
        if not codec.lower:
            raise BindError(
                f"{tiers!r} spreads bits over tokens and channels: {transform!r} must know the energy of its channels, "
                f"and {encode!r} spend bits unevenly. Use CommonKV() and Quant(2), or leave {tiers!r} out."
            )
        if codec.granule > 1:
            raise BindError(
                f"{tiers!r} puts single tokens into classes, and {transform!r} keeps some of every {codec.granule} "
                "tokens apart. Use unmerged=0."
            )


def _allotments(bound: Budgeted, encode: Encode, select: Select | None) -> list[Allotment]:
    """Channels of all groups compete: for bits where the encoder can spend them unevenly, for places otherwise. So do
    tokens of several classes."""
    if isinstance(select, Tiers):
        by_class = encode.allot_by_class(bound.channels, bound.numbers, select.shares, select.weights)
        if by_class is not None:
            return [Allotment(first.rank, first, lower) for first, *lower in zip(*by_class, strict=True)]
    encoders = encode.allot(bound.channels, bound.numbers)
    if encoders is not None:
        return [Allotment(encoder.rank, encoder) for encoder in encoders]
    return [Allotment(rank) for rank in leading([known.energy for known in bound.channels], bound.numbers)]


def _check_ropes(
    transform: Transform | None, select: Select | None, name: str, ropes: Mapping[int, Rope | None]
) -> None:
    """Refuse stages that need keys without rotary embedding (`transform` is None where it does not)."""
    refused = [(layer, rope.refusal) for layer, rope in ropes.items() if rope is not None and rope.refusal]
    switches = {rope.switch for rope in ropes.values() if rope is not None and rope.switch is not None}
    if len(switches) > 1:
        refused = [(min(ropes), f"its layers change their rotary tables at several lengths, {sorted(switches)}")]
    if not refused:
        return
    layer, reason = refused[0]
    if transform:
        raise BindError(
            f"{transform!r} wants keys without rotary embedding, and kvstack cannot take it off in layer {layer} of "
            f"{name}: {reason}. Leave {transform!r} out for this model: Evict and Quant take keys as they are cached."
        )
    if select and select.needs_rope:
        fix = "refit=False" if select.refit else 'score="snapkv" or another one that takes keys as they are cached'
        raise BindError(
            f"{select!r} needs to know how keys are rotated, and kvstack cannot tell for layer {layer} of {name}: "
            f"{reason}. Use {fix}."
        )
