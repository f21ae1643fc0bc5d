"""Bytes, shares and divergences as people read them."""

from __future__ import annotations

__all__ = ["mib", "nats", "share"]


def mib(nbytes: float) -> str:
    """Bytes in MiB: 1,024.00."""
    return f"{nbytes / 2**20:,.2f}"


def share(x: float) -> str:
    """A share of bytes: 12.3 %, 2.14 %."""
    return f"{x:.2%}" if x < 0.1 else f"{x:.1%}"


def nats(x: float) -> str:
    """A divergence: 0.0023, 0.123."""
    return f"{x:.2g}" if x < 0.1 else f"{x:.3f}"
