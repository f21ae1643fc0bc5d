"""A model type for EleutherAI's lm-evaluation-harness: a transformers model that reads from a `KVStack`.

    python -m kvstack.lm_eval --model kvstack --model_args pretrained=FOLDER,stack=quant:4+evict:0.5 --tasks TASKS

The harness (0.4.13) finds models in its own list and has no entry points, so somebody must import this module before
its command looks the name up; that is all `python -m kvstack.lm_eval` does. In Python, importing it registers
`kvstack`, and `KVStackLM(...)` is a model for `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..cache import KVStack
from ..errors import KVStackError, UseError
from ..spec import parse

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise KVStackError(
        f"evaluating with lm-evaluation-harness needs {error.name}, which is not installed. "
        "Run: pip install 'kvstack[lm-eval]'"
    ) from error

__all__ = ["KVStackLM"]

DENSE = "dense"
CHUNK = 128


@dataclass(frozen=True)
class Contexts:
    """A batch of contexts that a stack has read, left-padded."""

    stack: KVStack
    mask: Tensor  # (B, T), 0 for padding
    logits: Tensor  # (B, 1, vocabulary), what follows each context

    def again(self, rows: Tensor) -> KVStack:
        """A stack of its own that holds the contexts `rows`, which may repeat."""
        stack = copy.deepcopy(self.stack)
        stack.batch_select_indices(rows)
        return stack


@register_model("kvstack")
class KVStackLM(HFLM):
    """The harness's `hf` model, every score and every generation of it read from a compressed cache.

    A log likelihood prefills the context into a new stack, in one forward, which compresses it. The first token of the
    continuation is scored by the logits of the last token of the context, the others by feeding the true tokens,
    `chunk` at a time: each reads what came before its chunk compressed, and its own chunk exactly. Requests with the
    same context share its prefill. A rolling log likelihood is the same with a context of one token, so a document is
    read, and compressed, chunk by chunk. A generation is `model.generate` with a new stack for each batch.

    A log likelihood does not depend on `batch_size`: continuations of more than one chunk are fed one at a time.

    Args:
        pretrained: folder, name or model, as `hf` takes it.
        stack: a spec such as `"quant:4+evict:0.5"`, the dict of `KVStack.to_dict`, or `"dense"` (the default) for no
            compression, which gives the numbers of `hf` up to rounding.
        sinks, window, block, fused: settings of the stack; its own defaults if not given.
        chunk: tokens of a continuation that are fed in one forward (default 128).
        **kwargs: everything else that `hf` takes.

    Raises:
        KVStackError: the stack cannot be built or does not fit the model, or `batch_size` is `"auto"`.
    """

    def __init__(
        self,
        pretrained: Any,
        stack: str | Mapping[str, Any] = DENSE,
        *,
        sinks: int | None = None,
        window: int | None = None,
        block: int | None = None,
        fused: bool | None = None,
        chunk: int = CHUNK,
        **kwargs: Any,
    ) -> None:
        if not isinstance(chunk, int) or chunk < 1:
            raise KVStackError(f"chunk={chunk!r}: chunk is a number of tokens, 1 or more.")
        if str(kwargs.get("batch_size")).startswith("auto"):
            raise KVStackError("batch_size='auto' is tried out with a dense cache, which says nothing. Give a number.")
        given = {"sinks": sinks, "window": window, "block": block, "fused": fused}
        self._stages, settings = parse("" if stack == DENSE else stack)
        self._settings = settings | {name: value for name, value in given.items() if value is not None}
        KVStack(self._stages, **self._settings)  # what is wrong with it is said before the model is loaded
        super().__init__(pretrained, **kwargs)
        self._chunk = chunk
        self._takes = set(inspect.signature(self.model.forward).parameters)
        self._held = self._dense = 0
        self._name = repr(self._stack())

    def _stack(self) -> KVStack:
        return KVStack(self._stages, model=self.model, **self._settings)

    def _count(self, stack: KVStack) -> None:
        self._held += stack.nbytes
        self._dense += stack.dense_nbytes

    def get_model_info(self) -> dict[str, Any]:
        """Return the harness's notes on the model, with the stack, and the share of the dense cache's bytes that it
        held, over all forwards of log likelihoods and the ends of all generations."""
        share = self._held / self._dense if self._dense else None
        return super().get_model_info() | {"kvstack": self._name, "kvstack_share_of_dense_bytes": share}

    # ---- generations

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        stack = self._stack()
        out: Tensor = super()._model_generate(context, max_length, stop, past_key_values=stack, **generation_kwargs)
        self._count(stack)
        return out

    # ---- log likelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log likelihood, whether greedy decoding gives it) of each (cache key, context, continuation)."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            shared.setdefault(self._fit(context, continuation), []).append(i)
        likelihoods: dict[int, tuple[float, bool]] = {}
        size = override_bs or self.batch_size
        # texts of like length are batched together: little padding
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="log likelihoods") as bar:
            for contexts in _batches(sorted(shared, key=len, reverse=True), size):
                read = self._prefill(contexts)
                asked = [(row, i) for row, context in enumerate(contexts) for i in shared[context]]
                asked.sort(key=lambda pair: len(requests[pair[1]][2]), reverse=True)
                # rows of a batch that is compressed again drop as many sealed tokens as each other: such texts go alone
                alone = [pair for pair in asked if len(requests[pair[1]][2]) - 1 > self._chunk]
                for few in (*_batches(alone, 1), *_batches(asked[len(alone) :], size)):
                    rows = torch.tensor([row for row, _ in few], device=self.device)
                    answers = self._score(read, rows, [requests[i][2] for _, i in few])
                    for (_, i), answer in zip(few, answers, strict=True):
                        likelihoods[i] = answer
                        if requests[i][0] is not None:  # a rolling window has no key
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update(len(few))
        return [likelihoods[i] for i in range(len(requests))]

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """The end of the context that fits before the continuation, as `hf` cuts it; the last token is never fed."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UseError(f"a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}.")
        return tuple(context[-room:])

    def _prefill(self, contexts: Sequence[Sequence[int]]) -> Contexts:
        longest = max(map(len, contexts))
        ids = torch.tensor([[0] * (longest - len(c)) + list(c) for c in contexts], device=self.device)
        lengths = torch.tensor([len(c) for c in contexts], device=self.device)
        mask = (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
        stack = self._stack()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._feed(stack, ids, mask, positions, logits_to_keep=1)
        return Contexts(stack, mask, logits[:, -1:])

    def _score(
        self, read: Contexts, rows: Tensor, continuations: Sequence[Sequence[int]]
    ) -> Iterator[tuple[float, bool]]:
        """Score each continuation after its context, row `rows[i]` of `read`."""
        lengths = torch.tensor([len(c) for c in continuations], device=self.device)[:, None]
        longest = int(lengths.max())
        # what stands behind the end of a shorter one cannot change its scores
        ids = torch.tensor([[*c, *[0] * (longest - len(c))] for c in continuations], device=self.device)
        total = torch.zeros(len(rows), device=self.device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        for start, logits in self._logits(read, rows, ids, lengths):
            end = start + logits.shape[1]
            true, real = ids[:, start:end], torch.arange(start, end, device=self.device) < lengths
            scores = logits.log_softmax(-1, dtype=self.softmax_dtype).gather(-1, true.unsqueeze(-1)).squeeze(-1)
            total += scores.float().masked_fill(~real, 0).sum(-1)
            greedy &= ((logits.argmax(-1) == true) | ~real).all(-1)
        return zip(total.tolist(), greedy.tolist(), strict=True)

    def _logits(self, read: Contexts, rows: Tensor, ids: Tensor, lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Feed the true tokens `ids` (B, T), of which `lengths` (B, 1) count: a place in the continuation, and the
        logits (B, new, vocabulary) that say what stands there and behind it."""
        yield 0, read.logits[rows]
        fed = ids.shape[1] - 1  # nothing is asked about what follows the last token
        if not fed:
            return
        stack, before = read.again(rows), read.mask[rows]
        mask = torch.cat([before, torch.ones_like(ids)], dim=-1)
        first = before.sum(-1, keepdim=True)
        # they stop at the end of each text, so that what stands behind it asks for none the model does not have
        positions = torch.minimum(first + torch.arange(fed, device=self.device), first + lengths - 1)
        for start in range(0, fed, self._chunk):
            end = min(start + self._chunk, fed)
            seen = mask[:, : before.shape[1] + end]
            yield start + 1, self._feed(stack, ids[:, start:end], seen, positions[:, start:end])

    def _feed(self, stack: KVStack, ids: Tensor, mask: Tensor, positions: Tensor, **wishes: Any) -> Tensor:
        """Logits (B, new, vocabulary) after new tokens (B, new)."""
        wishes = {name: x for name, x in {"position_ids": positions, **wishes}.items() if name in self._takes}
        kind = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            out = self.model(input_ids=ids, attention_mask=mask, past_key_values=stack, use_cache=True, **wishes)
        self._count(stack)
        logits: Tensor = out.logits
        return logits


def _batches(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (things[i : i + size] for i in range(0, len(things), size))
