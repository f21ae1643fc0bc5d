"""Things fitted to a model are made once: kept in the process, and in a file that all processes find."""

from __future__ import annotations

import hashlib
import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from filelock import FileLock

from ..errors import KVStackError
from ..heads import Heads
from ..model.ranks import heads_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["folder", "forget", "load_or_make"]

log = logging.getLogger("kvstack")

NOT_KEPT = "The calibration cannot be kept, and is made for this process alone: %s"


def folder() -> Path:
    """Return the folder that keeps calibrations between runs."""
    from ..models import cache_dir

    return cache_dir() / "calibrations"


def forget(model: PreTrainedModel) -> None:
    """Forget what this process knows of `model`: the next who asks reads the files."""
    _known.pop(model, None)


class Fitted(Protocol):
    """A thing that was fitted to a model and can be kept on disk."""

    def save(self, path: Path) -> None: ...


F = TypeVar("F", bound=Fitted)
Notice = str | Callable[[], str]
_known: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def load_or_make(
    model: PreTrainedModel,
    file: str,
    read: Callable[[Path], F],
    make: Callable[[], F],
    notice: Notice,
    is_current: Callable[[F], bool] = lambda _: True,
) -> F:
    """Return what this process knows already, load it from a file in `folder()`, or make it now and keep it there, in
    one process for all.

    Args:
        file: the name of the file, which tells the model and the settings apart from any other.
        read: loads the file; raises `CalibrationError` where that does not fit `model`.
        make: makes a new one.
        notice: logged before it is made, empty: nothing is; or what writes it then.
        is_current: whether one that this process knows may still be used; `read` decides about those on disk.
    """
    known: dict[str, F] = _known.setdefault(model, {})
    heads = heads_of(model)
    if file in known and not is_current(known[file]):
        del known[file]
    if file not in known and heads.size > 1:
        known[file] = _shared(heads, file, read, make, notice)
    fitted = known.get(file) or _kept(file, read, make, notice)
    if fitted is None:
        fitted = make()
    known[file] = fitted
    return fitted


def _shared(heads: Heads, file: str, read: Callable[[Path], F], make: Callable[[], F], notice: Notice) -> F:
    """Return the one that all processes of a shared model find, or make it together: each waits for the others wherever
    the model runs or is asked for its fingerprint, so none may wait for a lock, or read alone."""
    digests = heads.gathered(_digest(file))
    found = _read(_path(file), read) if digests[0] and len(set(digests)) == 1 else None
    if found is None:
        if heads.rank == 0 and (told := notice if isinstance(notice, str) else notice()):
            log.warning("%s", told)
        found = heads.gathered(make())[0]
        for rank in range(heads.size):  # one after the other: they may have one folder, or several
            digests = heads.gathered(_digest(file))
            if heads.rank == rank and (rank == 0 or digests[rank] != digests[0]):
                _save(file, found)
    return found


def _digest(file: str) -> str:
    """Of what the file holds; empty where there is none."""
    try:
        return hashlib.sha256(_path(file).read_bytes()).hexdigest()
    except (OSError, RuntimeError):
        return ""


def _save(file: str, fitted: Fitted) -> None:
    try:
        path = _path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        fitted.save(path)
    except (OSError, RuntimeError) as error:
        log.warning(NOT_KEPT, error)


def _path(file: str) -> Path:
    # a model may call its type anything, and the file stays in the folder
    return folder() / re.sub(r"[^\w.-]", "_", file)


def _kept(file: str, read: Callable[[Path], F], make: Callable[[], F], notice: Notice) -> F | None:
    """Return the content of the file, or make it now and keep it there; None if nothing can be kept."""
    try:
        path = _path(file)
        if path.exists() and (fitted := _read(path, read)) is not None:
            return fitted
        path.parent.mkdir(parents=True, exist_ok=True)
        # the lock goes when its process goes; a second process waits here and finds the work done
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except (OSError, RuntimeError) as error:  # a folder of another user, a name too long, a home that is not known
        log.warning(NOT_KEPT, error)
        return None
    try:
        return (_read(path, read) if path.exists() else None) or _made(path, make, notice)
    finally:
        lock.release()


def _read(path: Path, read: Callable[[Path], F]) -> F | None:
    try:
        return read(path)
    except KVStackError as error:
        log.warning("%s It is made again.", error)
        return None


def _made(path: Path, make: Callable[[], F], notice: Notice) -> F:
    log.warning("%s Kept in %s", notice if isinstance(notice, str) else notice(), path)
    fitted = make()
    try:
        fitted.save(path)
    except OSError as error:
        log.warning(NOT_KEPT, error)
    return fitted
