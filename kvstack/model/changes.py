"""Changes of hooks, one at a time: other threads run forwards meanwhile, and the garbage collector may end a stack
in the middle of anything.

torch reads a module's hooks in two steps: it collects them, then asks for each whether it takes keyword arguments. A
hook that comes or goes in between is called in the wrong way. So a hook of ours is announced before it is there, and
can be called without keyword arguments: then it has just been removed, and does nothing.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .as_python import as_python

__all__ = ["Handles", "changes"]


class Changes:
    """Makes changes one at a time: `make` for a thread that can wait, `soon` for a finalizer, which cannot:
    the thread that it interrupts may be in the middle of a change, or hold a lock that another change waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Callable[[], None]] = deque()

    def make(self, change: Callable[[], None]) -> None:
        """Make a change. No `with` statement: an interrupt may come at its end, before the lock is released."""
        held = False  # an interrupt may come between any two lines
        try:
            held = self._lock.acquire()
            self._make_pending()
            change()
            held = bool(self._lock.release())  # type: ignore[func-returns-value]  # released and False in one line
        finally:
            if held:
                self._lock.release()
        self.catch_up()

    def soon(self, change: Callable[[], None]) -> None:
        """Make a change that may be repeated: now, or when the running one is done. Where the garbage collector
        interrupted torch while that reads a module's hooks, the next hook makes it."""
        self._pending.append(change)
        if not _torch_is_reading():
            self.catch_up()

    def catch_up(self) -> None:
        """Make the changes that had to wait."""
        while self._pending:
            held = False
            try:
                held = self._lock.acquire(blocking=False)
                if not held:
                    return  # whoever has it catches up afterwards
                self._make_pending()
                held = bool(self._lock.release())  # type: ignore[func-returns-value]  # released and False in one line
            finally:
                if held:
                    self._lock.release()

    def _make_pending(self) -> None:
        while self._pending:
            self._pending[0]()
            self._pending.popleft()  # not before: an interrupted change is made again


def _torch_is_reading() -> bool:
    """Return True if the code that a finalizer interrupts is torch's call of a module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    return frame.f_code.co_filename == nn.modules.module.__file__


_BETWEEN = {__file__, threading.__file__, sys.modules["weakref"].__file__}

changes = Changes()


class Handles:
    """Hooks that are removed together."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before_all(self, hook: Callable[[nn.Module, Any], None]) -> None:
        """Call `hook(module, args)` before the forward of every module."""
        self._hang(nn.modules.module._global_forward_pre_hooks, hook)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args)` before the forward of `module`."""
        self._hang(module._forward_pre_hooks, hook)

    def before_with_keywords(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before the forward of `module`; without `kwargs`, it has been removed."""
        self._hang(module._forward_pre_hooks, hook, module._forward_pre_hooks_with_kwargs)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Call `hook(module, args, output)` after the forward of `module`; `always`: with None where it failed, too."""
        self._hang(module._forward_hooks, hook, module._forward_hooks_always_called if always else None)

    def after_with_keywords(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after the forward of `module`; without `kwargs`, it has been
        removed."""
        self._hang(module._forward_hooks, hook, module._forward_hooks_with_kwargs)

    def _hang(self, hooks: Any, hook: Callable[..., Any], flags: Any = None) -> None:
        hook = as_python(hook)
        # as torch registers a hook, in an order that holds whenever another thread or an interrupt comes between
        handle = RemovableHandle(hooks, extra_dict=flags)
        self._handles.append(handle)
        if flags is not None:
            flags[handle.id] = True
        hooks[handle.id] = hook

    def remove(self) -> None:
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()
