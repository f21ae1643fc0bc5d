"""What the processes that share a model are asked to do; a test does the same with the whole model in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import kvstack
from kvstack import KV, Calibration, KVStack
from kvstack.calibration import keep
from kvstack.calibration.blocks import by_heads
from kvstack.calibration.calibrate import default_path
from kvstack.errors import KVStackError
from kvstack.heads import Heads
from kvstack.model.fingerprint import fingerprint, kv_fingerprint
from kvstack.model.ranks import heads_of
from tests import tiny

Job = Callable[[Any, Path], Any]
OF_ALL_HEADS = ("text hash", "positions given")
"""Parts of a stack that belong to no head: each process holds them."""
NEW = 40
"""Tokens that are generated: more than a block, so that tokens are evicted and sealed while decoding too."""

SAME = [
    "quant:2",
    "quant:4",
    "evict:0.2,score=snapkv(kernel=1)",
    "evict:0.2,pool=max",
    "evict:40,layers=1,score=snapkv",
    "evict:0.2,score=h2o",
    "evict:0.2,score=h2o,share_heads=True",
    "evict:0.2,score=tova",
    "evict:0.2,score=keydiff",
    "evict:0.2,score=expected",
    "evict:0.2,score=random",
    "evict:0.3,score=kvzip",
    "quant:4+evict:0.3",
    "quant:2+evict:0.3,score=keydiff",
    "quant:4+evict:60,score=random",
    "evict:40,score=keydiff,positions=cache",
    "quant:4+evict:0.3,score=keydiff,positions=cache",
    "xkv:keep=1.0,exact=None+evict:0.5",
    "commonkv:1.0,layers=1,basis=weights",
]
"""Stacks whose choices and greedy tokens are those of one process. Unsmoothed: smoothed scores have plateaus, and
the last bits of a product that is split in two decide between equal ones."""
OTHERS = {
    "granite_swa": "evict:0.2",
    "minicpm3": "evict:0.2,score=tova",
    "phi3": "commonkv+quant:4",
    "qwen2": "commonkv:1.0,layers=1,basis=weights+evict:0.5",
}
"""Models whose plans differ: attention that runs on local parameters, latents that all heads share, whole heads,
projections with a bias."""

CALIBRATED = {
    "numbers": ("joint", "commonkv:0.5,layers=2"),
    "bits": ("joint", "commonkv:0.5,layers=2+quant:2"),
    "all rebuilt": ("joint", "commonkv:0.4,layers=2,exact=None+quant:4+evict:0.3"),
    "unmerged": ("joint", "commonkv:0.5,layers=2,unmerged=0.25"),
    "runs": ("runs", "commonkv:0.5,layers=2+quant:2"),
    "kvtc": ("kvtc", "kvtc:8"),
    "kvtc evict": ("kvtc", "kvtc:4+evict:0.3"),
}
"""Stacks with a calibration that one process made: the name of its file."""
NONE = ["commonkv:layers=1", "kvtc:layers=2"]
"""Stacks whose calibration nobody has made."""
BY_DEFAULT = ["commonkv+quant:2+evict:0.2", "kvtc"]
"""Stacks whose calibration is found in the cache folder."""


def model_in(folder: Path, name: str) -> Any:
    """The model of that name, whole, or a part of it where this is one of several processes."""
    settings: dict[str, Any] = {}
    if "WORLD_SIZE" in os.environ:
        from transformers.distributed import DistributedConfig

        settings["distributed_config"] = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder / name, **settings).eval()


def held(stack: KVStack) -> dict[str, Any]:
    """What can be compared of a stack: counts, bytes of its heads, and positions of each layer."""
    positions = [[stack.positions(layer, row) for row in range(stack.batch_size)] for layer in stack.compressed_layers]
    of_all = sum(x.nbytes for _, what, x in stack.parts() if what in OF_ALL_HEADS)
    return {"seen": stack.seen, "held": stack.held, "nbytes": stack.nbytes - of_all, "positions": positions}


def generated(model: Any, stack: KVStack, ids: torch.Tensor, **settings: Any) -> dict[str, Any]:
    out = model.generate(ids, past_key_values=stack, max_new_tokens=NEW, do_sample=False, **settings)
    return {"tokens": out[:, ids.shape[1] :], **held(stack)}


def with_spec(spec: str) -> Job:
    return lambda model, folder: generated(model, KVStack.from_spec(spec), tiny.tokens(1, 400))


def on_model(name: str, spec: str) -> Job:
    return lambda _, folder: with_spec(spec)(model_in(folder, name), folder)


def dense(model: Any, folder: Path) -> Any:
    cache = DynamicCache(config=model.config)
    out = model.generate(tiny.tokens(1, 400), past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    return {"tokens": out[:, 400:], "nbytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}


def padded(model: Any, folder: Path) -> Any:
    """Rows of two lengths, whose heads keep different tokens and drop granules and single tokens."""
    mask = torch.ones(3, 300, dtype=torch.long)
    mask[1, :77] = 0
    stack = KVStack.from_spec("quant:4+evict:90,score=keydiff", model=model)
    return generated(model, stack, tiny.tokens(3, 300), attention_mask=mask)


def cropped(model: Any, folder: Path) -> Any:
    """A crop to before tokens that heads kept differently: all let go of their newest until they hold equally many."""
    stack = KVStack.from_spec("evict:0.2,score=keydiff", model=model)
    model(tiny.tokens(1, 400), past_key_values=stack)
    model(tiny.tokens(1, 1), past_key_values=stack)
    stack.crop(-250)
    before = held(stack)
    logits = model(tiny.tokens(1, 90, seed=1), past_key_values=stack).logits
    return {"before": before, "after": held(stack), "logits": logits[:, -1]}


def saved(model: Any, folder: Path) -> Any:
    """A conversation that goes on from a file, and what is said of the file of another process."""
    path = folder / "conversation.safetensors"
    stack = KVStack.from_spec("quant:4+evict:0.3", model=model)
    model(tiny.tokens(1, 300), past_key_values=stack)
    stack.save(path)
    again = KVStack.load(path, model=model)
    new = tiny.tokens(1, 5, seed=1)
    logits = [model(new, past_key_values=cache).logits for cache in (stack, again)]
    heads = heads_of(model)
    heads.gathered(0)  # all files are there
    other = path.with_name(f"conversation-{1 - heads.rank}-of-2.safetensors")
    own = path.with_name(f"conversation-{heads.rank}-of-2.safetensors")
    refused = ""
    if heads.size > 1:
        heads.gathered(own.write_bytes(other.read_bytes()) if heads.rank == 1 else None)
        refused = refusal(lambda: KVStack.load(path, model=model)) if heads.rank == 1 else ""
    return {
        "same": torch.equal(*logits),
        "files": sorted(x.name for x in folder.glob("conversation*")),
        "told": refused,
    }


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except KVStackError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def read(stack: KVStack) -> list[KV]:
    return [stack.read(layer) for layer in stack.compressed_layers]


def with_axes(file: str | None, spec: str) -> Job:
    """A calibration for all heads, from a file or (None) the cache folder. One process cuts it as two processes do."""

    def job(model: Any, folder: Path) -> Any:
        stages = KVStack.from_spec(spec).stages
        if file is not None or "WORLD_SIZE" not in os.environ:
            where = kept(model, spec) if file is None else folder / f"{file}.safetensors"
            axes: Any = str(where)
            if "WORLD_SIZE" not in os.environ:
                axes = by_heads(Calibration.load(where), 2)
            stages = (replace(stages[0], calibration=axes), *stages[1:])
        stack = KVStack(stages, model=model)
        out = generated(model, stack, tiny.tokens(1, 400))
        shared = sum(part.nbytes for part in stack.report().parts if part.part in ("positions", "places: data"))
        return {**out, "read": read(stack), "shared": shared, "latents": latents(stack)}

    return job


def kept(model: Any, spec: str) -> Path:
    return default_path(model, 4, "variance" if spec.startswith("kvtc") else "fisher")


def latents(stack: KVStack) -> list[list[str]]:
    """Names of what is sealed in each store."""
    return [sorted({str(name) for _, name in store.packed}) for store in stack.batch.cohorts[0].stores]


def saved_axes(model: Any, folder: Path) -> Any:
    """A conversation whose tokens stand on a part of the axes: it goes on from a file."""
    stages = "commonkv:0.5,layers=2,calibration=" + repr(str(folder / "joint.safetensors")) + "+quant:2"
    path = folder / "axes.safetensors"
    stack = KVStack.from_spec(stages, model=model)
    model(tiny.tokens(1, 300), past_key_values=stack)
    stack.save(path)
    again = KVStack.load(path, model=model)
    new = tiny.tokens(1, 5, seed=1)
    logits = [model(new, past_key_values=cache).logits for cache in (stack, again)]
    prints = [codec.fingerprint for codec in stack.binding.plan.codecs]
    return {"same": torch.equal(*logits), "fingerprints": prints}


def refused(spec: str) -> Job:
    return lambda model, folder: refusal(lambda: KVStack.from_spec(spec, model=model))


def calibrated(metric: Any) -> Job:
    return lambda model, folder: refusal(lambda: kvstack.calibrate(model, tokens=300, metric=metric))


def disagreeing(model: Any, folder: Path) -> Any:
    keep = 0.2 + 0.1 * heads_of(model).rank
    return refusal(lambda: KVStack.from_spec(f"evict:{keep}", model=model))


def sharer(model: Any, folder: Path) -> Any:
    """A strategy that is searched for here."""
    from kvstack_kvsharer import search

    strategy = search(model, share=0.5, threshold=-1.0)
    return {"shares": dict(strategy.shares), "order": [pair[:2] for pair in strategy.pairs], "whose": strategy.identity}


def sharer_by_default(model: Any, folder: Path) -> Any:
    """A strategy that is found in the cache folder, or searched for and kept there."""
    spec = "kvsharer:0.5,threshold=-1.0,rank=similar+quant:4"
    out = with_spec(spec)(model, folder)
    files = {x: x.stat().st_mtime_ns for x in keep.folder().glob("*-kvsharer-*.json")}
    keep.forget(model)
    KVStack.from_spec(spec, model=model)
    left = {x: x.stat().st_mtime_ns for x in keep.folder().glob("*-kvsharer-*.json")}
    return {**out, "files": len(files), "found again": left == files}


def strategy_of_one_process(model: Any, folder: Path) -> Any:
    return with_spec(f"kvsharer:strategy={str(folder / 'strategy.json')!r}+evict:0.3")(model, folder)


def heads(model: Any, folder: Path) -> Heads:
    found = heads_of(model)
    return Heads(found.rank, found.size, found.whole)


JOBS: dict[str, Job] = {
    "heads": heads,
    "dense": dense,
    "fingerprints": lambda model, folder: (fingerprint(model), kv_fingerprint(model)),
    "padded": padded,
    "cropped": cropped,
    "saved": saved,
    "disagreeing": disagreeing,
    "sharer": sharer,
    "sharer by default": sharer_by_default,
    "strategy of one process": strategy_of_one_process,
    "saved axes": saved_axes,
    "calibrate fisher": calibrated("fisher"),
    "calibrate variance": calibrated("variance"),
    **{f"none is made {spec}": refused(spec) for spec in NONE},
    **{name: with_axes(*given) for name, given in CALIBRATED.items()},
    **{f"default {spec}": with_axes(None, spec) for spec in BY_DEFAULT},
    **{spec: with_spec(spec) for spec in SAME},
    **{f"{name}: {spec}": on_model(name, spec) for name, spec in OTHERS.items()},
}
