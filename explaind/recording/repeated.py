"""Rows that are mostly those of the step before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Repeated", "among"]

_Source = TypeVar("_Source")


class Repeated(Generic[_Source]):
    """Makes an array anew only if what it is made from is not what it was; nothing may change either of them."""

    def __init__(self, make: Callable[[_Source], NDArray[Any]]) -> None:
        self._make = make
        self._last: tuple[_Source, NDArray[Any]] | None = None

    def __call__(self, source: _Source) -> NDArray[Any]:
        """The array made from `source`."""
        if self._last is None or self._last[0] != source:
            self._last = source, self._make(source)
        return self._last[1]


def among(names: tuple[Sequence[str], Collection[str] | None]) -> NDArray[np.bool_]:
    """Which of the first names are among the second ones, all of them if these are None, `[name]`."""
    every, chosen = names
    return np.array([chosen is None or name in chosen for name in every])
