"""Made-up rows of the kinds the benchmarks make, for tests of pictures and pages. No figure in here was measured."""

import random

from kvstack.bench.show import pictures
from kvstack.bench.show.front import pareto

STACKS = [
    "quant:4",
    "quant:2",
    "evict:0.2",
    "commonkv",
    "quant:2+evict:0.2",
    "commonkv+quant:4",
    "commonkv+quant:2+evict:0.2",
]
PEERS = [
    ("QuantizedCache", "hqq:4"),
    ("QuantizedCache", "hqq:2"),
    ("kvpress", "snapkv 0.5"),
    ("kvpress", 'knorm <0.5> & "x"'),
]
CACHES = [
    ("dense", "dense", "dense"),
    *(("kvstack", "kvstack", label) for label in STACKS),
    *(("peer", family, label) for family, label in PEERS),
    ("control", "control", "evict at random"),
]


def quality(contexts=(1024, 4096)):
    rows, chance = [], random.Random(0)
    for context in contexts:
        for number, (kind, family, cache) in enumerate(CACHES):
            share = 1.0 if kind == "dense" else 0.6 * 0.75**number
            kl = 0.0 if kind == "dense" else 0.002 / share**1.5 * chance.uniform(0.5, 3)
            row = {"context": context, "cache": cache, "kind": kind, "family": family, "share": share}
            row |= {"kl": kl, "kl_low": kl * 0.8, "kl_high": kl * 1.3, "kl_q99": 9 * kl, "top1": 0.9, "nll": 2.1}
            row |= {"nll_dense": 2.0, "scored": 500, "domains": {"prose": kl}, "simulated": family == "kvpress"}
            rows.append(row)
    return rows


def cells(contexts=(1024, 4096, 8192), tasks=("single",)):
    chance = random.Random(1)
    return [
        {"context": context, "task": task, "mode": "agnostic", "cache": cache, "depth": depth, "samples": 10}
        | {"score": 1.0 if kind == "dense" else chance.randint(0, 10) / 10}
        for task in tasks
        for kind, _, cache in CACHES[:7]
        for context in contexts
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        if (cache, context) != ("commonkv", 8192)
    ]


def memory(contexts=(1024, 8192)):
    rows = []
    for context in contexts:
        dense = context * 23_040 * 2
        for number, (kind, _, cache) in enumerate(CACHES[:9]):
            nbytes = dense if kind == "dense" else int(dense * 0.7**number)
            parts = (
                []
                if kind != "kvstack"
                else [
                    {"payer": "stack", "part": "raw", "nbytes": nbytes // 4},
                    {"payer": "Quant(bits=2)", "part": "keys: codes", "nbytes": nbytes // 2},
                    {"payer": "CommonKV(layers=4)", "part": "weight", "nbytes": nbytes // 4},
                ]
            )
            row = {"context": context, "cache": cache, "kind": kind, "nbytes_prefill": int(nbytes * 1.1)}
            row |= {"nbytes": nbytes, "dense_nbytes": dense, "parts": parts}
            row |= {"peak_prefill": dense * 4 + nbytes, "peak_decode": None if kind == "peer" else dense + nbytes}
            rows.append(row)
    return rows


def decode(contexts=(1024, 4096, 16384)):
    return [
        {"context": context, "cache": cache, "kind": kind, "ms_mean": 40.0, "ttft_ms": 900.0, "share": 0.5}
        | {"ms_typical": 30 + context / 400 * 0.85**number, "speed_typical": 1.1, "speed_low": 1.0, "speed_high": 1.2}
        for context in contexts
        for number, (kind, _, cache) in enumerate(CACHES)
    ]


def matrix(contexts=(4096,)):
    chance, rows = random.Random(2), []
    for context in contexts:
        here = []
        for i, transform in enumerate(("none", "commonkv", "xkv")):
            for j, encode in enumerate(("none", "quant:4", "quant:2", "nf4", "turbo:3")):
                for k, evict in enumerate(("none", "evict:0.5", "evict:0.2")):
                    share = 0.9 * (0.6**i) * (0.5**j if j < 3 else 0.22) * (1, 0.5, 0.2)[k]
                    kl = 0 if i + j + k == 0 else 0.001 * chance.uniform(1, 6) * 3**i * 4**j * 5**k
                    row = {"context": context, "transform": transform, "encode": encode, "evict": evict}
                    row |= {"cache": "+".join(n for n in (transform, encode, evict) if n != "none") or "empty"}
                    row |= {
                        "share": share,
                        "kl": kl,
                        "kl_low": kl * 0.9,
                        "kl_high": kl * 1.2,
                        "top1": 0.8,
                        "speed": None,
                    }
                    here.append(row)
        for row, best in zip(here, pareto([(row["share"], row["kl"]) for row in here]), strict=True):
            rows.append(row | {"pareto": best})
    return rows


DRAWN = {
    "quality": (pictures.quality, quality),
    "matrix": (pictures.matrix, matrix),
    "needles": (pictures.needles, cells),
    "memory": (pictures.memory, memory),
    "growth": (pictures.growth, memory),
    "decode": (pictures.decode, decode),
}
"""Each picture: what draws it, and rows for it."""
