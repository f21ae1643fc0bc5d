"""`kvstack bench`: the benchmarks as commands. What they measure with is imported only when one runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .common import Run

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Speed, memory and quality of stacks beside transformers' own caches.", no_args_is_help=True
)
TINY_CONTEXTS = (512,)


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _known(specs: list[str] | None) -> list[str] | None:
    from ..errors import KVStackError
    from .common import variants

    try:
        variants(specs or ())
    except KVStackError as error:
        raise typer.BadParameter(str(error)) from None
    return specs


def _lengths(text: str | None) -> str | None:
    if text is not None and not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise typer.BadParameter(f"{text!r}: give numbers of tokens, such as 2048,4096.")
    return text


Model = Annotated[
    str | None, typer.Option(help="Folder or name of a causal model; SmolLM2-135M-Instruct if not given.")
]
Contexts = Annotated[str | None, typer.Option(callback=_lengths, help="Numbers of tokens, separated by commas.")]
Stacks = Annotated[
    list[str] | None,
    typer.Option(
        "--stack",
        callback=_known,
        help="A cache to measure beside the dense one, may be repeated: a spec such as quant:2+evict:0.2, with "
        "settings quant:4@fused=False; empty; or hqq:4 or hqq:2,group=32 for transformers' QuantizedCache.",
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads for torch.")]
Seed = Annotated[int, typer.Option(help="For all that is random.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A tiny random model and short contexts: seconds, to test with.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the model's weights.")]
Json = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Append the figures to this file, a JSON line each.")
]


@bench_app.command()
def decode(
    model: Model = None,
    contexts: Contexts = None,
    stack: Stacks = None,
    threads: Threads = 2,
    seed: Seed = 0,
    tiny: Tiny = False,
    dtype: DtypeOption = Dtype.float32,
    json: Json = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded with each cache and counted.")] = 128,
    burst: Annotated[int, typer.Option(min=1, help="Tokens before the next cache's turn.")] = 8,
) -> None:
    """Milliseconds per decoded token, the caches taking turns."""
    from . import decode as bench

    settings = _run(model, contexts, stack, threads, seed, tiny, dtype, json, bench.CONTEXTS, bench.STACKS)
    bench.run(settings, steps, burst)


@bench_app.command()
def memory(
    model: Model = None,
    contexts: Contexts = None,
    stack: Stacks = None,
    threads: Threads = 2,
    seed: Seed = 0,
    tiny: Tiny = False,
    dtype: DtypeOption = Dtype.bfloat16,
    json: Json = None,
    decode: Annotated[int, typer.Option(min=0, help="Tokens decoded after the prefill.")] = 64,
    peak: Annotated[bool, typer.Option(help="Measure the peak of the prefill, each cache in its own process.")] = True,
) -> None:
    """Bytes held, by stage, and the peak memory of the prefill."""
    from . import memory as bench

    settings = _run(model, contexts, stack, threads, seed, tiny, dtype, json, bench.CONTEXTS, bench.STACKS)
    bench.run(settings, decode, peak)


@bench_app.command()
def quality(
    model: Model = None,
    contexts: Contexts = None,
    stack: Stacks = None,
    threads: Threads = 2,
    seed: Seed = 0,
    tiny: Tiny = False,
    dtype: DtypeOption = Dtype.float32,
    json: Json = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each kind of text.")] = 1,
    score: Annotated[int, typer.Option(min=1, help="Tokens scored after the compressed ones.")] = 256,
    texts: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of .txt files, the third kind of text.")
    ] = None,
) -> None:
    """Drift of the next tokens from the dense cache, on three kinds of text."""
    from . import quality as bench

    settings = _run(model, contexts, stack, threads, seed, tiny, dtype, json, bench.CONTEXTS, ())
    bench.run(settings, windows, score, texts)


@bench_app.command()
def prefill(
    model: Model = None,
    contexts: Contexts = None,
    stack: Stacks = None,
    threads: Threads = 2,
    seed: Seed = 0,
    tiny: Tiny = False,
    dtype: DtypeOption = Dtype.float32,
    json: Json = None,
    rounds: Annotated[int, typer.Option(min=1, help="Prefills with each cache.")] = 5,
) -> None:
    """What compressing adds to the prefill, the caches taking turns."""
    from . import prefill as bench

    settings = _run(model, contexts, stack, threads, seed, tiny, dtype, json, bench.CONTEXTS, bench.STACKS)
    bench.run(settings, rounds)


@bench_app.command()
def layers(
    model: Model = None,
    threads: Threads = 2,
    seed: Seed = 0,
    tiny: Tiny = False,
    dtype: DtypeOption = Dtype.float32,
    json: Json = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers in a group; a divisor near 5 if not given.")] = None,
) -> None:
    """How alike the layers of a group are, by what is compared."""
    from . import layers as bench

    bench.run(_run(model, None, None, threads, seed, tiny, dtype, json, (), ()), layers)


@bench_app.command()
def needles(
    model: Model = None,
    contexts: Contexts = None,
    stack: Stacks = None,
    threads: Threads = 2,
    seed: Seed = 0,
    tiny: Tiny = False,
    dtype: DtypeOption = Dtype.float32,
    json: Json = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions for each cache.")] = 10,
    keys: Annotated[int, typer.Option(min=1, max=10, help="Facts hidden in a text, of which one is asked for.")] = 1,
    blind: Annotated[bool, typer.Option("--blind", help="Compress the text before the question is seen.")] = False,
    tasks: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder with RULER's CONTEXT/TASK.jsonl files.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of that folder, may be repeated.")] = None,
) -> None:
    """Whether a number hidden in a long text is still found."""
    from . import needles as bench

    settings = _run(model, contexts, stack, threads, seed, tiny, dtype, json, bench.CONTEXTS, bench.STACKS)
    bench.run(settings, samples, keys, blind, tasks, task or bench.RULER)


def _run(
    model: str | None,
    contexts: str | None,
    stacks: list[str] | None,
    threads: int,
    seed: int,
    tiny: bool,
    dtype: Dtype,
    json: Path | None,
    usual_contexts: tuple[int, ...],
    usual_stacks: tuple[str, ...],
) -> Run:
    from .common import Run

    lengths = tuple(map(int, contexts.split(","))) if contexts else TINY_CONTEXTS if tiny else usual_contexts
    return Run(lengths, tuple(stacks or usual_stacks), model, dtype.value, threads, seed, tiny, json)
