"""The chunked zarr v3 store of a run: arrays that only grow, and a commit that says how far they are valid.

Every array grows along its first axis, whose name is a dimension (`step`, `snapshot`, `row`, …). A writer
first writes all rows of a block, then publishes the new length of every dimension by replacing one small
file. A reader believes only that file, so it sees a prefix of whole steps whenever it looks.
`storage/README.md` is the specification.
"""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec

from explaind.errors import DamagedStoreError, RecordingError, StoreExistsError, StoreFormatError

__all__ = ["FORMAT_VERSION", "Commit", "StoreReader", "StoreWriter", "check_free", "free_path"]

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)
"""Version of the on-disk format, counted apart from the package's."""

_COMMIT_FILE = "commit.json"
_CHUNK_BYTES = 2 << 20
_CHUNK_ROWS = 4096
_CACHE_BYTES = 256 << 20
_FLUSH_BYTES = 8 << 20
_CONFIG: Any = {"write_empty_chunks": True}


@dataclass(frozen=True, kw_only=True)
class Commit:
    """How much of a store is valid."""

    lengths: dict[str, int]
    """Number of valid entries along each growing dimension."""
    arrays: list[str]
    """Names of all arrays."""
    complete: bool
    """Whether the recording ended and will not grow any more."""

    def write(self, store: Path) -> None:
        """Publish atomically: write beside the old file, then rename over it."""
        temporary = store / f"{_COMMIT_FILE}.partial"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(store / _COMMIT_FILE)

    @classmethod
    def read(cls, store: Path) -> Commit:
        """Read the last published commit."""
        if left := _replaced(store):
            raise StoreFormatError(left)
        if not (store / _COMMIT_FILE).is_file():
            what = "no such directory" if not store.is_dir() else f"it has no {_COMMIT_FILE}"
            raise StoreFormatError(
                f"{store} is not a recorded run: {what}. Expected a directory written by explaind.trace; a "
                "run that was stopped before its first block of steps was written leaves nothing to open."
            )
        try:
            content = json.loads((store / _COMMIT_FILE).read_text())
            lengths = {str(name): int(length) for name, length in content["lengths"].items()}
            arrays = [str(name) for name in content["arrays"]]
            return cls(lengths=lengths, arrays=arrays, complete=bool(content["complete"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedStoreError(f"{store / _COMMIT_FILE} cannot be read: {error}") from error


class StoreWriter:
    """Collects rows in memory and writes them block by block; `flush` is the only thing a reader can see.

    Args:
        path: directory of the store.
        attributes: JSON-able description of the run, kept in the root group.
        overwrite: replace a run that is already there (only ever a run: other directories are refused).

    Raises:
        StoreExistsError: something is at `path`, and it may not be replaced.
    """

    def __init__(self, path: Path, *, attributes: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        check_free(path, overwrite=overwrite)
        if path.exists():
            shutil.rmtree(path)
        self._group = zarr.create_group(path, attributes={"explaind_format": FORMAT_VERSION, **attributes})
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._pending: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)
        self._dims: dict[str, tuple[str, ...]] = {}
        self._lengths: dict[str, int] = {}
        self._new_attributes: dict[str, Any] = {}
        self.pending_bytes = 0

    @property
    def wants_flush(self) -> bool:
        """Whether enough rows have gathered to be worth writing."""
        return self.pending_bytes >= _FLUSH_BYTES

    def add(self, name: str, rows: NDArray[Any], dims: tuple[str, ...]) -> None:
        """Append `rows` (first axis: the growing dimension `dims[0]`) to an array at the next flush."""
        self._pending[name].append(rows)
        self._dims.setdefault(name, dims)
        self.pending_bytes += rows.nbytes

    def set_attributes(self, **attributes: Any) -> None:
        """Add to the description of the run at the next flush."""
        self._new_attributes |= attributes

    @property
    def dims(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the dimensions of every array."""
        return self._dims

    def read_row(self, name: str, row: int) -> NDArray[Any]:
        """A row that is written, whether or not it is published."""
        return np.asarray(self._arrays[name][row])

    def flush(self, *, complete: bool = False) -> None:
        """Write all pending rows, then publish them.

        Raises:
            RecordingError: the disk is full. What was published before stays valid.
        """
        with self._need_room():
            self._write_pending()
            lengths: dict[str, int] = {}
            for name, array in self._arrays.items():
                if complete:
                    self._resize(array, self._lengths[name])
                dimension = self._dims[name][0]
                lengths[dimension] = max(lengths.get(dimension, 0), self._lengths[name])
            Commit(lengths=lengths, arrays=sorted(self._arrays), complete=complete).write(self.path)

    def rewrite(
        self, changes: Mapping[str, Callable[[NDArray[Any], int], NDArray[Any]]], *, attributes: Mapping[str, Any]
    ) -> None:
        """Replace the store by one in which the rows of some arrays are others, as many as before.

        It is written beside the store, block by block, and then takes its place: at any moment one of them is whole.
        What is published stays so, and what is not stays so.

        Args:
            changes: by array, gives the new rows for some old ones and the index at which these begin.
            attributes: what the description of the run says from now on.

        Raises:
            RecordingError: the disk is full. The store is as it was.
        """
        beside, aside = self.path.with_name(f"{self.path.name}.new.partial"), _aside(self.path)
        for left in (beside, aside):
            shutil.rmtree(left, ignore_errors=True)
        with self._need_room():
            self._write_pending()
            try:
                self._copy(beside, changes, attributes)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
        self.path.rename(aside)
        beside.rename(self.path)
        shutil.rmtree(aside)
        self._group = zarr.open_group(self.path, mode="r+")
        self._arrays = {
            name: zarr.open_array(self.path, path=name, mode="r+").with_config(_CONFIG) for name in self._arrays
        }

    def _copy(
        self,
        path: Path,
        changes: Mapping[str, Callable[[NDArray[Any], int], NDArray[Any]]],
        attributes: Mapping[str, Any],
    ) -> None:
        changed = [name for name in self._arrays if name in changes]
        left_out = {self.path / name for name in changed} | {self.path / _COMMIT_FILE}
        for file in self.path.rglob("*"):
            if file.is_file() and left_out.isdisjoint([file, *file.parents]):
                copy = path / file.relative_to(self.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        group = zarr.open_group(path, mode="r+")
        group.attrs.update(attributes)
        for name in changed:
            old, length = self._arrays[name], self._lengths[name]
            new = self._create(group, name, changes[name](np.asarray(old[:1]), 0))
            new.resize((length, *new.shape[1:]))
            for start in range(0, length, new.chunks[0]):
                stop = min(start + new.chunks[0], length)
                new[start:stop] = changes[name](np.asarray(old[start:stop]), start)
        if self._is_published():
            shutil.copyfile(self.path / _COMMIT_FILE, path / _COMMIT_FILE)

    def _write_pending(self) -> None:
        for name in list(self._pending):
            self._append(name, np.concatenate(self._pending[name]))
            del self._pending[name]
        if self._new_attributes:
            self._group.attrs.update(self._new_attributes)
            self._new_attributes = {}
        self.pending_bytes = 0

    @contextmanager
    def _need_room(self) -> Iterator[None]:
        needed = self.pending_bytes
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            steps = Commit.read(self.path).lengths.get("step", 0) if self._is_published() else 0
            raise RecordingError(
                f"no room left on the disk for {self.path}: {needed / 2**20:.1f} MiB more are "
                f"needed. The first {steps} steps are safe there and can be opened; free some space or choose "
                "another place for the next run."
            ) from error

    def _is_published(self) -> bool:
        return (self.path / _COMMIT_FILE).is_file()

    def _append(self, name: str, rows: NDArray[Any]) -> None:
        array = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = self._create(self._group, name, rows)
            self._lengths[name] = 0
        start = self._lengths[name]
        stop = start + len(rows)
        if stop > array.shape[0]:
            self._resize(array, max(stop, 2 * array.shape[0]))
        array[start:stop] = rows
        self._lengths[name] = stop

    @staticmethod
    def _resize(array: zarr.Array[Any], length: int) -> None:
        if length != array.shape[0]:
            array.resize((length, *array.shape[1:]))

    def _create(self, group: zarr.Group, name: str, rows: NDArray[Any]) -> zarr.Array[Any]:
        row_bytes = max(1, rows.nbytes // max(1, len(rows)))
        chunk_rows = int(np.clip(_CHUNK_BYTES // row_bytes, 1, _CHUNK_ROWS))
        # Bytes of the same element at successive steps are alike: they compress best side by side.
        along_steps = rows.ndim == 2 and rows.dtype.kind == "f"
        return group.create_array(
            name,
            shape=(0, *rows.shape[1:]),
            chunks=(chunk_rows, *(max(1, size) for size in rows.shape[1:])),
            dtype=rows.dtype,
            filters=[TransposeCodec(order=(1, 0))] if along_steps else None,
            compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=rows.itemsize), Crc32cCodec()],
            fill_value=np.nan if rows.dtype.kind == "f" else 0,
            dimension_names=self._dims[name],
            config=_CONFIG,
        )


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
        for name in self.commit.arrays:
            if not (path / name / "zarr.json").is_file():
                raise DamagedStoreError(f"the array '{name}' is missing from {path}")
        self._cache: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()

    def length(self, dimension: str) -> int:
        """Number of valid entries along a growing dimension."""
        return self.commit.lengths.get(dimension, 0)

    def names(self, group: str) -> list[str]:
        """Names of the arrays in a sub-group, sorted."""
        return [name.removeprefix(f"{group}/") for name in self.commit.arrays if name.startswith(f"{group}/")]

    def has(self, name: str) -> bool:
        """Whether the store has this array."""
        return name in self.commit.arrays

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start:stop` of an array; without `stop`, up to the last published one."""
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
        file = self.path.joinpath(name, "c", str(index), *["0"] * (array.ndim - 1))
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


def _aside(path: Path) -> Path:
    """Where a store is for the moment in which another one takes its place."""
    return path.with_name(f"{path.name}.old.partial")


def _replaced(path: Path) -> str | None:
    """What to say if a writer was killed just when it replaced a store."""
    if path.exists() or not _aside(path).exists():
        return None
    return (
        f"the writer of {path} was stopped while it replaced it: the run is at {_aside(path)}. Rename that to "
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
