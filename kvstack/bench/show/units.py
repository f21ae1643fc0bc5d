"""Bytes, shares and divergences as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FITTED", "FITTED_CAPTION", "fitted", "mib", "nats", "share"]

FITTED = ("of model, MiB", "less from")
FITTED_CAPTION = (
    "of model: fitted to the model for all its caches, not in the bytes of each; less from: tokens of all texts from "
    "which on both together are less than a dense cache"
)


def mib(nbytes: float) -> str:
    """Bytes in MiB: 1,024.00."""
    return f"{nbytes / 2**20:,.2f}"


def share(x: float) -> str:
    """A share of bytes: 12.3 %, 2.14 %."""
    return f"{x:.2%}" if x < 0.1 else f"{x:.1%}"


def nats(x: float) -> str:
    """A divergence: 0.0023, 0.123."""
    return f"{x:.2g}" if x < 0.1 else f"{x:.3f}"


def fitted(row: Mapping[str, Any]) -> tuple[str, str]:
    """The cells of `FITTED`: empty where nothing was fitted, or where the figures are of a time that did not tell."""
    if not row.get("model_nbytes"):
        return "", ""
    return mib(row["model_nbytes"]), "never" if row["break_even"] is None else f"{row['break_even']:,}"
