"""Which example is which: distinct model inputs, each stored once and found again by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["InputTable"]

_KEY_BYTES, _DIGEST_BYTES = 256, 16


class InputTable:
    """Numbers distinct input rows, and finds a row again by its bytes.

    An example's input is one row of every tensor that the model is called with, for instance token ids and a mask.
    Batches whose tensors have the same names, shapes per row and types are of one layout.
    """

    def __init__(self) -> None:
        self._layouts: dict[Any, int] = {}
        self._known: list[dict[bytes, int]] = []
        self._contents: list[list[int]] = []
        self._num_inputs = 0

    def layout(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """Number of the layout of a batch `{name: [row, …]}`; a new one is the next number."""
        shapes = tuple(sorted((name, rows.shape[1:], rows.dtype.str) for name, rows in inputs.items()))
        return self._layouts.setdefault(shapes, len(self._layouts))

    def go_on(self, inputs: Mapping[str, NDArray[Any]], contents: list[int]) -> None:
        """Know the inputs `{name: [row, …]}` of the next layout, in their order; each has a number among all inputs."""
        layout = self.layout(inputs)
        assert layout == len(self._known)
        self._known.append({key: place for place, key in enumerate(_row_keys(inputs))})
        self._contents.append(contents)
        self._num_inputs += len(contents)

    def add(
        self, inputs: Mapping[str, NDArray[Any]], layout: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Look up a batch `{name: [row, …]}` of a layout.

        Returns:
            For each row the number of its content among all inputs `[row]`, and its index among the inputs of the
            layout `[row]`; the positions in the batch of the rows that are new.
        """
        while layout >= len(self._known):
            self._known.append({})
            self._contents.append([])
        known, contents = self._known[layout], self._contents[layout]
        keys, new = _row_keys(inputs), []
        try:
            index = np.fromiter(map(known.__getitem__, keys), np.int64, len(keys))
        except KeyError:
            for row, key in enumerate(keys):
                if key not in known:
                    known[key] = len(known)
                    contents.append(self._num_inputs)
                    self._num_inputs += 1
                    new.append(row)
            index = np.array([known[key] for key in keys], np.int64)
        content = index if self._num_inputs == len(known) else np.array(contents, np.int64)[index]
        return content, index, np.array(new, np.int64)


def _row_keys(inputs: Mapping[str, NDArray[Any]]) -> list[bytes]:
    """One key per row: its bytes over all arguments, or a digest of them where that is shorter."""
    parts = [np.ascontiguousarray(rows).reshape(len(rows), -1) for _, rows in sorted(inputs.items())]
    rows = [part.view(np.uint8).reshape(len(part), -1) for part in parts]
    raw = rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)
    keys: list[bytes] = np.ascontiguousarray(raw).view(f"V{raw.shape[1]}").ravel().tolist()
    if raw.shape[1] <= _KEY_BYTES:
        return keys
    return [hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest() for key in keys]
