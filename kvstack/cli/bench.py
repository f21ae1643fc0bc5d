"""`kvstack bench`: the benchmarks as commands. What they measure with is imported only when one runs."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from ..bench.measure.run import Run

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Measure stacks: quality, memory and speed, compared with other caches.", no_args_is_help=True
)


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Mode(StrEnum):
    aware = "aware"
    agnostic = "agnostic"
    turns = "turns"


class Shape(StrEnum):
    small = "small"
    smollm2 = "135m"
    llama3_1b = "1b"
    llama3_8b = "8b"
    llama2_7b = "7b"
    llama3_70b = "70b"
    qwen3 = "qwen3-1.7b"
    deepseek = "deepseek-1b"


Shaped = Annotated[Shape | None, typer.Option(help="A random model of these sizes instead, which needs no download.")]


def _known(specs: list[str] | None) -> list[str] | None:
    from ..bench.measure.variants import parse
    from ..errors import KVStackError

    try:
        parse(specs or ())
    except KVStackError as error:
        raise typer.BadParameter(str(error)) from None
    return specs


def _lengths(text: str | None) -> str | None:
    if text is not None and not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise typer.BadParameter(f"{text!r}: give numbers of tokens, such as 2048,4096.")
    return text


Folder = Annotated[Path | None, typer.Option(exists=True, file_okay=False)]


def _options(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of a causal model, gemma-3-270m for one; SmolLM2-135M-Instruct if not given."
        ),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(callback=_lengths, help="Numbers of tokens, separated by commas.")
    ] = None,
    stacks: Annotated[
        list[str] | None,
        typer.Option(
            "--stacks",
            "--stack",
            callback=_known,
            metavar="SPEC,...",
            help="Caches to compare with the dense one, separated by commas or the option repeated: stacks such as "
            "quant:2+evict:0.2, with settings quant:4@fused=False; empty; nothing (no context at all); peers such as "
            "hqq:4, quanto:2,group=32 or kvpress:snapkv,keep=0.2.",
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of .txt files to read.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder for the figures, JSON lines; what stands there is not measured again."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Type of the model's weights.")] = Dtype.float32,
    threads: Annotated[int, typer.Option(min=1, help="Threads for torch.")] = 2,
    seed: Annotated[int, typer.Option(help="For all that is random.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny random model: seconds, to test with.")] = False,
) -> Run:
    """Return the settings of every benchmark; `_command` puts these before a command's own options."""
    from ..bench.measure.run import Run

    lengths = tuple(map(int, contexts.split(","))) if contexts else ()
    return Run(lengths, tuple(stacks or ()), model, dtype.value, threads, seed, tiny, texts, device, out)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register `function(run, ...)` with the options of `_options` in the place of `run`."""
    shared, own = inspect.signature(_options).parameters, inspect.signature(function).parameters

    def command(**given: Any) -> None:
        from ..errors import KVStackError

        run = _options(**{name: given.pop(name) for name in shared})
        try:
            function(run, **given)
        except KVStackError as error:
            raise typer.BadParameter(str(error)) from None

    hints = get_type_hints(_options, _names(), include_extras=True)
    hints |= get_type_hints(function, _names(), include_extras=True)
    parameters = [*shared.values(), *(p for name, p in own.items() if name != "run")]
    parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)  # arguments come first
    typed = [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    command.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
    command.__doc__ = function.__doc__
    bench_app.command(function.__name__.rstrip("_"))(command)
    return function


def _names() -> dict[str, Any]:
    return {**globals(), "Run": Any}


@_command
def quality(
    run: Run,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each kind of text.")] = 1,
    score: Annotated[int, typer.Option(min=1, help="Tokens scored after the compressed ones.")] = 256,
    feed: Annotated[
        int | None, typer.Option(min=1, help="Scored tokens fed at once: 1 is decoding; all if not given.")
    ] = None,
) -> None:
    """Drift of the next tokens from the dense cache, on three kinds of text."""
    from ..bench.measure import quality as bench
    from ..bench.show import tables

    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), windows, score, feed):
        tables.quality(figures)


@_command
def budgets(
    run: Run,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each kind of text.")] = 1,
    score: Annotated[int, typer.Option(min=1, help="Tokens scored after the compressed ones.")] = 256,
) -> None:
    """At equal bytes: the best stack next to the best baseline, from half of the dense bytes down."""
    from ..bench.measure import budgets as bench
    from ..bench.measure.quality import run as qualities
    from ..bench.show import tables

    contexts = []
    for figures in qualities(run.usually(bench.CONTEXTS, bench.STACKS), windows, score):
        tables.quality(figures)
        contexts.append(figures)
    tables.budgets(contexts)


@_command
def needles(
    run: Run,
    task: Annotated[list[str] | None, typer.Option(help="A task, may be repeated; `all` for all of RULER's.")] = None,
    mode: Annotated[
        list[Mode] | None,
        typer.Option(help="When the question is seen, may be repeated; aware and agnostic if not given."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts for each task.")] = 10,
    questions: Annotated[int, typer.Option(min=1, help="Questions about each text.")] = 1,
    answer_tokens: Annotated[int, typer.Option(min=1, help="New tokens for each expected answer, at most.")] = 48,
    tasks: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of RULER's CONTEXT/TASK.jsonl files.")
    ] = None,
    longbench: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of LongBench's TASK.jsonl files.")
    ] = None,
) -> None:
    """Test that facts hidden in a long text are still found."""
    from ..bench.measure import needles as bench
    from ..bench.show import tables
    from ..bench.tasks import TASKS as RULER

    if tasks and longbench:
        raise typer.BadParameter("give --tasks or --longbench, not both.")
    if longbench and not task:
        raise typer.BadParameter("--longbench needs the names of its files, without .jsonl: --task qasper.")
    names = tuple(RULER) if task == ["all"] else tuple(task or bench.TASKS)
    modes = tuple(each for each in bench.MODES if each in (mode or (Mode.aware, Mode.agnostic)))
    folder = tasks or longbench
    asking = bench.Asking(names, modes, samples, questions, answer_tokens, folder, longbench is not None)
    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), asking):
        tables.needles(figures)


@_command
def answers(
    run: Run,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A .parquet or .jsonl file of questions.")],
    dataset: Annotated[
        str, typer.Option(help="How answers are scored: match, exact, or a dataset of kvpress such as ruler.")
    ] = "match",
    samples: Annotated[int | None, typer.Option(min=1, help="The first rows of the file; all if not given.")] = None,
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Compress the question too; the context alone if not.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer; those of each row if not given.")
    ] = None,
    max_context_length: Annotated[
        int | None, typer.Option(min=1, help="Read the first tokens of each context; all if not given.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(file_okay=False, help="Write the results here too, in kvpress' layout.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Part of the dataset, for the names of the results: 4096.")
    ] = None,
) -> None:
    """Answers to the questions of a file with kvpress' columns, and kvpress' scores of them."""
    from ..bench.measure import answers as bench
    from ..bench.measure.variants import codes
    from ..bench.show import kvpress_results, tables
    from ..bench.tasks import DATASETS

    if run.contexts:
        raise typer.BadParameter("the contexts are those of the file. Use --max-context-length to cut them.")
    asking = bench.Asking(file, dataset, samples, query_aware, max_new_tokens, max_context_length)
    told = run.usually((), bench.STACKS)
    figures, rows, whole = bench.run(told, asking)
    tables.answers(figures)
    if results is not None:
        config = {
            "dataset": dataset, "data_dir": data_dir, "model": None, "device": None, "press_name": None,
            "compression_ratio": None, "fraction": len(rows) / whole, "max_new_tokens": max_new_tokens,
            "max_context_length": max_context_length, "query_aware": query_aware, "needle_depth": None,
        }  # fmt: skip
        columns, metrics = [row.row for row in rows], DATASETS[dataset].metrics
        for place in kvpress_results.write(
            results, figures, columns, config, codes(told.stacks), lambda texts: metrics(rows, texts)
        ):
            typer.echo(place)


@_command
def memory(
    run: Run,
    decode: Annotated[int, typer.Option(min=0, help="Tokens decoded after the prefill.")] = 64,
    peak: Annotated[bool, typer.Option(help="Measure peaks, each cache in its own process.")] = True,
) -> None:
    """Bytes held, by stage, and the peaks of prefill and decoding."""
    from ..bench.measure import memory as bench
    from ..bench.show import tables

    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), decode, peak):
        tables.memory(figures)


@_command
def decode(
    run: Run,
    rounds: Annotated[int, typer.Option(min=1, help="Prefills with each cache.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded with each cache and counted.")] = 64,
    burst: Annotated[int, typer.Option(min=1, help="Tokens before the next cache's turn.")] = 8,
    peak: Annotated[
        bool, typer.Option(help="The peak of decoding too, each cache in a process of its own (on Linux).")
    ] = True,
) -> None:
    """Time to the first token and per decoded token, the caches taking turns, and the memory that decoding takes."""
    from ..bench.measure import decode as bench
    from ..bench.show import tables

    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), rounds, steps, burst, peak):
        tables.decode(figures)


@_command
def matrix(
    run: Run,
    transform: Annotated[list[str] | None, typer.Option(help="A transform or `none`, may be repeated.")] = None,
    encode: Annotated[list[str] | None, typer.Option(help="An encoder or `none`, may be repeated.")] = None,
    evict: Annotated[list[str] | None, typer.Option(help="An eviction or `none`, may be repeated.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each kind of text.")] = 1,
    score: Annotated[int, typer.Option(min=1, help="Tokens scored after the compressed ones.")] = 256,
    steps: Annotated[int, typer.Option(min=0, help="Tokens decoded for the speed; 0 leaves it out.")] = 16,
    burst: Annotated[int, typer.Option(min=1, help="Tokens before the next cache's turn.")] = 4,
) -> None:
    """Every combination of transform, encode and evict: bytes, quality, speed, and the Pareto front."""
    from ..bench.measure import matrix as bench
    from ..bench.show import tables

    grid = bench.combinations(transform or bench.TRANSFORMS, encode or bench.ENCODES, evict or bench.EVICTS)
    for qualities, speeds in bench.run(run.usually(bench.CONTEXTS), grid, windows, score, steps, burst):
        tables.matrix(qualities, speeds)


@_command
def step(
    run: Run,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded with each stack.")] = 32,
) -> None:
    """The time of a decoded token, part by part: the model, hooks, storing, scores, values, softmax, settling."""
    from ..bench.measure import step as bench
    from ..bench.show import tables

    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), steps):
        tables.step(figures)


@_command
def device_(
    run: Run,
    shape: Shaped = None,
    rounds: Annotated[int, typer.Option(min=1, help="Prefills with each cache.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded with each cache and counted.")] = 32,
    burst: Annotated[int, typer.Option(min=1, help="Tokens before the next cache's turn.")] = 4,
) -> None:
    """The cost of stacks on a device, such as a GPU, and a check of its fast readers: one table for a report."""
    from ..bench.measure import device as bench
    from ..bench.show import tables

    told = run.usually(bench.CONTEXTS, bench.STACKS)
    for figures in bench.run(told, shape and shape.value, rounds, steps, burst):
        tables.device(figures)


@_command
def batch(
    run: Run,
    shape: Shaped = None,
    rows: Annotated[str, typer.Option(callback=_lengths, help="Numbers of rows, separated by commas.")] = "1,4,8,16",
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded with each cache and counted.")] = 24,
    burst: Annotated[int, typer.Option(min=1, help="Tokens before the next cache's turn.")] = 4,
) -> None:
    """Decoding several texts at once, of one length and ragged, compared with a dense cache and with the rows alone."""
    from ..bench.measure import batch as bench
    from ..bench.show import tables

    told = run.usually(bench.CONTEXTS, bench.STACKS)
    for figures in bench.run(told, shape and shape.value, list(map(int, rows.split(","))), steps, burst):
        tables.batch(figures)


@_command
def length(
    run: Run,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded at each length.")] = 64,
) -> None:
    """The cost of a token in longer and longer texts, with a small random model: time, and bytes held."""
    from ..bench.measure import length as bench
    from ..bench.show import tables

    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), steps):
        tables.length(figures)


@_command
def beyond(
    run: Run,
    feed: Annotated[int, typer.Option(min=1, help="Tokens fed at once.")] = 256,
) -> None:
    """Perplexity of the parts of one long text, also beyond the longest one that the model was made for."""
    from ..bench.measure import beyond as bench
    from ..bench.show import tables

    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), feed):
        tables.beyond(figures)


@_command
def fork(
    run: Run,
    rounds: Annotated[int, typer.Option(min=1, help="Questions asked in each way.")] = 5,
) -> None:
    """Time to the first token of a question about a text: on a fork, on a copy, and by reading the text again."""
    from ..bench.measure import fork as bench
    from ..bench.show import tables

    for figures in bench.run(run.usually(bench.CONTEXTS, bench.STACKS), rounds):
        tables.fork(figures)


@_command
def calibration(
    run: Run,
    shapes: Annotated[
        list[Shape] | None, typer.Option("--shape", help="Random models of these sizes; the option may be repeated.")
    ] = None,
    really: Annotated[
        bool, typer.Option("--really", help="Do it, on random weights and in a process of its own, and take the time.")
    ] = False,
) -> None:
    """The cost of calibrating a model: tokens, passes, memory, the file. This needs no weights."""
    from ..bench.measure import calibration as bench
    from ..bench.show import tables

    for figures in bench.run(run, [shape.value for shape in shapes or Shape], really):
        tables.calibration(figures)


@_command
def axes(
    run: Run,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers in a group; a divisor near 5 if not given.")] = None,
) -> None:
    """The cost and the gain of CommonKV's axes that fewer numbers share: bytes, and the error at equal bytes."""
    from ..bench.measure import axes as bench
    from ..bench.show import tables

    for figures in bench.run(run, layers):
        tables.axes(figures)


