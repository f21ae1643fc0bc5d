"""Files of tensors that are whole or refused: safetensors with a checksum, renamed into place when complete."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import KVStackError

__all__ = ["read_tensors", "write_bytes", "write_tensors"]

CHECKSUM = "checksum"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, complete or not at all."""
    from safetensors.torch import save

    write_bytes(path, save(dict(tensors), {**metadata, CHECKSUM: _checksum(tensors, metadata)}))


def write_bytes(path: Path, data: bytes) -> None:
    """Write one file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside its place, so that the renaming stays on one disk
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)  # mkstemp's files are for their owner alone
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def read_tensors(
    path: Path, error: type[KVStackError], what: str, again: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that `write_tensors` wrote; `error` where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    if not path.is_file():
        raise error(f"{name!r} is no file. {again}")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as problem:
        raise error(f"{name!r} is damaged or no {what}: {problem}. {again}") from None
    written = metadata.pop(CHECKSUM, None)
    if written is None:
        raise error(f"{name!r} is no {what} of this version of kvstack. {again}")
    if written != _checksum(tensors, metadata):
        raise error(f"{name!r} is damaged: its checksum is another. {again}")
    return metadata, tensors


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
