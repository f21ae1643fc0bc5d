"""kvstack's codecs as a serializer of LMCache (https://github.com/LMCache/LMCache).

codec.py     a chunk of keys and values <-> bytes; knows kvstack, not LMCache
serde.py     LMCache's interface around it
__main__.py  LMCache's own command, with the serializer registered
measure.py   sizes and drift, compared with LMCache's own serializers

    import kvstack_lmcache
    kvstack_lmcache.register()        # then {"serde": {"type": "kvstack", "stack": "quant:4", "head_dim": 128}}
"""

from .codec import ChunkCodec, ChunkError

__all__ = ["ChunkCodec", "ChunkError", "register"]


def register() -> None:
    """Give LMCache the serializer `kvstack`. A second call changes nothing.

    Raises:
        ImportError: there is no lmcache, or one without `lmcache.v1.distributed.serde`.
    """
    from lmcache.v1.distributed.serde import get_registered_serde_types, register_serde_factory

    from .serde import NAME, create

    if NAME not in get_registered_serde_types():
        register_serde_factory(NAME, create)