@_command
def layers(
    run: Run,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers in a group; a divisor near 5 if not given.")] = None,
) -> None:
    """The likeness of the layers of a group: keys, values, hidden states and the paper's latents."""
    from ..bench.measure import layers as bench
    from ..bench.show import tables

    for figures in bench.run(run, layers):
        tables.layers(figures)


@_command
def all_(run: Run) -> None:
    """Everything with fewer samples, then the report; about an hour for the default model on two cores."""
    from ..bench.measure.decode import CONTEXTS as DECODE
    from ..bench.measure.memory import CONTEXTS as MEMORY
    from ..bench.measure.needles import TASKS
    from ..bench.show.report import write
    from ..bench.terminal import say

    with tempfile.TemporaryDirectory() as scratch:  # without a folder for the figures no report is written
        told = replace(run, out=run.out or Path(scratch))
        quality(told)
        budgets(told)
        needles(told, list(TASKS[:2]), samples=3)
        # bytes are those of the dtype that models are served in
        memory(replace(told, dtype="bfloat16").usually(MEMORY[:2]), decode=16, peak=not run.tiny)
        decode(told.usually(DECODE[:2]), rounds=1 if run.tiny else 2, steps=32, peak=not run.tiny)
        matrix(told)
        if run.out is not None:
            say(f"report: {write(run.out)}")


@bench_app.command()
def report(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Where the figures are (`--out`).")],
) -> None:
    """One HTML page with tables and pictures from the figures of a folder."""
    from ..bench.show import report as bench
    from ..errors import KVStackError

    try:
        typer.echo(bench.write(folder))
    except KVStackError as error:
        raise typer.BadParameter(str(error)) from None
