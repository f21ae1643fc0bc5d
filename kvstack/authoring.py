"""The names that authors of stages may import, next to kvstack's public ones. Everything else is internal and may move.

contracts     Transform, BoundTransform, Codec, Share, Encode, Encoder, Reader, Score, Ranking, Settings, check,
              as_path
abilities     NeedsHidden, ReadsDirectly, ReadsLinearly, FitsText, RefitsText, Budgeted
values        KV, Latent, Channels, Context, Packed, Workspace, take_tokens, check_places, wide, fitting, saturated
codes         pack, unpack, ChannelCodes, spread, nearly_best and the figures behind them
the model     LayerGroups, cached_shapes, device_of, expands, fingerprint, kv_fingerprint, is_of, at_rest, observe,
              heads_of
calibration   calibrated_groups, calibration_for, GroupAxes, Basis, PackedAxes, by_basis, flat, load_or_make,
              windows_of, tokenizer_of, write_bytes
"""

from __future__ import annotations

from .abilities import (
    Allotment,
    Budgeted,
    FitsText,
    Linear,
    NeedsHidden,
    PackedAxes,
    ReadsDirectly,
    ReadsLinearly,
    RefitsText,
)
from .calibration.axes import Basis, by_basis, flat
from .calibration.calibrate import calibration_for
from .calibration.calibration import Calibration, GroupAxes
from .calibration.keep import load_or_make
from .calibration.plan import calibrated_groups
from .calibration.windows import sample_ids, tokenizer_of, windows_of
from .checks import check_places
from .encode.bits import pack, unpack
from .encode.channel_codes import GAIN_BITS, ChannelCodes
from .errors import BindError, CalibrationError, KVStackError, SpecError, StageError, UseError
from .files import write_bytes
from .floats import fitting, saturated, wide
from .model.attention import device_of, expands
from .model.fingerprint import fingerprint, is_of, kv_fingerprint
from .model.layers import LayerGroups
from .model.probing import at_rest, cached_shapes, observe
from .model.ranks import heads_of
from .packed import Packed, storage_bytes
from .select.attention import attention_received
from .stage import (
    BoundTransform,
    ChannelEncoder,
    Codec,
    Encode,
    Encoder,
    Ranking,
    Reader,
    Score,
    Settings,
    Share,
    Stage,
    Transform,
    as_path,
    check,
)
from .types import KV, Channels, Context, Latent, take_tokens
from .waterfilling import DISTORTION, STEPS, nearly_best, spread
from .workspace import Workspace

__all__ = [
    "DISTORTION",
    "GAIN_BITS",
    "KV",
    "STEPS",
    "Allotment",
    "Basis",
    "BindError",
    "BoundTransform",
    "Budgeted",
    "Calibration",
    "CalibrationError",
    "ChannelCodes",
    "ChannelEncoder",
    "Channels",
    "Codec",
    "Context",
    "Encode",
    "Encoder",
    "FitsText",
    "GroupAxes",
    "KVStackError",
    "Latent",
    "LayerGroups",
    "Linear",
    "NeedsHidden",
    "Packed",
    "PackedAxes",
    "Ranking",
    "Reader",
    "ReadsDirectly",
    "ReadsLinearly",
    "RefitsText",
    "Score",
    "Settings",
    "Share",
    "SpecError",
    "Stage",
    "StageError",
    "Transform",
    "UseError",
    "Workspace",
    "as_path",
    "at_rest",
    "attention_received",
    "by_basis",
    "cached_shapes",
    "calibrated_groups",
    "calibration_for",
    "check",
    "check_places",
    "device_of",
    "expands",
    "fingerprint",
    "fitting",
    "flat",
    "heads_of",
    "is_of",
    "kv_fingerprint",
    "load_or_make",
    "nearly_best",
    "observe",
    "pack",
    "sample_ids",
    "saturated",
    "spread",
    "storage_bytes",
    "take_tokens",
    "tokenizer_of",
    "unpack",
    "wide",
    "windows_of",
    "write_bytes",
]
