"""The caches that are compared at equal bytes, from a half of the dense bytes down; `quality.run` measures them."""

from __future__ import annotations

__all__ = ["CONTEXTS", "STACKS"]

CONTEXTS = (4096,)
STACKS = (
    "nothing",
    "evict:0.2,score=random",
    # a half
    "evict:0.48,score=kvzap(window=32),budgets=heads",
    "commonkv:0.9+quant:8",
    # a quarter
    "commonkv:0.9+quant:4",
    # a tenth and less
    "quant:4+evict:0.2,score=kvzap(window=32),budgets=heads",
    "quant:2+evict:0.5",
    "commonkv:0.65+quant:2",
    "commonkv:0.35+quant:2",
    "commonkv:0.35,layers=10+quant:2",
    "commonkv+quant:2+evict:0.5",
    "commonkv:0.12+quant:2",
    "commonkv:0.12,layers=10+quant:2",
    "commonkv+quant:2+evict:0.2@window=16",
    *(f"commonkv:{keep},layers=10+quant:2+tiers" for keep in (0.7, 0.35, 0.11)),
    # peers, from a half down
    "hqq:4,group=16",
    "hqq:4",
    "hqq:2,group=16",
    "hqq:2",
    "quanto:4",
    "quanto:2",
    "turboquant:4",
    "turboquant:2",
    *(f"kvpress:{press},keep={keep}" for keep in (0.5, 0.25, 0.1, 0.05, 0.02) for press in ("snapkv", "expected")),
    "kvpress:kvzip,keep=0.5",
    "kvpress:kvzip,keep=0.25",
    "kvpress:kvzip,keep=0.1",
    "kvpress:keydiff,keep=0.25",
    "kvpress:tova,keep=0.25",
    "kvpress:streaming,keep=0.25",
)
