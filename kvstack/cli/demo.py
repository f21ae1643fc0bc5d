"""`kvstack demo`: a fact hidden in Python's own documentation, asked of a dense cache and of a stack.

Both read the same prompt and generate the same number of tokens. The dense cache's continuation is then put into the
mouth of a model that reads from the stack, so that the two distributions can be compared token by token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .. import models
from ..bench.measure.run import hardware
from ..bench.measure.sizes import held_bytes
from ..bench.show.units import mib
from ..bench.terminal import console
from ..cache import KVStack
from ..errors import KVStackError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["STACK", "Drift", "Outcome", "build_prompt", "drift", "generate", "run"]

STACK = "commonkv+quant:2+evict:0.2"
FACT = "The secret password of the wizard is elephant."
QUESTION = "What is the secret password of the wizard?"
ANSWER = "elephant"


@dataclass(frozen=True)
class Outcome:
    """The answer of one cache to the prompt."""

    tokens: Tensor
    """The continuation, (new,)."""
    logits: Tensor
    """Its logits, (new, vocabulary)."""
    text: str
    """The continuation up to where the model would have stopped."""
    first: float
    """Seconds until the first token."""
    rate: float
    """Tokens per second after the first."""
    nbytes: int
    """Bytes of the cache when all was generated."""

    @property
    def right(self) -> bool:
        return ANSWER in self.text


@dataclass(frozen=True)
class Drift:
    """The drift of the stack's next tokens from the dense cache's."""

    kl: float
    """Mean KL(dense || stack) in nats."""
    same: int
    """Tokens whose likeliest successor is the same."""
    tokens: int


@dataclass
class Clock(BaseStreamer):
    """Notes when tokens come out of `generate`; the first entry is the prompt."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


# ---- the prompt


def build_prompt(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Some `tokens` tokens of documentation with the fact in their middle, and the question."""
    before: list[str] = []
    after: list[str] = []
    used = 0
    for paragraph, size in _paragraphs(tokenizer):
        if used + size > tokens:
            break
        used += size
        (before if used <= tokens / 2 else after).append(paragraph)
    return "\n\n".join([*before, FACT, *after, QUESTION])


def _paragraphs(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
    """Paragraphs of Python's documentation, each with its number of tokens."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            yield paragraph, len(tokenizer(f"\n\n{paragraph}", add_special_tokens=False)["input_ids"])


# ---- the two caches


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Any, cache: Cache, new_tokens: int
) -> Outcome:
    """Exactly `new_tokens` tokens, greedily: the model must not stop early."""
    clock = Clock()
    stop, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        out: Any = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        model.generation_config.eos_token_id = stop
    tokens = out.sequences[0, -new_tokens:]
    asked, first, *_, last = clock.times
    return Outcome(
        tokens=tokens,
        logits=torch.cat(out.logits),
        text=_sentence(tokenizer, tokens, stop),
        first=first - asked,
        rate=(new_tokens - 1) / (last - first),
        nbytes=held_bytes(cache),
    )


def _sentence(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, stop: int | list[int] | None) -> str:
    """The text until the first of the tokens that end an answer."""
    stops = torch.tensor([] if stop is None else stop, device=tokens.device)
    ends = torch.isin(tokens, stops).nonzero().flatten().tolist()
    return str(tokenizer.decode(tokens[: ends[0] if ends else None], skip_special_tokens=True)).strip()


@torch.no_grad()
def drift(model: PreTrainedModel, inputs: Any, dense: Outcome, stack: KVStack) -> Drift:
    """Compare the logits with `stack` to those of `dense`, over its continuation after the first token."""
    # the first token comes before anything is compressed
    model(**inputs, past_key_values=stack, logits_to_keep=1)
    given = dense.tokens[None, :-1]
    steps = [model(token, past_key_values=stack).logits[:, -1] for token in given.split(1, dim=1)]
    ours, theirs = (x.float().log_softmax(-1) for x in (torch.cat(steps), dense.logits[1:]))
    kl = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    return Drift(float(kl), int(same), len(theirs))


# ---- the show


def run(model_name: str | None, spec: str, tokens: int, new_tokens: int) -> None:
    """The whole demo, printed. A stack that does not fit the model says so before anything is generated."""
    from transformers import DynamicCache

    out, busy = console(), Console(stderr=True)
    with busy.status("loading the model"):
        KVStack.from_spec(spec)
        model, tokenizer = models.load(model_name)
        stack = KVStack.from_spec(spec, model=model)
        inputs = _inputs(model, tokenizer, tokens, new_tokens)
        # or the first to be timed would pay for all that is set up once
        start = {name: x[:, :8] for name, x in inputs.items()}
        generate(model, tokenizer, start, DynamicCache(config=model.config), 3)
    length = inputs["input_ids"].shape[1]
    _introduce(out, model_name or models.DEFAULT_MODEL, length)
    with busy.status("the dense cache reads the prompt and answers"):
        dense = generate(model, tokenizer, inputs, DynamicCache(config=model.config), new_tokens)
    _print_answer(out, "dense cache", dense)
    with busy.status(f"{spec} reads the prompt and answers"):
        compressed = generate(model, tokenizer, inputs, stack, new_tokens)
    _print_answer(out, spec, compressed)
    out.print(_comparison(spec, dense, compressed), stack.report())
    stack.reset()
    with busy.status("comparing token by token"):
        apart = drift(model, inputs, dense, stack)
    out.print(
        f"Fed the dense cache's continuation, the stack is {apart.kl:.3g} nats of KL(dense || stack) away on average; "
        f"its likeliest next token is the same for {apart.same} of {apart.tokens} tokens.",
        highlight=False,
    )


def _inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, new_tokens: int) -> Any:
    prompt = build_prompt(tokenizer, tokens)
    chat = bool(tokenizer.chat_template)
    inputs = models.encode(tokenizer, prompt if chat else f"{prompt}\n\nAnswer:", chat).to(model.device)
    total = inputs["input_ids"].shape[1] + new_tokens
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and total > limit:
        raise KVStackError(
            f"{total:,} tokens are more than the {limit:,} this model was made for. Use a smaller --tokens."
        )
    return inputs


def _introduce(out: Console, model: str, length: int) -> None:
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    out.print(
        Text.assemble(
            (model, "bold"),
            f" in float32 on {hardware()}, {threads}.\n",
            f"The prompt: {length:,} tokens of Python's documentation, and somewhere in the middle:\n",
            (f"  {FACT}\n", "cyan"),
            "The question at its end:\n",
            (f"  {QUESTION}\n", "cyan"),
        )
    )


def _print_answer(out: Console, label: str, outcome: Outcome) -> None:
    verdict = ("  right", "bold green") if outcome.right else (f"  WRONG, it does not contain {ANSWER}", "bold red")
    out.print(Text.assemble((label, "bold"), " answers:", verdict, f"\n  {outcome.text}\n"))


def _comparison(spec: str, dense: Outcome, stack: Outcome) -> Table:
    table = Table("", title_justify="left")
    for label in ("dense cache", spec):
        table.add_column(label, justify="right")
    both = (dense, stack)
    table.add_row("contains the fact", *("yes" if x.right else "no" for x in both))
    table.add_row("time to first token", *(f"{x.first:.2f} s" for x in both))
    table.add_row("tokens per second", *(f"{x.rate:.1f}" for x in both))
    table.add_row("bytes held", *(f"{mib(x.nbytes)} MiB" for x in both))
    table.add_row("of the dense bytes", *(f"{x.nbytes / dense.nbytes:.1%}" for x in both))
    return table
