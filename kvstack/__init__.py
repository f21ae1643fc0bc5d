"""kvstack: a transformers KV cache that is a pipeline of compressing stages.

from kvstack import Evict, KVStack, Quant
out = model.generate(**inputs, past_key_values=KVStack([Quant(2), Evict(0.2)]))
"""

from .cache import KVStack
from .calibration.calibrate import calibrate
from .calibration.calibration import Calibration
from .calibration.sensitivity import sensitivity
from .encode import Quant
from .errors import BindError, CalibrationError, KVStackError, SpecError, StageError, UseError
from .packed import Packed
from .report import Report
from .select import H2O, TOVA, Evict, ExpectedAttention, KeyDiff, KNorm, Random, SnapKV, Streaming
from .stage import Encode, Score, Select, Stage, Transform
from .transform import CommonKV
from .types import KV, Channels, Context, Latent

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "KV",
    "TOVA",
    "BindError",
    "Calibration",
    "CalibrationError",
    "Channels",
    "CommonKV",
    "Context",
    "Encode",
    "Evict",
    "ExpectedAttention",
    "KNorm",
    "KVStack",
    "KVStackError",
    "KeyDiff",
    "Latent",
    "Packed",
    "Quant",
    "Random",
    "Report",
    "Score",
    "Select",
    "SnapKV",
    "SpecError",
    "Stage",
    "StageError",
    "Streaming",
    "Transform",
    "UseError",
    "__version__",
    "calibrate",
    "sensitivity",
]
