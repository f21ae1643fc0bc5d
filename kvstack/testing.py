"""Contract checks for stages and scores, for those that come with kvstack and for anyone's own.

    from kvstack.testing import check_stage
    def test_contract():
        check_stage(MyQuant(4))

Every function raises AssertionError with a message; nothing here needs pytest, weights or a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from . import disk
from .abilities import FitsText, NeedsHidden, ReadsDirectly
from .cache import KVStack
from .errors import UseError
from .files import read_tensors, write_tensors
from .packed import Packed, storage_bytes
from .select.choosing import Select
from .select.evict import Evict
from .spec import parse, to_dict, to_spec
from .stage import Codec, Encode, Encoder, Share, Stage, Transform
from .types import KV, Context
from .workspace import Workspace

__all__ = [
    "check_encode",
    "check_file",
    "check_score",
    "check_select",
    "check_share",
    "check_stage",
    "check_transform",
    "tiny_model",
]

ROLES = ("keys", "values", "latent")


def tiny_model(**changes: Any) -> Any:
    """A random Llama of four layers, 4 query and 2 kv heads of 16, seeded: no weights, no network."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_settings(thing: Any) -> None:
    """Settings are frozen, `repr` and the spec build an equal thing, equal settings are equal."""
    kind: Any = type(thing)
    assert hasattr(kind, "__dataclass_fields__"), f"{kind.__name__} is not a dataclass"
    try:
        setattr(thing, dataclasses.fields(thing)[0].name if dataclasses.fields(thing) else "anything", None)
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{kind.__name__} is not frozen: use @dataclass(frozen=True, repr=False)")
    again: Any = kind(**thing.settings())
    assert again == thing, f"{thing!r}: its settings build something else, {again!r}"
    assert repr(again) == repr(thing), f"{thing!r}: equal settings print differently"
    assert isinstance(kind.name, str), f"{kind.__name__} has no name"
    assert kind.name.isidentifier(), f"{kind.__name__}.name must be one word"


def check_stage(stage: Stage, model: Any = None) -> None:
    """All that holds for any stage of its kind, alone and in a stack under a tiny model."""
    check_settings(stage)
    if isinstance(stage, Encode):
        check_encode(stage)
    elif isinstance(stage, Transform):
        check_transform(stage, model)
    elif isinstance(stage, Share):
        check_share(stage, model)
    elif isinstance(stage, Select):
        check_select(stage)
    else:
        raise AssertionError(f"{stage!r} is of no kind: subclass Share, Transform or Encode, or give a Score to Evict")
    check_in_stack(stage, model)
    if not isinstance(stage, Select | Share):
        check_file(stage, model)


def check_encode(stage: Encoder) -> None:
    """Packed parts have the layout the store needs, and take, append, rows and decode agree."""
    for role in ROLES:
        for width in (16, 64):
            granule = stage.granule(width)
            x = _numbers(2, 3, 4 * granule, width)
            packed = stage.encode(x, role)
            _check_packed(stage, packed, role, x)
            whole = stage.decode(packed, role)
            assert whole.shape == x.shape, f"{stage!r}: decode gave {tuple(whole.shape)} for {tuple(x.shape)} ({role})"
            assert whole.dtype == x.dtype, f"{stage!r}: decode gave {whole.dtype} for {x.dtype} ({role})"
            out = torch.empty_like(x)
            stage.decode(packed, role, out)
            assert torch.equal(out, whole), f"{stage!r}: decode(out=...) wrote something else ({role})"
            _check_moves(stage, packed, role, whole, granule)
            if stage.reads_room:
                _check_room(stage, packed, role, whole)
            again = stage.decode(stage.encode(whole, role), role)
            once, twice = (whole - x).norm(), (again - whole).norm()
            assert twice <= once + 1e-5 * x.norm(), f"{stage!r}: a second round loses more than the first ({role})"
            _check_products(stage, packed, role, whole)


def _check_packed(stage: Encoder, packed: Packed, role: str, x: Tensor) -> None:
    assert packed.tokens == x.shape[2], f"{stage!r}: packed.tokens is {packed.tokens}, not {x.shape[2]} ({role})"
    for name, part in packed.parts.items():
        lead = part.shape[:2]
        assert lead == x.shape[:2], f"{stage!r}: part {name!r} begins with {tuple(lead)}, not rows and heads ({role})"
        assert x.shape[2] % part.shape[2] == 0, f"{stage!r}: units of {name!r} do not divide the tokens ({role})"


