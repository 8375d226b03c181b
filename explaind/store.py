"""The chunked zarr v3 store of a run: arrays that only grow, and a commit that says how far they are valid.

Every array grows along its first axis, whose name is a dimension (`step`, `snapshot`, `row`, …). A writer
first writes all rows of a block, then publishes the new length of every dimension by replacing one small
file. A reader believes only that file, so it sees a prefix of whole steps whenever it looks.
`storage/README.md` is the specification.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from explaind.errors import DamagedStoreError, StoreExistsError, StoreFormatError

__all__ = [
    "COMMIT_FILE",
    "FORMAT_VERSION",
    "Commit",
    "Layout",
    "StoreReader",
    "aside",
    "check_free",
    "free_path",
    "is_published",
]

FORMAT_VERSION = 3
_READABLE_VERSIONS = (1, 2, 3)
"""Version of the on-disk format, counted apart from the package's."""

COMMIT_FILE = "commit.json"
"""The file that says how far the arrays are valid."""
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Commit:
    """How much of a store is valid."""

    lengths: dict[str, int]
    """Number of valid entries along each growing dimension."""
    arrays: list[str]
    """Names of all arrays."""
    complete: bool
    """Whether the recording ended and will not grow any more."""

    @property
    def num_steps(self) -> int:
        """S, the number of whole steps: those of which it is known what was before and after them."""
        moments = self.lengths.get("moment", self.lengths.get("snapshot", 0))  # one snapshot each, until format 2
        return max(0, min(self.lengths.get("step", 0), moments - 1))

    def write(self, store: Path) -> None:
        """Publish atomically: write beside the old file, then rename over it."""
        temporary = store / f"{COMMIT_FILE}.partial"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(store / COMMIT_FILE)

    @classmethod
    def read(cls, store: Path) -> Commit:
        """Read the last published commit."""
        if left := _replaced(store):
            raise StoreFormatError(left)
        if not (store / COMMIT_FILE).is_file():
            what = "no such directory" if not store.is_dir() else f"it has no {COMMIT_FILE}"
            raise StoreFormatError(
                f"{store} is not a recorded run: {what}. Expected a directory written by explaind.trace; a "
                "run that was stopped before its first block of steps was written leaves nothing to open."
            )
        try:
            content = json.loads((store / COMMIT_FILE).read_text())
            lengths = {str(name): int(length) for name, length in content["lengths"].items()}
            arrays = [str(name) for name in content["arrays"]]
            return cls(lengths=lengths, arrays=arrays, complete=bool(content["complete"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedStoreError(f"{store / COMMIT_FILE} cannot be read: {error}") from error


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
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = _place(path)
        # The commit is read first: metadata that is read later can only be newer.
        self.commit = Commit.read(path)
        try:
            self._group = zarr.open_group(path, mode="r")
            self.attributes: dict[str, Any] = dict(self._group.attrs)
        except Exception as error:  # zarr has many errors for metadata that make no sense
            raise DamagedStoreError(f"the metadata of {path} cannot be read: {error!r}") from error
        version = self.attributes.get("explaind_format")
        if not isinstance(version, int):
            raise DamagedStoreError(f"the metadata of {path} has lost its format version; it has {version!r}.")
        if version not in _READABLE_VERSIONS:
            raise StoreFormatError(
                f"{path} has format {version!r}, this version of explaind reads formats up to {FORMAT_VERSION}. "
                "Install a newer explaind to open it."
            )
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.reads: Counter[str] = Counter()
        """How often each array was read from."""
        self.bytes_read = 0
        """Of the chunks that were not in memory any more, after they were decompressed."""
        self._lock = RLock()
        """Steps are read ahead by a thread of their own."""
        self._cache: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()

    def check_arrays(self) -> None:
        """Raise if an array is not there.

        Raises:
            DamagedStoreError: it is not.
        """
        for name in self.commit.arrays:
            if not (self.path / name / "zarr.json").is_file():
                raise DamagedStoreError(f"the array '{name}' is missing from {self.path}")

    def layout(self, name: str) -> Layout:
        """How the valid rows of an array lie in its chunks.

        Raises:
            DamagedStoreError: what describes it is missing or damaged, or has fewer rows.
        """
        array = self._open(name)
        dims = _dims(array)
        shape = (self.length(dims[0]), *array.shape[1:])
        if array.shape[0] < shape[0]:
            raise DamagedStoreError(
                f"the array '{name}' in {self.path} ends too early: it has only {array.shape[0]} of {shape[0]} rows"
            )
        return Layout(dims=dims, shape=shape, dtype=str(array.dtype), chunk_rows=array.chunks[0])

    def chunk_file(self, name: str, index: int) -> Path:
        """Where a chunk of an array is."""
        return self.path.joinpath(name, "c", str(index), *["0"] * (self._open(name).ndim - 1))

    def num_bytes(self, name: str, left_out: float = 0.0) -> int:
        """Bytes of the valid rows of an array, not compressed, but for the chunks in a first part that is left out."""
        array = self._open(name)
        length, rows = self.length(_dims(array)[0]), array.chunks[0]
        first = int(left_out * length) // rows * rows
        return (length - first) * math.prod(array.shape[1:]) * array.dtype.itemsize

    def chunk_bytes(self, name: str) -> int:
        """Bytes of a chunk of an array, not compressed."""
        array = self._open(name)
        return math.prod(array.chunks) * array.dtype.itemsize

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
        return self.has(name) and _dims(self._open(name))[0] == dimension

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start:stop` of an array; without `stop`, up to the last published one."""
        with self._lock:
            return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int | None) -> NDArray[Any]:
        self.reads[name] += 1
        array = self._open(name)
        valid = self.length(_dims(array)[0])
        stop = valid if stop is None else stop
        if not 0 <= start <= stop <= valid:
            raise IndexError(f"rows {start}:{stop} of '{name}', which has {valid} in {self.path}")
        rows = array.chunks[0]
        parts = [
            self._chunk(name, index)[max(start - index * rows, 0) : stop - index * rows]
            for index in range(start // rows, -(-stop // rows))
        ]
        if not parts:
            return np.empty((0, *array.shape[1:]), dtype=array.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _open(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            try:
                array = self._group[name]
            except KeyError as error:
                raise DamagedStoreError(f"the array '{name}' is missing from {self.path}") from error
            except Exception as error:  # zarr has many errors for metadata that make no sense
                raise DamagedStoreError(f"the metadata of '{name}' in {self.path} is damaged: {error!r}") from error
            if not isinstance(array, zarr.Array):
                raise DamagedStoreError(f"'{name}' is not an array in {self.path}")
            self._arrays[name] = array
        return self._arrays[name]

    def _chunk(self, name: str, index: int) -> NDArray[Any]:
        key = (name, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        array = self._open(name)
        start = index * array.chunks[0]
        stop = min(start + array.chunks[0], self.length(_dims(array)[0]))
        where = f"'{name}', {_dims(array)[0]} {start} to {stop - 1}, in {self.path}"
        # A chunk file that is missing would read as fill values, without an error.
        file = self.chunk_file(name, index)
        if not file.is_file() and array.size:
            raise DamagedStoreError(f"a chunk is missing: {where} ({file.relative_to(self.path)})")
        try:
            block = np.ascontiguousarray(array[start:stop])
        except Exception as error:  # each codec has its own error types
            self._check_same()
            raise DamagedStoreError(f"a chunk is damaged: {where}: {error}") from error
        self._check_same()
        if len(block) != stop - start:
            raise DamagedStoreError(f"the array ends too early: {where}; it has only {array.shape[0]} rows")
        self.bytes_read += block.nbytes
        self._cache[key] = block
        while len(self._cache) > 1 and sum(chunk.nbytes for chunk in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return block

    def _check_same(self) -> None:
        if _place(self.path) != self._place:
            raise StoreFormatError(
                f"{self.path} has been replaced since it was opened: its writer took in more parameters, or it is "
                "another run. Open it again."
            )


def _place(path: Path) -> tuple[int, int] | None:
    """What tells a directory from another one of the same name."""
    return (path.stat().st_dev, path.stat().st_ino) if path.exists() else None


def _dims(array: zarr.Array[Any]) -> tuple[str, ...]:
    names = getattr(array.metadata, "dimension_names", None)
    if not names or any(name is None for name in names):
        raise DamagedStoreError(f"the array '{array.basename}' has lost its dimension names")
    return tuple(str(name) for name in names)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where something is that may not be replaced; delete nothing.

    Raises:
        StoreExistsError: there is.
    """
    if left := _replaced(path):
        raise StoreExistsError(left)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise StoreExistsError(
            f"{path} exists already. Give another path, or overwrite=True to replace the run that is there."
        )
    if not _is_run(path):
        raise StoreExistsError(f"{path} is not a recorded run, so overwrite=True does not delete it.")


def is_published(path: Path) -> bool:
    """Whether a store has something that readers may believe."""
    return (path / COMMIT_FILE).is_file()


def aside(path: Path) -> Path:
    """Where a store is for the moment in which another one takes its place."""
    return path.with_name(f"{path.name}.old.partial")


def _replaced(path: Path) -> str | None:
    """What to say if a writer was killed just when it replaced a store."""
    if path.exists() or not aside(path).exists():
        return None
    return (
        f"the writer of {path} was stopped while it replaced it: the run is at {aside(path)}. Rename that to "
        f"{path.name} to open it or to write over it, or delete it if it is not wanted."
    )


def _is_run(path: Path) -> bool:
    try:
        return "explaind_format" in zarr.open_group(path, mode="r").attrs
    except (OSError, ValueError, KeyError):
        return False


def free_path(directory: Path) -> Path:
    """A path `directory/run-N.zarr` where nothing is yet."""
    return next(path for n in itertools.count(1) if not (path := directory / f"run-{n}.zarr").exists())
