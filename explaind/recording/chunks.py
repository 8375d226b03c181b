"""Arrays of a store that grow along their first axis, chunk by chunk.

Chunks and metadata are encoded here, to what `zarr` would write: it takes 0.5 to 2 ms of Python for each, in which the
training loop cannot run, and reads a chunk back to fill it further.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

from explaind.checksums import sealed_metadata
from explaind.metadata import ArrayMetadata
from explaind.places import Place
from explaind.recording.files import LOCAL, Files

__all__ = ["GrowingArray", "describe", "encoded_size", "rows_of_a_chunk"]

_LARGEST_BYTES, _LEAST_BYTES, _LARGEST_ROWS = 2 << 20, 256 << 10, 4096
_ENDIAN = {"configuration": {"endian": "little"}}
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


def _encode(rows: NDArray[Any], turned: NDArray[Any] | None = None) -> bytes:
    """The bytes of a chunk; `turned` is memory for its transpose."""
    if _is_along_steps(rows):
        if turned is None:
            rows = np.ascontiguousarray(rows.T)
        else:
            turned[:] = rows.T
            rows = turned
    data: bytes = _BLOSC.encode(np.ascontiguousarray(rows))
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
        durable: whether no file may be replaced by one that has not reached the device.
        files: writes the files of the store.
    """

    def __init__(
        self,
        path: Place,
        name: str,
        dims: tuple[str, ...],
        like: NDArray[Any],
        chunk_rows: int,
        *,
        durable: bool = False,
        files: Files = LOCAL,
    ) -> None:
        self._begin(name, like, chunk_rows, durable=durable, files=files)
        self._metadata = _metadata(like, dims, chunk_rows)
        if isinstance(path, Path):
            (path / name / "c").mkdir(parents=True)
        for parent in PurePosixPath(name).parents[:-1]:
            files.put(f"{path}/{parent}/zarr.json", json.dumps(_group({})).encode(), force=durable)
        self.attach(path)
        self._resize(0)

    @classmethod
    def continued(
        cls, path: Path, name: str, metadata: ArrayMetadata, length: int, last: NDArray[Any], *, durable: bool
    ) -> Self:
        """An array that was written before, to go on with after some of its rows.

        Args:
            path: directory of the store.
            name: name of the array.
            metadata: what is known of it.
            length: how many rows stay; those behind are replaced.
            last: those of them that are in the last chunk.
            durable: whether no file may be replaced by one that has not reached the device.

        Raises:
            ValueError: its chunks are not laid out as they would be here.
        """
        array = cls.__new__(cls)
        array._begin(name, last, metadata.chunk_rows, durable=durable, files=LOCAL)
        array._metadata = _metadata(last, metadata.dims, metadata.chunk_rows)
        changing = ("shape", "attributes")
        if any(metadata.content.get(key) != array._metadata[key] for key in array._metadata.keys() - set(changing)):
            raise ValueError(f"the chunks of '{name}' are not laid out as this version of explaind does it")
        array.attach(path)
        array.length = array._settled = length
        array.tail = google_crc32c.value(np.ascontiguousarray(last))
        array._room = metadata.shape[0]
        array._replaces = True
        if filled := length % metadata.chunk_rows:
            array._filling = np.empty((metadata.chunk_rows, *last.shape[1:]), last.dtype)
            array._filling[:filled] = last
            array._begun = length // metadata.chunk_rows
        return array

    def _begin(self, name: str, like: NDArray[Any], chunk_rows: int, *, durable: bool, files: Files) -> None:
        self._name, self._durable, self._to = name, durable, files
        self.chunk_rows = chunk_rows
        """Number of rows in a chunk."""
        self._fill = np.nan if like.dtype.kind == "f" else 0
        # Memory that is used for every chunk: fresh memory comes slowly, page by page.
        self._filling: NDArray[Any] | None = None
        self._turned: NDArray[Any] | None = None
        self._begun = -1
        self._replaces = False
        self.length = 0
        """Number of rows that are written."""
        self._settled = 0
        self._last: NDArray[Any] | None = None
        self.tail = 0
        """CRC-32C of the rows in the last chunk, as far as they are settled."""
        self._room = 0
        self._files: dict[str, None] = {}

    def attach(self, path: Place) -> None:
        """Go on in the store of this directory, which has the same rows."""
        self._store, self._directory = path, f"{path}/{self._name}"

    def append(self, *parts: NDArray[Any]) -> None:
        """Take in more rows, which come in some arrays; chunks that they fill are written."""
        length = self.length + sum(map(len, parts))
        if length > self._room:
            self._resize(max(length, 2 * self._room))
        if sum(part.nbytes for part in parts) < _LEAST_BYTES:
            parts = (np.concatenate(parts),)
        for part in parts:
            for start, stop in self._pieces(len(part)):
                self._add(part[start:stop])

    def settle(self) -> list[str]:
        """Write the last chunk as far as it is filled; returns all files that were written since this was last done."""
        filled = self.length % self.chunk_rows
        if self._filling is not None and filled and self.length != self._settled:
            # It is written again with what fills it further.
            self._filling[filled:] = self._fill
            self._write(self._filling)
            self._last = self._filling[:filled]
        if self._last is not None:
            self.tail, self._last = google_crc32c.value(self._last), None
        self._settled = self.length
        files, self._files = list(self._files), {}
        return files

    def _pieces(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """Where the next rows are cut between chunks."""
        start = 0
        while start < num_rows:
            stop = min(num_rows, start + self.chunk_rows - self.length % self.chunk_rows)
            yield start, stop
            start = stop

    def _add(self, rows: NDArray[Any]) -> None:
        """Add rows to the chunk that is being filled, and write it if it is full."""
        place = self.length % self.chunk_rows
        if len(rows) < self.chunk_rows:
            if self._filling is None:
                self._filling = np.empty((self.chunk_rows, *rows.shape[1:]), rows.dtype)
            self._filling[place : place + len(rows)] = rows
            chunk = self._filling
        else:
            chunk = rows
        if place + len(rows) == self.chunk_rows:
            self._write(chunk)
            self._last = np.ascontiguousarray(chunk)
        self.length += len(rows)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Some of the rows that are settled."""
        return np.asarray(zarr.open_array(str(self._store), path=self._name, mode="r")[start:stop])

    def trim(self) -> None:
        """Give up the room behind the last row, and the chunks that another writer may have left there."""
        if self._room != self.length:
            self._resize(self.length)
        index = -(-self.length // self.chunk_rows)
        while (left := Path(f"{self._directory}/c/{index}")).exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
            index += 1

    def _resize(self, length: int) -> None:
        self._room = length
        shape = [length, *self._metadata["shape"][1:]]
        file = f"{self._directory}/zarr.json"
        self._to.put(file, json.dumps(sealed_metadata(self._metadata | {"shape": shape})).encode(), force=self._durable)
        self._files[file] = None

    def _write(self, rows: NDArray[Any]) -> None:
        """Write the chunk in which the next row is, or of which the last row was just added."""
        if not rows.size:
            return
        if self._turned is None and _is_along_steps(rows) and self.chunk_rows > 1:
            self._turned = np.empty(rows.shape[::-1], rows.dtype)
        data = _encode(rows, self._turned)
        index = self.length // self.chunk_rows
        file = f"{self._directory}/c/{index}"
        begun = index == self._begun
        for _ in range(rows.ndim - 1):
            if not begun:
                self._to.make_directory(file)  # without its parents: a store that was deleted must not come back
            file += "/0"
        self._begun = index
        checked = google_crc32c.value(data).to_bytes(4, "little")
        self._to.put(file, data, checked, force=self._durable and (begun or self._replaces))
        self._files[file] = None


def describe(store: Place, attributes: Mapping[str, Any], *, durable: bool = False, files: Files = LOCAL) -> None:
    """Write the metadata of a store's root group, whose attributes describe the run."""
    files.put(f"{store}/zarr.json", json.dumps(sealed_metadata(_group(attributes))).encode(), force=durable)


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What zarr says about a group."""
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def _metadata(like: NDArray[Any], dims: tuple[str, ...], chunk_rows: int) -> dict[str, Any]:
    """What zarr says about an array without rows."""
    codecs: list[dict[str, Any]] = [{"name": "bytes"} | _ENDIAN if like.itemsize > 1 else {"name": "bytes"}]
    if _is_along_steps(like):
        codecs.insert(0, {"name": "transpose", "configuration": {"order": [1, 0]}})
    blosc = {"typesize": like.itemsize, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    chunk_shape = [chunk_rows, *(max(1, size) for size in like.shape[1:])]
    return {
        "shape": [0, *like.shape[1:]],
        "data_type": like.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if like.dtype.kind == "f" else like.dtype.type(0).item(),
        "codecs": [*codecs, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
        "attributes": {},
        "dimension_names": list(dims),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
