"""Rows of tensors that were costly to come by, kept as far as a number of them fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RowCache"]


class RowCache:
    """Keeps the last rows that were put in, by their numbers.

    Args:
        num_rows: how many rows there are.
        capacity: how many of them are kept.
        layout: shape of a row and type of each tensor, by name.

    Example:
        >>> cache = RowCache(9, capacity=2, layout={"x": ((), torch.int64)})
        >>> cache.put(np.array([4, 7]), {"x": torch.tensor([40, 70])})
        >>> cache.get(np.array([7, 4, 4]))
        {'x': tensor([70, 40, 40])}
        >>> cache.put(np.array([5]), {"x": torch.tensor([50])})
        >>> cache.get(np.array([4])) is None
        True
    """

    def __init__(
        self, num_rows: int, *, capacity: int, layout: Mapping[str, tuple[Sequence[int], torch.dtype]]
    ) -> None:
        self._place = np.full(num_rows, -1)
        self._owner = np.full(min(capacity, num_rows), -1)
        self._next = 0
        self._tensors = {name: torch.empty(len(self._owner), *shape, dtype=t) for name, (shape, t) in layout.items()}

    def get(self, numbers: NDArray[np.int64]) -> dict[str, Tensor] | None:
        """Copies of some rows, `[row, …]` by name; None unless all of them are there."""
        places = self._place[numbers]
        if np.any(places < 0):
            return None
        index = torch.from_numpy(places)
        return {name: tensor[index] for name, tensor in self._tensors.items()}

    def put(self, numbers: NDArray[np.int64], rows: Mapping[str, Tensor]) -> None:
        """Keep some rows, in place of those that came first; if there are too many, the last of them."""
        own, first = np.unique(numbers, return_index=True)
        first = first[self._place[own] < 0][-len(self._owner) :] if len(self._owner) else first[:0]
        new = numbers[first]
        places = (self._next + np.arange(len(new))) % max(len(self._owner), 1)
        replaced = self._owner[places]
        self._place[replaced[replaced >= 0]] = -1
        self._owner[places], self._place[new] = new, places
        self._next += len(new)
        source, target = torch.from_numpy(first), torch.from_numpy(places)
        for name, tensor in self._tensors.items():
            tensor[target] = rows[name][source]
