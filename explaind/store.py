"""The chunked zarr v3 store of a run: arrays that only grow, and a commit that says how far they are valid.

Every array grows along its first axis, whose name is a dimension (`step`, `snapshot`, `row`, …). A writer
first writes all rows of a block, then publishes the new length of every dimension by replacing one small
file. A reader believes only that file, so it sees a prefix of whole steps whenever it looks.
`storage/README.md` is the specification.
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, StorePath

from explaind.commit import COMMIT_FILE, Commit
from explaind.errors import DamagedStoreError, ExplaindError, StoreFormatError, StoreUnreachableError
from explaind.metadata import CHUNK_HEADER, ArrayMetadata, read_attributes
from explaind.places import Place, read_each
from explaind.remote_chunks import RemoteChunks

__all__ = ["FORMAT_VERSION", "Layout", "StoreReader", "decoding"]

FORMAT_VERSION = 3
"""Version of the on-disk format, counted apart from the package's."""
_READABLE_VERSIONS = (1, 2, 3)
_LAST_WITHOUT_CHECKSUMS = 2

_CACHE_BYTES = 256 << 20
_READ_AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Opening a pipe would else wait for somebody who writes to it."""
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_SENSELESS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an array lies in a store."""

    dims: tuple[str, ...]
    """Names of its dimensions, the growing one first."""
    shape: tuple[int, ...]
    """Their lengths, of the growing one that of the valid rows."""
    dtype: str
    """Name of its type."""
    chunk_rows: int
    """Number of rows in a chunk."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the valid rows, not compressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def num_chunks(self) -> int:
        """Number of chunks that hold valid rows."""
        return -(-self.shape[0] // self.chunk_rows)


class StoreReader:
    """Reads the published prefix of a store, chunk by chunk, through a small cache.

    Raises:
        StoreFormatError: not a run, or written in a newer format.
        DamagedStoreError: metadata or a chunk is missing or fails its checksum.
        StoreUnreachableError: object storage cannot be read.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        directory = _directory(path)
        # The commit is read first: metadata that is read later can only be newer.
        self.commit = Commit.read(path)
        self._identity = directory or self.commit.id
        self.attributes = read_attributes(path)
        version = self.attributes.get("explaind_format")
        if not isinstance(version, int):
            raise DamagedStoreError(f"the metadata of {path} has lost its format version; it has {version!r}.")
        if version not in _READABLE_VERSIONS:
            raise StoreFormatError(
                f"{path} has format {version!r}, this version of explaind reads formats up to {FORMAT_VERSION}. "
                "Install a newer explaind to open it."
            )
        sealed = version > _LAST_WITHOUT_CHECKSUMS
        if sealed and not self.commit.sealed:
            raise DamagedStoreError(f"{path / COMMIT_FILE} cannot be read: its checksum is missing.")
        found = read_each(path, partial(_metadata_or_damage, path, sealed), self.commit.arrays)
        self._metadata = dict(zip(self.commit.arrays, found, strict=True))
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.reads: Counter[str] = Counter()
        """How often each array was read from."""
        self.bytes_read = 0
        """Of the chunks that were not in memory any more, after they were decompressed."""
        self._lock = RLock()
        """Steps are read ahead by a thread of their own."""
        self._cache: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self.lost: str | None = None
        """What to say if an earlier commit is read, as the newest chunks of a run that was not closed are damaged."""
        if not self.commit.complete:
            self._fall_back()

    def _fall_back(self) -> None:
        """Believe an earlier commit if the newest chunks of a run that was not closed are missing or damaged."""
        published, damage = self.commit, self._damage()
        if damage is None:
            return
        for commit in reversed(published.earlier):
            self.commit = commit
            if commit.num_steps and self._damage() is None:
                break
        else:
            self.commit = published
            return
        self.lost = (
            f"the newest steps of {self.path} are lost, as after a power cut or in a copy of a run that was being "
            f"written ({damage}). The first {self.commit.num_steps} of {published.num_steps} steps are read."
        )

    def _damage(self) -> DamagedStoreError | None:
        """What is wrong with the last chunk of an array, if one is not that of the commit."""
        try:
            for name in self.commit.arrays:
                if length := self._length_of(name):
                    self._chunk(name, (length - 1) // self._find(name).chunk_rows)
        except DamagedStoreError as error:
            return error
        return None

    def check_arrays(self) -> None:
        """Raise if an array cannot be read at all; chunks are looked at when they are read.

        Raises:
            DamagedStoreError: what describes it is missing or damaged, or has fewer rows.
        """
        for name in self.commit.arrays:
            self._length_of(name)

    def layout(self, name: str) -> Layout:
        """How the valid rows of an array lie in its chunks.

        Raises:
            DamagedStoreError: what describes it is missing or damaged, or has fewer rows.
        """
        metadata = self._find(name)
        shape = (self._length_of(name), *metadata.shape[1:])
        return Layout(dims=metadata.dims, shape=shape, dtype=metadata.dtype.name, chunk_rows=metadata.chunk_rows)

    def chunk_name(self, name: str, index: int) -> str:
        """Where a chunk of an array is, below the store's directory."""
        return f"{name}/{self._find(name).chunk_file(index)}"

    def num_bytes(self, name: str, left_out: float = 0.0) -> int:
        """Bytes of the valid rows of an array, not compressed, but for the chunks in a first part that is left out."""
        metadata = self._find(name)
        length, rows = self.length(metadata.dims[0]), metadata.chunk_rows
        first = int(left_out * length) // rows * rows
        return (length - first) * metadata.row_bytes

    def chunk_bytes(self, name: str) -> int:
        """Bytes of a chunk of an array, not compressed."""
        metadata = self._find(name)
        return metadata.chunk_rows * metadata.row_bytes

    @property
    def cached_bytes(self) -> int:
        """Most bytes of chunks that are kept in memory."""
        return min(_CACHE_BYTES, sum(map(self.num_bytes, self.commit.arrays)))

    def length(self, dimension: str) -> int:
        """Number of valid entries along a growing dimension."""
        return self.commit.lengths.get(dimension, 0)

    def names(self, group: str) -> list[str]:
        """Names of the arrays in a sub-group, sorted."""
        return [name.removeprefix(f"{group}/") for name in self.commit.arrays if name.startswith(f"{group}/")]

    def has(self, name: str) -> bool:
        """Whether the store has this array."""
        return name in self.commit.arrays

    def has_along(self, name: str, dimension: str) -> bool:
        """Whether there is an array, and it grows along this dimension."""
        return self.has(name) and self._find(name).dims[0] == dimension

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a row of an array."""
        return self._find(name).shape[1:]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start:stop` of an array; without `stop`, up to the last published one."""
        with self._lock:
            return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int | None) -> NDArray[Any]:
        self.reads[name] += 1
        metadata = self._find(name)
        valid = self.length(metadata.dims[0])
        stop = valid if stop is None else stop
        if not 0 <= start <= stop <= valid:
            raise IndexError(f"rows {start}:{stop} of '{name}', which has {valid} in {self.path}")
        rows = metadata.chunk_rows
        parts = [
            self._chunk(name, index)[max(start - index * rows, 0) : stop - index * rows]
            for index in range(start // rows, -(-stop // rows))
        ]
        if not parts:
            return np.empty((0, *metadata.shape[1:]), dtype=metadata.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _find(self, name: str) -> ArrayMetadata:
        metadata = self._metadata.get(name, DamagedStoreError(f"the array '{name}' is missing from {self.path}"))
        if isinstance(metadata, DamagedStoreError):
            raise metadata
        return metadata

    def _length_of(self, name: str) -> int:
        """Number of valid rows of an array, which must have as many."""
        metadata = self._find(name)
        length, room = self.length(metadata.dims[0]), metadata.shape[0]
        if length > room:
            raise DamagedStoreError(
                f"the array '{name}' of {self.path} has {room} rows along {metadata.dims[0]}, the commit says {length}"
            )
        return length

    def _where(self, name: str, index: int) -> str:
        metadata = self._find(name)
        start = index * metadata.chunk_rows
        stop = min(start + metadata.chunk_rows, self.length(metadata.dims[0]))
        return f"'{name}', {metadata.dims[0]} {start} to {stop - 1}, in {self.path}"

    def _chunk(self, name: str, index: int) -> NDArray[Any]:
        key = (name, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        metadata = self._find(name)
        start = index * metadata.chunk_rows
        stop = min(start + metadata.chunk_rows, self.length(metadata.dims[0]))
        file = self.chunk_name(name, index)
        try:
            if metadata.row_bytes and isinstance(self.path, Path):  # zarr takes a missing one for fill values
                metadata.check_chunk(*_size_and_header(self.path / file))
            block = np.ascontiguousarray(self._open(name)[start:stop])
        except StoreUnreachableError:
            raise
        except _MISSING as error:
            self._check_same()
            raise DamagedStoreError(f"a chunk is missing: {self._where(name, index)} ({file})") from error
        except Exception as error:  # each codec has its own error types
            self._check_same()
            raise DamagedStoreError(f"a chunk is damaged: {self._where(name, index)}: {error}") from error
        self._check_same()
        # Its own checksum does not tell a chunk from one of before it was filled further, as in a copy of a store that
        # was being written.
        if stop == self.length(metadata.dims[0]) and self.commit.arrays[name] not in (None, google_crc32c.value(block)):
            raise DamagedStoreError(f"a chunk is not that of the commit: {self._where(name, index)}")
        self.bytes_read += block.nbytes
        self._cache[key] = block
        while len(self._cache) > 1 and sum(chunk.nbytes for chunk in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return block

    def _open(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            metadata = self._find(name)
            if isinstance(self.path, Path):
                place = StorePath(LocalStore(self.path, read_only=True), name)
            else:
                place = StorePath(RemoteChunks(self.path, metadata), name)
            self._arrays[name] = zarr.Array.from_dict(place, dict(metadata.content))
        return self._arrays[name]

    def _check_same(self) -> None:
        if self._identity_now() != self._identity:
            raise StoreFormatError(
                f"{self.path} has been replaced since it was opened: its writer took in more parameters, or it is "
                "another run. Open it again."
            )

    def _identity_now(self) -> Any:
        """What tells the store from another one at the same place: its directory, or the id in its commit."""
        if isinstance(self.path, Path):
            return _directory(self.path)
        try:
            return Commit.read(self.path).id
        except (StoreFormatError, DamagedStoreError):  # it is just being replaced
            return None


@contextmanager
def decoding(what: str, path: Place) -> Iterator[None]:
    """Say that a part of a store makes no sense, whatever goes wrong when it is turned into what it stands for.

    Raises:
        DamagedStoreError: something did.
    """
    try:
        yield
    except ExplaindError:
        raise
    except _SENSELESS as error:
        raise DamagedStoreError(f"{what} of {path} cannot be what was written: {error!r:.500}") from error


def _metadata_or_damage(path: Place, sealed: bool, name: str) -> ArrayMetadata | DamagedStoreError:
    """What an array's metadata say; what is wrong with them is of this array only."""
    try:
        return ArrayMetadata.read(path, name, sealed=sealed)
    except DamagedStoreError as error:
        return error


def _size_and_header(file: Path) -> tuple[int, bytes]:
    with os.fdopen(os.open(file, _READ_AT_ONCE), "rb") as opened:  # once: a writer may replace it
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{file.name} is no ordinary file")
        return status.st_size, opened.read(CHUNK_HEADER)


def _directory(path: Place) -> tuple[int, int] | None:
    """What tells a directory from another one of the same name."""
    if not isinstance(path, Path) or not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino
