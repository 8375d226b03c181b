"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["readable_size"]


def readable_size(num_bytes: float) -> str:
    """Bytes in the unit that leaves three digits.

    Example:
        >>> readable_size(34_600_000)
        '34.6 MB'
    """
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} GB"
