"""Eviction: one stage that cuts to a budget, and the scores it can cut by."""

from .evict import Evict
from .expected import ExpectedAttention
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import KNorm
from .random import Random
from .snapkv import SnapKV
from .streaming import Streaming
from .tova import TOVA

__all__ = ["H2O", "TOVA", "Evict", "ExpectedAttention", "KNorm", "KeyDiff", "Random", "SnapKV", "Streaming"]
