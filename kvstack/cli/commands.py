"""The command `kvstack` and its commands. Each imports what it needs when it runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError:
    sys.exit("error: the kvstack command needs more packages. Run: pip install 'kvstack[cli]'")

from .. import __version__
from ..errors import KVStackError
from .bench import bench_app

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..cache import KVStack
    from ..calibration.calibration import Calibration, Metric
    from ..stage import Settings

__all__ = ["app"]


class OneLineErrors(TyperGroup):
    """Print kvstack's own errors as one line: they tell the user what to do, and need no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVStackError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=OneLineErrors,
    help="A transformers KV cache that is a pipeline of compressing stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")


class Kind(Enum):
    transform = "transform"
    encode = "encode"
    score = "score"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


EXAMPLE = "commonkv+quant:2+evict:0.2"

Model = Annotated[
    str | None,
    typer.Option(help="Folder or name of a causal model, gemma-3-270m for one; SmolLM2-135M-Instruct if not given."),
]
Stack = Annotated[str, typer.Option(help="What compresses the cache: stages joined by +. `kvstack stages` lists them.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvstack {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Model = None,
    stack: Stack = EXAMPLE,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of documentation the fact is hidden in.")] = 4000,
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate.")] = 64,
) -> None:
    """Hide a fact in a long text and ask for it: a dense cache and a stack, side by side."""
    from .demo import run

    run(model, stack, tokens, new_tokens)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    model: Model = None,
    stack: Stack = "quant:2+evict:0.2",
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Read the prompt from a file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    chat: Annotated[
        bool | None, typer.Option(help="Ask as a user's turn; if not given, where the model has a chat template.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one and none is given.")] = None,
    sinks: Annotated[int | None, typer.Option(min=0, help="First tokens that stay as they are.")] = None,
    window: Annotated[int | None, typer.Option(min=0, help="Newest tokens that stay as they are.")] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Tokens compressed at a time while decoding.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Print the bytes held to standard error.")] = False,
) -> None:
    """Continue a prompt, greedily, from a compressed cache."""
    text = _prompt(prompt, prompt_file)
    settings = {"sinks": sinks, "window": window, "block": block}
    cache = _stack(stack, {name: value for name, value in settings.items() if value is not None})
    import torch
    from transformers import TextStreamer

    from .. import models

    lm, tokenizer = models.load(model, dtype=getattr(torch, dtype.value))
    lm = lm.to(_device(device))
    inputs = models.encode(tokenizer, text, chat).to(lm.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cache.bind(lm)
    lm.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    if report:
        typer.echo(str(cache.report()), err=True)


@app.command()
def play(
    model: Model = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 for any that is free.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in your browser.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one and none is given.")] = None,
) -> None:
    """Open a local page: choose a stack with sliders, and compare its answers with those of a dense cache."""
    import webbrowser

    from .. import models
    from ..play.server import Server

    lm, tokenizer = models.load(model)
    with Server(lm.to(_device(device)), tokenizer, model or models.DEFAULT_MODEL, port) as server:
        typer.echo(f"{server.url} (Ctrl+C to stop)")
        if browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise KVStackError("give one prompt: as an argument, with --prompt-file, or - to read standard input.")
    text = file.read_text(encoding="utf-8") if file else sys.stdin.read() if prompt == "-" else str(prompt)
    if not text.strip():
        raise KVStackError("the prompt is empty. Give it at least one word.")
    return text


def _stack(spec: str, settings: dict[str, int]) -> KVStack:
    from .. import KVStack
    from ..spec import parse

    stages, given = parse(spec)
    return KVStack(stages, **given | settings)


def _device(name: str | None) -> torch.device:
    import torch

    from ..devices import usable

    return usable(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder or name of a causal model.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", dir_okay=False, help="Where to write; the user's cache if not given.")
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option(exists=True, help="A text file or a folder of .txt files; may be repeated.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to read; 10,240 if not given, more for large models.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers in a group; a divisor near 5 if not given.")] = None,
    metric: Annotated[
        str, typer.Option(help='"fisher", for CommonKV; "variance": keys and values apart, of all layers unless said.')
    ] = "fisher",
    all_axes: Annotated[
        bool, typer.Option("--all-axes", help="Keep all axes, in 16 bits, for large budgets; half of them in 8 if not.")
    ] = False,
    block: Annotated[
        int | None, typer.Option(min=1, help="Numbers a token that share axes, at most; 8,192 if not given.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GiB for sums; the texts are read again for more.")] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the energy of every group's axes into this picture.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one and none is given.")] = None,
) -> None:
    """Find the axes that CommonKV stores a model's cache along, and keep them."""
    from rich.console import Console
    from rich.progress import Progress

    from .. import models
    from ..calibration.calibrate import calibrate, default_path
    from ..calibration.plan import BLOCK, KEPT, MEMORY

    given = None if texts is None else _texts(texts)
    lm, tokenizer = models.load(model)
    lm = lm.to(_device(device))
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading", total=None)
        calibration = calibrate(
            lm,
            given,
            tokens,
            layers=layers,
            metric=cast("Metric", metric),  # checked there
            tokenizer=tokenizer,
            keep_axes=1.0 if all_axes else KEPT,
            bits=16 if all_axes else 8,
            block=block or BLOCK,
            memory=MEMORY if memory is None else memory,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    path = out or default_path(lm, calibration.layers, cast("Metric", metric), complete=all_axes)
    calibration.save(path)
    if plot is not None:
        calibration.plot(plot)
    table = spectra(calibration)
    told = f"{path}, {calibration.nbytes / 2**20:.1f} MiB; seconds: {calibration.manifest['seconds']}"
    Console().print(table, told, sep="\n", highlight=False, soft_wrap=True)


def _texts(paths: list[Path]) -> dict[str, str]:
    files = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if not files:
        raise KVStackError(f"{', '.join(map(str, paths))}: no .txt files. Name text files or folders of them.")
    return {str(file): file.read_text(encoding="utf-8") for file in files}


def spectra(calibration: Calibration) -> Table:
    from rich.table import Table

    shares = (0.9, 0.99, 0.999)
    table = Table("layers", "axes", *(f"for {share:.1%} of the energy" for share in shares))
    for number, group in enumerate(calibration.groups):
        ranks = (calibration.rank(share, number % calibration.parts)[group.layers] for share in shares)
        name = calibration.name_of(group).removeprefix("layers ")
        table.add_row(name, f"{len(group.axes)} of {len(group.energy)}", *map(str, ranks))
    return table


@app.command()
def choose(
    model: Annotated[
        str | None, typer.Argument(help="Folder or name of a causal model; SmolLM2-135M-Instruct if not given.")
    ] = None,
    share: Annotated[
        float, typer.Option("--bytes", help="The budget, as a share of the bytes of a dense cache in 16 bits.")
    ] = 0.1,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a text, those that are scored included.")] = 8192,
    texts: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of your .txt files; texts of Python's if not given."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Choose the fastest stack whose KL, in nats, is at most this; else the nearest to dense."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each kind of text; 3 of your texts for each.")] = 1,
    score: Annotated[int, typer.Option(min=1, help="Tokens scored after the compressed ones.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded to measure the speed.")] = 32,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one and none is given.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for torch.")] = 2,
    seed: Annotated[int, typer.Option(help="Where in the texts the windows are.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny random model: seconds, to test with.")] = False,
) -> None:
    """Measure stacks that hold a share of the bytes, on your texts, and print the line that makes the best one."""
    from ..bench.measure.run import Run
    from .choose import run

    told = Run((context,), (), model, dtype.value, threads, seed, tiny, texts, str(_device(device)))
    run(told, share, max_kl, windows, score, steps)


@app.command()
def stages() -> None:
    """The catalogue of stages and scores, those of installed plugins included."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .. import registry

    table = Table("name", "class", "kind", "saves", "source", "what it is")
    for name in registry.stage_names():
        table.add_row(*map(escape, _entry(name, "stage", registry.stage_type)))
    table.add_section()
    for name in registry.score_names():
        table.add_row(*map(escape, _entry(name, "score", registry.score_type)))
    # a pipe is read by programs, and by people who can scroll: nothing is folded there
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    typer.echo(f"A spec names stages and their settings: {EXAMPLE!r}, for --stack and KVStack.from_spec.")
    for sentence in registry.shadowed():
        typer.echo(f"warning: {sentence}", err=True)


@app.command()
def new_stage(
    name: Annotated[str, typer.Argument(help="The stage's name in specs: a word in lower case.")],
    kind: Annotated[Kind, typer.Option(help="What it does: transform layers, encode numbers, or score tokens.")],
    out: Annotated[Path | None, typer.Option(help="The folder to make; kvstack-NAME if not given.")] = None,
) -> None:
    """Write a plugin to begin from: a package with one small stage that works, its tests and its entry point."""
    from .new_stage import write

    folder = write(name, kind.value, out)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        typer.echo(path)
    typer.echo(f"Next: pip install -e '{folder}[test]' && pytest {folder}")


def _entry(name: str, kind: str, find: Callable[[str], type[Settings]]) -> list[str]:
    """A row of the catalogue; a plugin that cannot be loaded has its error there."""
    try:
        cls = find(name)
        told = (getattr(cls, what, default) for what, default in (("kind", kind), ("saves", ""), ("source", "")))
        return [name, cls.__qualname__, *map(str, told), _first_sentence(cls)]
    except KVStackError as error:
        return [name, "", kind, "", "", f"error: {error}"]
    except Exception as error:  # what a plugin says of itself may raise anything
        return [name, "", kind, "", "", f"error: the class cannot be described: {type(error).__name__}."]


def _first_sentence(cls: type[Settings]) -> str:
    paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0]