def _check_moves(stage: Encoder, packed: Packed, role: str, whole: Tensor, granule: int) -> None:
    decode = stage.decode
    half = 2 * granule
    first, last = packed.first(half), packed.take(torch.tensor([2, 3])[None, None], granule)
    assert torch.equal(decode(first, role), whole[:, :, :half]), f"{stage!r}: first() changes tokens ({role})"
    assert torch.equal(decode(first.append(last), role), whole), f"{stage!r}: append() changes tokens ({role})"
    chosen = torch.tensor([1, 3])[None, None]
    index = (chosen.unsqueeze(-1) * granule + torch.arange(granule)).flatten()
    taken = decode(packed.take(chosen, granule), role)
    assert torch.equal(taken, whole[:, :, index]), f"{stage!r}: take() changes tokens ({role})"
    rows = decode(packed.rows(torch.tensor([1, 1, 0])), role)
    assert torch.equal(rows, whole[[1, 1, 0]]), f"{stage!r}: rows() changes tokens ({role})"


def _check_room(stage: Encoder, packed: Packed, role: str, whole: Tensor) -> None:
    """Check the promise of `reads_room`: heads may be further apart in memory than their tokens are."""
    apart = packed.with_room(packed.tokens)
    assert torch.equal(stage.decode(apart, role), whole), f"{stage!r}: room behind the tokens changes them ({role})"
    _check_products(stage, apart, role, whole)


def _check_products(stage: Encoder, packed: Packed, role: str, whole: Tensor) -> None:
    query = _numbers(2, 3, 2, whole.shape[3], seed=1)
    weights = _numbers(2, 3, 2, whole.shape[2], seed=2).softmax(-1)
    dot, mix = stage.dot, stage.mix
    if role != "values":
        expected = query @ whole.transpose(-1, -2)
        product = dot(query, packed, role, Workspace())
        assert torch.allclose(product, expected, atol=1e-4, rtol=1e-3), f"{stage!r}: dot is not query @ decode ({role})"
    if role == "values":
        product = mix(weights, packed, role, Workspace())
        assert torch.allclose(product, weights @ whole, atol=1e-4, rtol=1e-3), f"{stage!r}: mix is not weights @ decode"


def _layer_of(model: Any, layer: int, tokens: int, hidden: bool) -> KV:
    """Numbers of the shape that `model` gives a transform."""
    model = tiny_model() if model is None else model
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[3, 4]]), past_key_values=cache)
    held: Any = cache.layers[layer]
    shapes = ((2, x.shape[1], tokens, x.shape[3]) for x in (held.keys, held.values))
    keys, values = (_numbers(*shape, seed=50 * i + layer) for i, shape in enumerate(shapes))
    width = model.config.get_text_config(decoder=True).hidden_size
    return KV(keys, values, _numbers(2, 1, tokens, width, seed=100 + layer) if hidden else None)


def _check_granules(stage: Transform, codec: Codec, group: list[KV]) -> None:
    """Granules that were transformed in two goes are read in one."""
    parts = [[_tokens_of(kv, part) for kv in group] for part in (slice(0, codec.granule), slice(codec.granule, None))]
    blocks = [{name: latent.data for name, latent in codec.forward(part).items()} for part in parts]
    joined = {name: torch.cat([data[name] for data in blocks], dim=2) for name in blocks[0]}
    for i in range(len(group)):
        apart = [codec.inverse(data, i) for data in blocks]
        for what in ("keys", "values"):
            expected = torch.cat([getattr(kv, what) for kv in apart], dim=2)
            same = torch.allclose(getattr(codec.inverse(joined, i), what), expected, atol=1e-4, rtol=1e-3)
            assert same, f"{stage!r}: {what} of layer {i} change when latents of later granules stand behind theirs"


def _tokens_of(kv: KV, part: slice) -> KV:
    return KV(kv.keys[:, :, part], kv.values[:, :, part], None if kv.hidden is None else kv.hidden[:, :, part])


def check_share(stage: Share, model: Any = None) -> None:
    """Each layer that holds nothing reads an earlier one that does."""
    shares = stage.bind(tiny_model() if model is None else model)
    for layer, source in shares.items():
        earlier = 0 <= source < layer and source not in shares
        assert earlier, f"{stage!r}: layer {layer} reads layer {source}, which is not earlier or reads another"


