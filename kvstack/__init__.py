"""kvstack: a transformers KV cache that is a pipeline of compressing stages.

from kvstack import Evict, KVStack, Quant
out = model.generate(**inputs, past_key_values=KVStack([Quant(2), Evict(0.2)]))

Importing it is cheap: torch, transformers and the stages are imported when you use a name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

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
    "KVStackWarning",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "Latent",
    "LookAhead",
    "Packed",
    "Quant",
    "Random",
    "Report",
    "Score",
    "Share",
    "SnapKV",
    "SpecError",
    "Stage",
    "StageError",
    "Streaming",
    "Tiers",
    "Transform",
    "TriAttention",
    "UseError",
    "WriteError",
    "__version__",
    "calibrate",
    "calibration_plan",
    "for_budget",
    "nbytes_of",
    "sensitivity",
]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from .budgets import for_budget
    from .cache import KVStack, nbytes_of
    from .calibration.calibrate import calibrate
    from .calibration.calibration import Calibration
    from .calibration.plan import calibration_plan
    from .calibration.sensitivity import sensitivity
    from .encode.quant import Quant
    from .errors import (
        BindError,
        CalibrationError,
        KVStackError,
        KVStackWarning,
        SpecError,
        StageError,
        UseError,
        WriteError,
    )
    from .packed import Packed
    from .report import Report
    from .select.evict import Evict
    from .select.expected import ExpectedAttention
    from .select.h2o import H2O
    from .select.keydiff import KeyDiff
    from .select.knorm import KNorm
    from .select.kvzap import KVzap
    from .select.kvzip import KVzip
    from .select.lookahead import LookAhead
    from .select.random import Random
    from .select.snapkv import SnapKV
    from .select.streaming import Streaming
    from .select.tiers import Tiers
    from .select.tova import TOVA
    from .select.triattention import TriAttention
    from .stage import Encode, Score, Share, Stage, Transform
    from .transform.commonkv import CommonKV
    from .types import KV, Channels, Context, Latent
else:
    _HOMES = {
        "budgets": ("for_budget",),
        "cache": ("KVStack", "nbytes_of"),
        "calibration.calibrate": ("calibrate",),
        "calibration.calibration": ("Calibration",),
        "calibration.plan": ("calibration_plan",),
        "calibration.sensitivity": ("sensitivity",),
        "errors": (
            "BindError",
            "CalibrationError",
            "KVStackError",
            "KVStackWarning",
            "SpecError",
            "StageError",
            "UseError",
            "WriteError",
        ),
        "packed": ("Packed",),
        "report": ("Report",),
        "stage": ("Encode", "Score", "Share", "Stage", "Transform"),
        "types": ("KV", "Channels", "Context", "Latent"),
    }
    """Modules and the public names in them; stages and scores are looked up in the registry."""
    _MODULES = ("errors", "registry", "spec", "stage", "types")
    """Modules that you can name after `import kvstack` alone."""

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        module = _module_with(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # kept, so that Python asks here once for each name
        value = globals()[name] = getattr(import_module(module), name)
        return value

    def _module_with(name: str) -> str | None:
        for module, names in _HOMES.items():
            if name in names:
                return f"{__name__}.{module}"
        own = import_module(f"{__name__}.registry").BUILT_IN.values()
        return next((entry.module for family in own for entry in family.values() if entry.attr == name), None)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
