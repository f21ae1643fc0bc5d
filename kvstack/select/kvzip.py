"""KVzip: a token matters if the model looks at it to repeat the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import Score
from ..types import KV, Context
from .attention import attention_received

__all__ = ["KVzip"]

RECEIVED = "received"


@dataclass(frozen=True, repr=False)
class KVzip(Score):
    """The largest attention that a token gets while the model repeats the text.

    The model reads every prompt and every later turn a second time, chunk by chunk, before the stack compresses it. The
    score is a maximum over all queries of that second reading and over the query heads of a kv head. It stays with the
    token, two bytes for each kv head. Tokens that were decoded are not read again: their score is the largest attention
    from the newest 8 queries.

    Source: Kim et al. 2025, arXiv 2505.23416. Differs from the paper: the text is repeated without an instruction, the
    softmax is over all tokens held and not over one chunk, and equally many tokens stay in every head.
    """

    name = "kvzip"
    source = "arXiv 2505.23416"
    needs_rope = False
    queries = 8
    rereads = True

    def track(self, kv: KV, context: Context) -> Mapping[str, Tensor]:
        received = _received(kv, context)
        before = context.memory.get(RECEIVED)
        return {RECEIVED: received if before is None else torch.maximum(received, before)}

    def score(self, kv: KV, context: Context) -> Tensor:
        remembered = context.memory.get(RECEIVED)
        if context.queries is None:
            return kv.keys.new_zeros(kv.keys.shape[:3]) if remembered is None else remembered
        received = _received(kv, context)
        return received if remembered is None else torch.maximum(received, remembered)


def _received(kv: KV, context: Context) -> Tensor:
    """(B, H, T) largest attention from the queries given, in halves: they tell tokens apart well enough."""
    assert context.queries is not None
    return attention_received(context.queries, kv.keys, context.scaling, "max").amax(2).half()
