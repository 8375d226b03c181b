"""The number of torch's threads, which decides how sums are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["num_threads"]


@contextmanager
def num_threads(number: int | None = None) -> Iterator[None]:
    """Compute with so many threads, or as many as there are, and leave as many as there were.

    Other libraries may share torch's pool of threads, and change its size.
    """
    before = torch.get_num_threads()
    if number not in (None, before):
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
