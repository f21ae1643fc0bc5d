"""What kvstack is compared with: other people's caches, each behind the same small interface.

    dense                            transformers' DynamicCache
    hqq:4  hqq:2,group=32            transformers' QuantizedCache, hqq backend: 2, 4 or 8 bits
    quanto:4  quanto:2,group=32      the same, quanto backend: 2 or 4 bits
    turboquant:4  turboquant:2,group=32   tiny-turboquant's TinyKVCache: 2, 3, 4 or 8 bits
    kvpress:snapkv,keep=0.2          a press of kvpress, in a process and an environment of its own

The first four are caches, which `Peer.make` builds. kvpress needs an older transformers than kvstack: `Peer.press`
says what to ask of `kvpress.KvPress`, which runs the model elsewhere and hands back what it found.
"""

from __future__ import annotations

from .caches import plain
from .kvpress import KvPress, Press, find
from .spec import NAMES, Peer, parse, settings_in

__all__ = ["NAMES", "KvPress", "Peer", "Press", "find", "parse", "plain", "settings_in"]
