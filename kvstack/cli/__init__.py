"""The `kvstack` command: what you type comes in, printed lines go out, and no other module of kvstack imports it."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`kvstack.cli:app` is the command; the module behind it is imported when it runs."""
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
