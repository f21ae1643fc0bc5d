"""Code that runs as Python in a model that torch.compile has compiled.

What a hook does depends on the cache in the call, and the cache changes in every forward. A compiler that traced this
would trace it again at every step. So it stops where such code begins, and goes on behind it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["as_python"]

Function = TypeVar("Function", bound=Callable[..., Any])

REASON = "kvstack runs as Python. Leave out fullgraph=True"
"""torch quotes it where it may not stop."""
_GIVEN: dict[str, Any] = {"reason": REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}


def as_python(function: Function) -> Function:
    """`function`, which no compiler traces, nor anything that it calls. The compiler is not imported for this: where it
    is not, nothing is traced."""
    untraced: list[Any] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not untraced:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            untraced.append(torch.compiler.disable(function, **_GIVEN))
        return untraced[0](*args, **kwargs)

    return cast(Function, run)
