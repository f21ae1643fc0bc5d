"""One prompt, answered from a dense cache and from a stack, token by token.

dense    answers the prompt
drift    a stack that is fed the tokens of the dense answer: its distributions are compared with the dense ones
own      the stack's own answer; it is the same cache as `drift` until the two answers part
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import models
from ..cache import KVStack
from ..errors import KVStackError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["compare"]


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, spec: str, tokens: int
) -> Generator[dict[str, Any], None, None]:
    """Compare the two answers, greedily.

    Args:
        prompt: a user's turn, if the model has a chat template.
        spec: the stack, as `KVStack.from_spec` takes it.
        tokens: new tokens, at most.

    Yields:
        First one event for the prompt: `line` (Python that builds the stack), `read` (tokens), `parts` (bytes by
        payer). Then one event for each token: `dense` and `stack` (the answers so far), `kl` (nats, of this token; None
        if the dense answer is over), `bytes` and `dense_bytes` (of the two caches).

    Raises:
        KVStackError: the stack does not fit the model, or the prompt is empty or too long.
    """
    from transformers import DynamicCache

    stack = KVStack.from_spec(spec, model=model)
    try:
        inputs = _encoded(model, tokenizer, prompt, tokens)
        with torch.no_grad():
            dense = DynamicCache(config=model.config)
            expected, found = (_next(model, inputs, cache) for cache in (dense, stack))
            yield {"line": repr(stack), "read": inputs.shape[1], "parts": _parts(stack), **_bytes(stack)}
            yield from _answers(model, tokenizer, (dense, expected), (stack, found), tokens)
    finally:
        stack.unbind()


def _encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> Tensor:
    if not prompt.strip():
        raise KVStackError("the prompt is empty. Write at least one word.")
    ids: Tensor = models.encode(tokenizer, prompt)["input_ids"].to(model.device)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and ids.shape[1] + tokens > longest:
        raise KVStackError(
            f"the prompt has {ids.shape[1]:,} tokens, and the model reads {longest:,}, the {tokens:,} of the answer "
            "included. Use a shorter prompt."
        )
    return ids


def _next(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Log probabilities (vocabulary,) of the token behind `ids` (1, T)."""
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1].float().log_softmax(-1)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dense: tuple[Any, Tensor],
    stack: tuple[KVStack, Tensor],
    tokens: int,
) -> Generator[dict[str, Any], None, None]:
    cache, expected = dense
    drift, found = stack
    own, mine = drift, found
    ends, answer, answered = _ends(model), list[int](), list[int]()
    over = own_over = False
    try:
        for _ in range(tokens):
            kl = float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum"))
            one, other = int(expected.argmax()), int(mine.argmax())
            answer += [] if over else [one]
            answered += [] if own_over else [other]
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (answer, answered)]
            yield {
                "dense": texts[0],
                "stack": texts[1],
                "kl": None if over or not math.isfinite(kl) else kl,
                **_bytes(own),
            }
            over, own_over = answer[-1] in ends, answered[-1] in ends
            if over and own_over:
                return
            if own is drift and one != other:
                own = copy.deepcopy(drift)
            if not over:
                fed = torch.tensor([[one]], device=expected.device)
                expected, found = _next(model, fed, cache), _next(model, fed, drift)
            if own is drift:
                mine = found
            elif not own_over:
                mine = _next(model, torch.tensor([[other]], device=mine.device), own)
    finally:
        if own is not drift:
            own.unbind()


def _ends(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _bytes(stack: KVStack) -> dict[str, int]:
    return {"bytes": stack.nbytes, "dense_bytes": stack.dense_nbytes}


def _parts(stack: KVStack) -> list[list[Any]]:
    """[payer, bytes], the most first."""
    sums: dict[str, int] = {}
    for part in stack.report().parts:
        sums[part.payer] = sums.get(part.payer, 0) + part.nbytes
    return sorted(([payer, nbytes] for payer, nbytes in sums.items()), key=lambda entry: -entry[1])
