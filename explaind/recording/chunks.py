"""Arrays of a store that grow along their first axis, chunk by chunk.

Chunks are encoded here, to the bytes that `zarr` would write: it takes some 2 ms of Python for each, in which the
training loop cannot run, and reads a chunk back to fill it further.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

__all__ = ["GrowingArray", "encoded_size", "rows_of_a_chunk"]

_LARGEST_BYTES, _LEAST_BYTES, _LARGEST_ROWS = 2 << 20, 256 << 10, 4096
_BLOSC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE)


def rows_of_a_chunk(like: NDArray[Any], num_rows: int) -> int:
    """Number of rows that a chunk should have if `num_rows` rows like these are written at a time.

    What is large is then written once: a block fills a chunk, or some. What is small is written again a few times, and
    does not become many files.
    """
    row_bytes = max(1, math.prod(like.shape[1:]) * like.itemsize)
    chunks = max(1, math.ceil(num_rows * row_bytes / _LARGEST_BYTES))
    rows = max(num_rows // chunks, _LEAST_BYTES // row_bytes, 1)
    return min(rows, _LARGEST_ROWS)


def encoded_size(rows: NDArray[Any]) -> int:
    """Number of bytes that these rows take in a chunk."""
    return len(_encode(rows)) if rows.size else 0


def _encode(rows: NDArray[Any]) -> bytes:
    data: bytes = _BLOSC.encode(np.ascontiguousarray(rows.T if _is_along_steps(rows) else rows))
    return data


def _is_along_steps(rows: NDArray[Any]) -> bool:
    """Bytes of the same element at successive steps are alike: they compress best side by side."""
    return rows.ndim == 2 and rows.dtype.kind == "f"


class GrowingArray:
    """An array that is written from its first row to its last.

    Args:
        path: directory of the store.
        name: name of the new array.
        dims: names of its dimensions, the growing one first.
        like: some rows, of the shape and type that all have.
        chunk_rows: number of rows in a chunk.
    """

    def __init__(self, path: Path, name: str, dims: tuple[str, ...], like: NDArray[Any], chunk_rows: int) -> None:
        self._name = name
        self.chunk_rows = chunk_rows
        """Number of rows in a chunk."""
        self._fill = np.nan if like.dtype.kind == "f" else 0
        zarr.create_array(
            path,
            name=name,
            shape=(0, *like.shape[1:]),
            chunks=(self.chunk_rows, *(max(1, size) for size in like.shape[1:])),
            dtype=like.dtype,
            filters=[TransposeCodec(order=(1, 0))] if _is_along_steps(like) else None,
            compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=like.itemsize), Crc32cCodec()],
            fill_value=self._fill,
            dimension_names=dims,
        )
        (path / name / "c").mkdir()
        self._last = like[:0]
        self._begun = -1
        self.length = 0
        """Number of rows that are written."""
        self.attach(path)

    def attach(self, path: Path) -> None:
        """Go on in the store of this directory, which has the same rows."""
        self._array = zarr.open_array(path, path=self._name, mode="r+")
        self._chunks = path / self._name / "c"

    def append(self, rows: NDArray[Any]) -> None:
        """Write more rows."""
        length = self.length + len(rows)
        if length > self._array.shape[0]:
            self._resize(max(length, 2 * self._array.shape[0]))
        first = self.length // self.chunk_rows
        # What the last chunk has so far is written again with what fills it further.
        rest = np.concatenate([self._last, rows]) if len(self._last) else rows
        if len(rows):
            for start in range(0, len(rest), self.chunk_rows):
                self._write(first + start // self.chunk_rows, rest[start : start + self.chunk_rows])
        self._last = rest[len(rest) // self.chunk_rows * self.chunk_rows :].copy()
        self.length = length

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Some of the rows that are written."""
        return np.asarray(self._array[start:stop])

    def trim(self) -> None:
        """Give up the room behind the last row."""
        if self._array.shape[0] != self.length:
            self._resize(self.length)

    def _resize(self, length: int) -> None:
        self._array.resize((length, *self._array.shape[1:]))

    def _write(self, index: int, rows: NDArray[Any]) -> None:
        if not rows.size:
            return
        if len(rows) < self.chunk_rows:
            rest = np.full((self.chunk_rows - len(rows), *rows.shape[1:]), self._fill, rows.dtype)
            rows = np.concatenate([rows, rest])
        data = _encode(rows)
        file = f"{self._chunks}/{index}"
        for _ in range(rows.ndim - 1):
            if index != self._begun:
                Path(file).mkdir(exist_ok=True)  # without its parents: a store that was deleted must not come back
            file += "/0"
        self._begun = index
        with open(f"{file}.partial", "wb") as output:  # noqa: PTH123 (a Path takes as long as the file itself)
            output.write(data)
            output.write(google_crc32c.value(data).to_bytes(4, "little"))
        os.replace(f"{file}.partial", file)  # noqa: PTH105
