"""Files of tensors that are whole or refused: safetensors with a checksum, renamed into place when complete.

Nothing of a file is mapped into memory: it may be replaced or truncated while its tensors are in use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import KVStackError, WriteError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed, so that no lock is needed
    fcntl = None  # type: ignore[assignment]

__all__ = ["parsed_json", "read_tensors", "write_bytes", "write_tensors"]

CHECKSUM = "checksum"
SUFFIX = ".kvstack-part"
"""Of files that are being written."""
LONG_NAME = 150
"""Bytes of a name that leave room for what stands around it in the name of a partial file."""
MOST_HEADER = 100_000_000
"""Bytes that safetensors allows a header."""
MOST_NUMBERS = 2**60
"""Above these torch cannot count a tensor's bytes."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The types of safetensors, by the names they have in a header."""


# ---- writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, complete or not at all; see `write_bytes`."""
    from safetensors.torch import save

    write_bytes(path, save(dict(tensors), {**metadata, CHECKSUM: _checksum(tensors, metadata)}))


def write_bytes(path: Path, data: bytes) -> None:
    """Write one file, complete or not at all: a file that was there stays as it is until the new one is complete.

    A symbolic link stays, and what it points to is replaced. The permissions of a file that is replaced are kept, those
    of a new one obey the umask. Partial files that a killed process left behind for this path are removed.

    Raises:
        WriteError: `path` is a folder or no ordinary file, its folder cannot be written to, or the disk is full.
    """
    name = os.fspath(path)
    try:
        place = Path(os.path.realpath(path))
        if place.is_dir():
            raise WriteError(f"{name!r} is a folder. Name a file in it.")
        if place.is_symlink():
            raise WriteError(f"{name!r} is a symbolic link to itself. Name another file.")
        known = place.stat() if place.exists() else None
        if known is not None and not stat.S_ISREG(known.st_mode):
            raise WriteError(f"{name!r} is not an ordinary file, so it cannot be replaced. Name another file.")
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(place)
        _replace(place, data, known)
    except WriteError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a path with a null character
        reason = getattr(problem, "strerror", None) or problem
        raise WriteError(
            f"{name!r} cannot be written: {reason}. What was there is unchanged. Free some space, or name a file that "
            "you may write."
        ) from problem


