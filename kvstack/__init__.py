"""kvstack: a transformers KV cache that is a pipeline of compressing stages.

from kvstack import Evict, KVStack, Quant
out = model.generate(**inputs, past_key_values=KVStack([Quant(2), Evict(0.2)]))

Importing it is cheap: torch, transformers and the stages are imported when you use a name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from .cache import KVStack
    from .calibration.calibrate import calibrate
    from .calibration.calibration import Calibration
    from .calibration.sensitivity import sensitivity
    from .encode.quant import Quant
    from .errors import BindError, CalibrationError, KVStackError, SpecError, StageError, UseError
    from .packed import Packed
    from .report import Report
    from .select.evict import Evict
    from .select.expected import ExpectedAttention
    from .select.h2o import H2O
    from .select.keydiff import KeyDiff
    from .select.knorm import KNorm
    from .select.random import Random
    from .select.snapkv import SnapKV
    from .select.streaming import Streaming
    from .select.tova import TOVA
    from .stage import Encode, Score, Select, Stage, Transform
    from .transform.commonkv import CommonKV
    from .types import KV, Channels, Context, Latent
else:
    _HOMES = {
        "cache": ("KVStack",),
        "calibration.calibrate": ("calibrate",),
        "calibration.calibration": ("Calibration",),
        "calibration.sensitivity": ("sensitivity",),
        "encode.quant": ("Quant",),
        "errors": ("BindError", "CalibrationError", "KVStackError", "SpecError", "StageError", "UseError"),
        "packed": ("Packed",),
        "report": ("Report",),
        "select.evict": ("Evict",),
        "select.expected": ("ExpectedAttention",),
        "select.h2o": ("H2O",),
        "select.keydiff": ("KeyDiff",),
        "select.knorm": ("KNorm",),
        "select.random": ("Random",),
        "select.snapkv": ("SnapKV",),
        "select.streaming": ("Streaming",),
        "select.tova": ("TOVA",),
        "stage": ("Encode", "Score", "Select", "Stage", "Transform"),
        "transform.commonkv": ("CommonKV",),
        "types": ("KV", "Channels", "Context", "Latent"),
    }
    _MODULES = ("errors", "registry", "stage", "types")
    """Modules that you can name after `import kvstack` alone."""

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        for module, names in _HOMES.items():
            if name in names:
                # kept here, so that this function is asked once for each name
                value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
