"""Which example is which: distinct model inputs, each stored once and found again by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["InputTable"]

_DIGEST_BYTES = 16


class InputTable:
    """Numbers distinct input rows, and finds a row again by its bytes.

    An example's input is one row of every tensor that the model is called with, for instance token ids and a mask.
    Batches whose tensors have the same names, shapes per row and types are of one layout.
    """

    def __init__(self) -> None:
        self._layouts: dict[Any, tuple[int, dict[bytes, tuple[int, int]]]] = {}
        self._num_inputs = 0

    def add(
        self, inputs: Mapping[str, NDArray[Any]]
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Look up a batch `{name: [row, …]}`.

        Returns:
            The number of its layout; for each row the number of its content among all inputs `[row]`, and its index
            among the inputs of the layout `[row]`; the positions in the batch of the rows that are new.
        """
        shapes = tuple(sorted((name, rows.shape[1:], str(rows.dtype)) for name, rows in inputs.items()))
        layout, known = self._layouts.setdefault(shapes, (len(self._layouts), {}))
        content, index, new = [], [], []
        for row, key in enumerate(_row_keys(inputs)):
            if key not in known:
                known[key] = (self._num_inputs, len(known))
                self._num_inputs += 1
                new.append(row)
            content.append(known[key][0])
            index.append(known[key][1])
        return layout, np.array(content, np.int64), np.array(index, np.int64), np.array(new, np.int64)


def _row_keys(inputs: Mapping[str, NDArray[Any]]) -> list[bytes]:
    """One key per row: its bytes over all arguments, or a digest of them where that is shorter."""
    parts = [np.ascontiguousarray(rows).reshape(len(rows), -1) for _, rows in sorted(inputs.items())]
    raw = np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in parts], axis=1)
    keys: list[bytes] = np.ascontiguousarray(raw).view(f"V{raw.shape[1]}").ravel().tolist()
    if raw.shape[1] <= 4 * _DIGEST_BYTES:
        return keys
    return [hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest() for key in keys]