def check_transform(stage: Transform, model: Any = None) -> None:
    """Latents have tokens on axis 2, and `inverse` gives back layers of the right shape, token by token; what reads
    latents directly agrees with it."""
    bound = stage.bind(tiny_model() if model is None else model)
    assert bound.layers, f"{stage!r}: once bound, `layers` must be a number"
    codec = bound.for_group(list(range(bound.layers)))
    tokens = max(2, -(-64 // codec.granule)) * codec.granule
    group = [_layer_of(model, i, tokens, isinstance(codec, NeedsHidden)) for i in range(bound.layers)]
    if isinstance(codec, FitsText):
        codec = codec.fit(group)
    latents = codec.forward(group)
    assert latents, f"{stage!r}: forward gave no latents"
    for name, latent in latents.items():
        assert latent.data.dim() == 4, f"{stage!r}: latent {name!r} is not (B, H or 1, T, R)"
        named = latent.exact or not codec.encoders or name in codec.encoders
        assert named, f"{stage!r}: other latents have encoders of their own, and {name!r} has none"
    data = {name: latent.data for name, latent in latents.items()}
    _check_granules(stage, codec, group)
    for i, kv in enumerate(group):
        back = codec.inverse(data, i)
        assert back.keys.shape == kv.keys.shape, f"{stage!r}: keys of layer {i} came back as {tuple(back.keys.shape)}"
        assert back.values.shape == kv.values.shape, f"{stage!r}: values of layer {i} have another shape"
        if isinstance(codec, ReadsDirectly):
            assert torch.equal(codec.keys(data, i), back.keys), f"{stage!r}: keys() of layer {i} differ from inverse()"
            weights = _numbers(2, kv.keys.shape[1], 3, tokens, seed=100 + i).softmax(-1)
            weighed, expected = codec.weigh(weights, data, i), weights @ back.values
            assert torch.allclose(weighed, expected, atol=1e-4, rtol=1e-3), f"{stage!r}: weigh is not weights @ values"
        if isinstance(codec, FitsText):
            _check_fitted(stage, codec, data, i, back)


def _check_fitted(stage: Transform, codec: FitsText, data: dict[str, Tensor], layer: int, back: KV) -> None:
    """Check that all that was fitted to a text has a first axis of rows, and goes with them."""
    swapped = codec.with_fitted({name: x[[1, 0]] for name, x in codec.fitted.items()})
    again = swapped.inverse({name: x[[1, 0]] for name, x in data.items()}, layer)
    same = torch.allclose(again.keys[[1, 0]], back.keys, atol=1e-5)
    assert same, f"{stage!r}: with_fitted() with rows swapped does not give the rows swapped"


def check_select(stage: Select) -> None:
    """Scores are finite, one per row, kv head and token, and do not change what they look at."""
    _check_scores(stage, stage)


def check_score(score: Any, model: Any = None) -> None:
    """A score alone, and inside `Evict`, whose budget must hold."""
    stage = Evict(0.3, score)
    _check_scores(score, stage)
    check_in_stack(stage, model)


def _check_scores(who: Any, stage: Select) -> None:
    model = tiny_model()
    bound, wants = stage.bind(model, range(model.config.num_hidden_layers)), stage.queries
    kv = KV(_numbers(2, 2, 48, 16), _numbers(2, 2, 48, 16, seed=1))
    before = kv.keys.clone(), kv.values.clone()
    queries = None if wants == 0 else _numbers(2, 4, 48 if wants < 0 else min(wants, 48), 16, seed=2)
    context = Context(
        layer=0,
        seen=60,
        positions=torch.arange(12, 60, dtype=torch.int32)[None, None],
        queries=queries,
        scaling=0.25,
        sinks=4,
        window=8,
        references=(_numbers(2, 4, 6, 16, seed=3), torch.arange(12, 60, 8)) if stage.references else None,
    )
    if stage.tracks or stage.rereads:
        memory = bound.track(kv, context)
        for name, x in memory.items():
            assert x.shape[:3] == kv.keys.shape[:3], f"{who!r}: memory {name!r} is not one entry per token"
        context = dataclasses.replace(context, memory=memory)
    ranking = bound.score(kv, context)
    assert ranking.shape == kv.keys.shape[:3], (
        f"{who!r}: score gave {tuple(ranking.shape)}, not {tuple(kv.keys.shape[:3])}"
    )
    assert torch.isfinite(ranking).all(), f"{who!r}: scores are not finite"
    assert torch.equal(ranking, bound.score(kv, context)), f"{who!r}: the same tokens score differently the second time"
    unchanged = torch.equal(before[0], kv.keys) and torch.equal(before[1], kv.values)
    assert unchanged, f"{who!r}: score wrote into the keys or values"


def check_in_stack(stage: Stage, model: Any = None) -> None:
    """Under a tiny model: generation runs, bytes are real, budget, sinks and window hold, copies are independent."""
    model = tiny_model() if model is None else model
    ids = torch.randint(3, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    stack = KVStack([stage], sinks=3, window=16)
    with torch.no_grad():
        model.generate(ids, past_key_values=stack, max_new_tokens=40, do_sample=False)
    assert stack.seen == 339, f"{stage!r}: {stack.seen} tokens seen, not 339"
    held = storage_bytes(stack.tensors())
    assert stack.nbytes == held, f"{stage!r}: nbytes {stack.nbytes} is not what the tensors hold, {held}"
    for layer in range(model.config.num_hidden_layers):
        positions = stack.positions(layer).long()
        assert bool((positions.diff(dim=-1) > 0).all()), f"{stage!r}: positions of layer {layer} are not ascending"
        ends = torch.cat([torch.arange(3), torch.arange(339 - 16, 339)])
        kept = torch.isin(ends, positions).all() and all(torch.isin(ends, head).all() for head in positions)
        assert bool(kept), f"{stage!r}: sinks or window of layer {layer} are lost"
        assert stack.read(layer, 1).keys.shape[2] == stack.held, f"{stage!r}: layer {layer} does not hold `held` tokens"
    if isinstance(stage, Evict):
        budget = stage.keep if isinstance(stage.keep, int) else stage.keep * (339 - 19)
        assert stack.held <= budget + 19, f"{stage!r}: holds {stack.held} tokens, and its budget is {budget}"
    stack.batch_select_indices(torch.tensor([1]))
    stack.crop(-5)
    assert (stack.batch_size, stack.seen) == (1, 334), f"{stage!r}: rows or crop went wrong"


def check_file(stage: Stage, model: Any = None) -> None:
    """Check that packed tokens go to a file and back, and that parts that are cut or hold no numbers are refused."""
    model = tiny_model() if model is None else model
    ids = torch.randint(3, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    stack = KVStack([stage], model=model, sinks=3, window=16)
    with torch.no_grad():
        model(ids, past_key_values=stack)
        stack.batch.catch_up({})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        # without the stack's settings: a stage may be tried before it has a name
        disk.write(path, {}, stack.batch, stack._learned, stack._others)
        saved = disk.load(path)
        same = torch.equal(_loaded(saved, stage, model).read(0).keys, stack.read(0).keys)
        assert same, f"{stage!r}: keys are others after they were saved and loaded"
        metadata, tensors = read_tensors(path, UseError, "cache", "")
        for entry in saved.described["cohorts"][0]["stores"][0]["sealed"]:
            for part, name in entry["parts"].items():
                for what, x in _damaged(tensors[name]):
                    write_tensors(path, tensors | {name: x}, metadata)
                    try:
                        _loaded(disk.load(path), stage, model)
                    except UseError:
                        continue
                    raise AssertionError(f"{stage!r}: {entry['role']}: {part} of a file {what}, and it is loaded")


def _damaged(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "is cut", x[..., :-1].contiguous()
    yield "is empty", x[:, :, :0].contiguous()
    if x.is_floating_point():
        yield "holds NaN", torch.full_like(x, float("nan"))


def _loaded(saved: disk.Saved, stage: Stage, model: Any) -> KVStack:
    stack = KVStack([stage], model=model, sinks=3, window=16)
    with torch.no_grad():
        saved.fill(repr(stack), stack.batch, stack._learned, stack._others)
    return stack


def check_registered(stage: Stage) -> None:
    """A stage that is installed is found by its name and travels through a spec string and a dict."""
    spec = to_spec([stage])
    assert parse(spec)[0] == [stage], f"{stage!r}: {spec!r} describes something else"
    data = {"stages": [to_dict(stage)]}
    assert parse(data)[0] == [stage], f"{stage!r}: {data!r} describes something else"
