"""A store with more parameters: what its rows say about those that were frozen when the rows were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.parameters import ParameterTable
from explaind.recording.fixed import decode_fixed, fixed_bytes

__all__ = ["RowChange", "Widening"]

RowChange = Callable[[NDArray[Any], int], NDArray[Any]]
"""The new rows of an array in place of old ones, which begin at an index."""

_UNTOUCHED: Mapping[str, float] = {"gradient_scale": 1.0, "gradient_limit": np.inf, "digest": -1}


@dataclass(frozen=True, kw_only=True)
class Widening:
    """Parameters that come after those of a table, as they were before: fixed tensors without gradient and state."""

    old: ParameterTable
    new: ParameterTable
    """The same, and the new ones at the end."""
    fixed: Sequence[dict[str, Any]]
    """Layout of the fixed tensors, among which the new parameters were so far."""

    def changes(
        self, arrays: Mapping[str, tuple[str, ...]], read: Callable[[str, int], NDArray[Any]]
    ) -> dict[str, RowChange]:
        """What becomes of the rows of those arrays that have an entry per element or parameter, or hold fixed bytes.

        Args:
            arrays: dimensions of every array of the store, by name.
            read: returns one row of an array.
        """
        changes: dict[str, RowChange] = {
            name: self._padding(name, dims[-1])
            for name, dims in arrays.items()
            if dims[-1] in ("element", "parameter") and name != "params"
        }
        changes["params"] = self._add_frozen(read)
        changes["fixed"] = lambda rows, start: self.without_new(rows)
        return {name: change for name, change in changes.items() if name in arrays}

    def pad(self, name: str, rows: NDArray[Any], dimension: str) -> NDArray[Any]:
        """Rows `[…, element]` or `[…, parameter]` with nothing for the new parameters."""
        if dimension == "element":
            count, dtype = self.new.num_elements - self.old.num_elements, _numpy_type(self.new.dtype)
            filling = np.zeros((*rows.shape[:-1], count), dtype)
        else:
            empty = _UNTOUCHED.get(name, np.nan if rows.dtype.kind == "f" else 0)
            filling = np.full((*rows.shape[:-1], len(self.new) - len(self.old)), empty, rows.dtype)
        return np.concatenate([rows, filling], axis=-1)

    def without_new(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bytes of fixed tensors `[…, byte]` without those of the new parameters."""
        kept = [np.full(fixed_bytes(entry), entry["name"] not in self.new.names) for entry in self.fixed]
        return rows[..., np.concatenate(kept)]

    def _padding(self, name: str, dimension: str) -> RowChange:
        return lambda rows, start: self.pad(name, rows, dimension)

    def _add_frozen(self, read: Callable[[str, int], NDArray[Any]]) -> RowChange:
        last: tuple[int, Tensor] | None = None

        def frozen(snapshot: int) -> Tensor:
            nonlocal last
            version = int(read("moment_fixed", int(read("snapshot_step", snapshot))))
            if last is None or last[0] != version:
                tensors = decode_fixed(list(self.fixed), read("fixed", version))
                last = version, self.new.flatten(tensors)[self.old.num_elements :]
            return last[1]

        def change(rows: NDArray[Any], start: int) -> NDArray[Any]:
            values = [frozen(start + number).numpy() for number in range(len(rows))]
            return np.concatenate([rows, np.stack(values)], axis=1)

        return change


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
