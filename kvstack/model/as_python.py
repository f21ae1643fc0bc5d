"""Code that runs as Python in a model that torch.compile has compiled.

What a hook does depends on the cache in the call, and the cache changes in every forward. A compiler that traced this
would trace it again at every step. So it stops where such code begins, and goes on behind it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["as_python", "prepare"]

Function = TypeVar("Function", bound=Callable[..., Any])

REASON = "kvstack runs as Python. Leave out fullgraph=True"
"""torch quotes it where it may not stop."""
_GIVEN: dict[str, Any] = {"reason": REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}


def as_python(function: Function) -> Function:
    """`function`, which no compiler traces, nor anything that it calls, from `prepare` on."""
    untraced: list[Any] = []
    if _ready:
        untraced.append(torch.compiler.disable(function, **_GIVEN))
    else:
        _waiting.append((function, untraced))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return untraced[0](*args, **kwargs) if untraced else function(*args, **kwargs)

    return cast(Function, run)


_waiting: list[tuple[Any, list[Any]]] = []
_ready: list[bool] = []  # True once there was a stack


def prepare() -> None:
    """Keep compilers from all these functions. It imports torch's compiler, so it waits until there is a stack."""
    if _ready:
        return
    for function, untraced in _waiting:  # two threads may do this at once: to the same end
        untraced[:] = [torch.compiler.disable(function, **_GIVEN)]
    _ready[:] = [True]
