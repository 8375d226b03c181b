"""Host memory for copies that the loop makes again at every step.

Fresh memory comes page by page, in ten times the time of the copy itself (0.06 ms against 0.005 ms for 150 kB).
"""

from __future__ import annotations

from collections import deque
from sys import getrefcount
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["CopyMemory"]


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class CopyMemory:
    """Gives out memory, and gives it out again once nothing refers to it any more."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[tuple[int, ...], torch.dtype], deque[NDArray[Any]]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any content."""
        if dtype not in _NUMPY:
            return torch.empty(shape, dtype=dtype)
        blocks = self._blocks.setdefault((shape, dtype), deque())
        # They become free in the order in which they were given out, or nearly so.
        if not blocks or _references(blocks) > _ALONE:
            blocks.appendleft(np.empty(shape, _NUMPY[dtype]))
        blocks.rotate(-1)
        return torch.from_numpy(blocks[-1])

    def copy(self, tensor: Tensor) -> Tensor:
        """The same numbers, in memory of the same device."""
        if tensor.device.type != "cpu":
            return tensor.detach().clone()
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor.detach())


def _references(blocks: deque[NDArray[Any]]) -> int:
    """Number of references to the first block: tensors and arrays refer to the memory that they show."""
    return getrefcount(blocks[0])


_ALONE = _references(deque([np.empty(0, np.uint8)]))