def _replace(place: Path, data: bytes, known: os.stat_result | None) -> None:
    """Write a partial file next to `place`, so that the renaming stays on one disk, and rename it."""
    handle, partial = _new_partial(place, 0o666 if known is None else stat.S_IMODE(known.st_mode) | 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
            if known is not None:
                _keep_permissions(partial, known)
            if fcntl is not None:  # renamed while it is locked, so that nobody takes it for stale
                os.replace(partial, place)
        if fcntl is None:
            os.replace(partial, place)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def _keep_permissions(partial: Path, known: os.stat_result) -> None:
    mine = partial.stat()
    if (mine.st_uid, mine.st_gid) != (known.st_uid, known.st_gid) and hasattr(os, "chown"):
        with contextlib.suppress(OSError):  # only root may give files away
            os.chown(partial, known.st_uid, known.st_gid)
    os.chmod(partial, stat.S_IMODE(known.st_mode))


def _prefix(place: Path) -> str:
    name = place.name
    if len(os.fsencode(name)) > LONG_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _new_partial(place: Path, mode: int) -> tuple[int, Path]:
    """A new file, locked while it is open: the lock goes with its process, however that ends."""
    while True:
        partial = place.with_name(f"{_prefix(place)}{secrets.token_hex(4)}{SUFFIX}")
        try:
            handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        except FileExistsError:
            continue
        if fcntl is None:
            return handle, partial
        try:
            with contextlib.suppress(OSError):  # a file system without locks: nothing is taken for stale there either
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:
                return handle, partial
        except BaseException:
            os.close(handle)
            partial.unlink(missing_ok=True)
            raise
        os.close(handle)  # somebody took it for stale before it was locked


def _remove_stale(place: Path) -> None:
    """Remove partial files of `place` that no living process holds."""
    pattern = re.compile(re.escape(_prefix(place)) + "[0-9a-f]{8}" + re.escape(SUFFIX))
    entries: list[Path] = []
    with contextlib.suppress(OSError):  # a folder that may be written to and not listed
        entries = list(place.parent.iterdir())
    for partial in [entry for entry in entries if pattern.fullmatch(entry.name)]:
        with contextlib.suppress(OSError):  # somebody is writing it, or has removed it
            if fcntl is None:
                partial.unlink()
                continue
            handle = os.open(partial, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(handle)


# ---- reading


def read_tensors(
    path: Path, error: type[KVStackError], what: str, again: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that `write_tensors` wrote; `error` where it is missing or damaged."""
    name = os.fspath(path)
    try:
        if not os.path.isfile(path):
            os.stat(path)
            raise error(f"{name!r} is not a file. {again}")
        with open(path, "rb") as file:
            metadata, tensors = _read(file)
    except FileNotFoundError:
        raise error(f"{name!r} does not exist. {again}") from None
    except KVStackError:
        raise
    except OSError as problem:
        raise error(f"{name!r} cannot be read: {problem.strerror}. {again}") from None
    except ValueError as problem:
        raise error(f"{name!r} is damaged or not a {what}: {problem}. {again}") from None
    written = metadata.pop(CHECKSUM, None)
    if written is None:
        raise error(f"{name!r} is not a {what} of this version of kvstack. {again}")
    if written != _checksum(tensors, metadata):
        raise error(f"{name!r} is damaged: its checksum is another. {again}")
    return metadata, tensors


def parsed_json(text: str | bytes | bytearray) -> Any:
    """Return the content of a JSON text; any fault of it, NaN and infinity among them, is a ValueError."""

    def unknown(word: str) -> None:
        raise ValueError(f"{word} is not a number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known = dict(pairs)
        if len(known) != len(pairs):
            raise ValueError("a name stands twice in it")
        return known

    try:
        return json.loads(text, parse_constant=unknown, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read(file: BinaryIO) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A safetensors file: the length of the header in 8 bytes, the header in JSON, the bytes of all tensors."""
    size = os.fstat(file.fileno()).st_size
    head = int.from_bytes(_exactly(file, 8), "little")
    if head > min(MOST_HEADER, size - 8):
        raise ValueError("its header is longer than the file")
    header = parsed_json(_exactly(file, head))
    if not isinstance(header, dict):
        raise ValueError("its header is not a dict")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a dict of words")
    end, tensors = 0, {}
    for name, dtype, shape, start, stop in sorted(_described(header), key=lambda entry: entry[3:]):
        if start != end or stop > size - 8 - head:
            raise ValueError(f"the tensor {name!r} is not where it should be")
        data = _exactly(file, stop - start)
        tensors[name] = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
        end = stop
    if end != size - 8 - head:
        raise ValueError("it does not end with its last tensor")
    return metadata, tensors


def _described(header: Mapping[str, Any]) -> Iterator[tuple[str, torch.dtype, list[int], int, int]]:
    """Name, type, shape and place of every tensor."""
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the tensor {name!r} is not described as safetensors does")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        shape, place = entry["shape"], entry["data_offsets"]
        if dtype is None or not _sizes(shape) or not _sizes(place) or len(place) != 2:
            raise ValueError(f"the tensor {name!r} has no type, shape or place that is known")
        start, stop = place
        if math.prod(max(n, 1) for n in shape) >= MOST_NUMBERS:
            raise ValueError(f"the tensor {name!r} has a shape that no tensor has")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the tensor {name!r} has not as many bytes as its shape says")
        yield name, dtype, shape, start, stop


def _sizes(x: object) -> bool:
    return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)


def _exactly(file: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    if file.readinto(data) != count:  # type: ignore[attr-defined]
        raise ValueError("it ends too early")
    return data


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode(errors="surrogatepass"))
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode(errors="surrogatepass"))
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
