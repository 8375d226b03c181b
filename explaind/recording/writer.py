"""Writes a store in a thread of its own, block by block, while the training loop fills the next block."""

from __future__ import annotations

import copy
import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from explaind.errors import RecordingError
from explaind.recording.chunks import GrowingArray, rows_of_a_chunk
from explaind.store import COMMIT_FILE, FORMAT_VERSION, Commit, aside, check_free, is_published

__all__ = ["Later", "Rows", "StoreWriter"]

Rows = tuple[str, NDArray[Any], tuple[str, ...]]
"""An array's name, some new rows of it, and the names of its dimensions, the growing one first."""

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class Later:
    """Rows that are made when they are written, in the thread that writes."""

    make: Callable[[], Sequence[Rows]]
    num_bytes: int
    """Size of what it is made from."""


@dataclass(eq=False)
class _Block:
    """What is to be written next: new rows, and news for the description of the run."""

    rows: list[Rows | Later] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0


class StoreWriter:
    """Collects rows to a block and writes it in the background; a reader sees only whole blocks.

    While a block is written the next one is filled, and no more than that: `flush` waits for the block before. What
    goes wrong in the background is raised by the next `check`, `flush`, `wait` or `close`, and nothing is written
    after it.

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
        zarr.create_group(path, attributes={"explaind_format": FORMAT_VERSION, **attributes})
        self._arrays: dict[str, GrowingArray] = {}
        self._dims: dict[str, tuple[str, ...]] = {}
        # The last block is being filled. An interrupt can strike anywhere: what hands blocks over is one append.
        self._blocks = [_Block()]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explaind-writer")
        self._written: Future[None] = Future()
        self._written.set_result(None)

    # ------------------------------------------------------------------ in the thread of the loop

    @property
    def wants_flush(self) -> bool:
        """Whether enough rows have gathered to be worth writing."""
        return self._blocks[-1].num_bytes >= _BLOCK_BYTES

    @property
    def is_writing(self) -> bool:
        """Whether a block is being written."""
        return not self._written.done()

    def add(self, *rows: Rows | Later) -> None:
        """Append rows to arrays, all or none; they must not change any more."""
        block = self._blocks[-1]
        block.rows.extend(rows)
        block.num_bytes += sum(entry.num_bytes if isinstance(entry, Later) else entry[1].nbytes for entry in rows)

    def set_attributes(self, **attributes: Any) -> None:
        """Add to the description of the run."""
        self._blocks[-1].attributes |= copy.deepcopy(attributes)

    def check(self) -> None:
        """Raise what went wrong in the background, if something has.

        Raises:
            RecordingError: the disk is full, or the store was deleted. What was published before stays valid.
            OSError: it cannot be written for another reason.
        """
        if self._written.done():
            self._written.result()

    def wait(self) -> None:
        """Wait until all that was handed over is written; raises what `check` does."""
        self._written.result()

    def flush(self) -> None:
        """Hand the block over to be written and published, once the one before it is; raises what `check` does."""
        self.wait()
        self._blocks.append(_Block())
        self._written = self._thread.submit(self._publish)

    def close(self) -> None:
        """Write what is left, mark the run as complete, and end the thread; raises what `check` does."""
        try:
            self.flush()
            self.wait()
            self._written = self._thread.submit(self._complete)
            self.wait()
        finally:
            self._thread.shutdown()

    # ------------------------------------------------------------------ in the thread of its own

    def _publish(self) -> None:
        while len(self._blocks) > 1:
            with self._explained(self._blocks[0].num_bytes):
                # Before zarr would make the directory again.
                (self.path / "zarr.json").stat()
                self._write(self._blocks[0])
                self._commit(complete=False)
            del self._blocks[0]

    def _complete(self) -> None:
        with self._explained(0):
            for array in self._arrays.values():
                array.trim()
            self._commit(complete=True)

    def _write(self, block: _Block) -> None:
        gathered: dict[str, list[NDArray[Any]]] = {}
        for entry in block.rows:
            for name, rows, dims in entry.make() if isinstance(entry, Later) else [entry]:
                gathered.setdefault(name, []).append(rows)
                self._dims.setdefault(name, dims)
        for name, parts in gathered.items():
            if name not in self._arrays:
                share = min(1.0, block.num_bytes / _BLOCK_BYTES)
                chunk_rows = rows_of_a_chunk(parts[0], round(sum(map(len, parts)) / max(share, 1e-3)))
                self._arrays[name] = GrowingArray(self.path, name, self._dims[name], parts[0], chunk_rows)
            self._arrays[name].append(*parts)
        if block.attributes:
            zarr.open_group(self.path, mode="r+").attrs.update(block.attributes)

    def _commit(self, *, complete: bool) -> None:
        lengths: dict[str, int] = {}
        for name, array in self._arrays.items():
            dimension = self._dims[name][0]
            lengths[dimension] = min(lengths.get(dimension, array.length), array.length)
        Commit(lengths=lengths, arrays=sorted(self._arrays), complete=complete).write(self.path)

    @contextmanager
    def _explained(self, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not (self.path / "zarr.json").is_file():
                raise RecordingError(
                    f"{self.path} was deleted or moved while it was recorded. Leave it where it is until the traced "
                    "block has ended, or record to another place."
                ) from error
            if error.errno != errno.ENOSPC:
                raise
            steps = Commit.read(self.path).num_steps if is_published(self.path) else 0
            raise RecordingError(
                f"no room left on the disk for {self.path}: {num_bytes / 2**20:.1f} MiB more are "
                f"needed. The first {steps} steps are safe there and can be opened; free some space or choose "
                "another place for the next run."
            ) from error

    # ------------------------------------------------------------------ rows with more entries

    @property
    def dims(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the dimensions of every array that is written."""
        return self._dims

    def read_row(self, name: str, row: int) -> NDArray[Any]:
        """A row that is written."""
        return np.asarray(self._arrays[name].read(row, row + 1)[0])

    def rewrite(
        self, changes: Mapping[str, Callable[[NDArray[Any], int], NDArray[Any]]], *, attributes: Mapping[str, Any]
    ) -> None:
        """Replace the store by one in which the rows of some arrays are others, as many as before.

        It is written beside the store, block by block, and then takes its place: at any moment one of them is whole.
        Call `flush` and `wait` before it.

        Args:
            changes: by array, gives the new rows for some old ones and the index at which these begin.
            attributes: what the description of the run says from now on.

        Raises:
            RecordingError: the disk is full. The store is as it was.
        """
        beside, old = self.path.with_name(f"{self.path.name}.new.partial"), aside(self.path)
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)
        with self._explained(0):
            try:
                changed = self._copy(beside, changes, attributes)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
        self.path.rename(old)
        beside.rename(self.path)
        shutil.rmtree(old)
        self._arrays |= changed
        for array in self._arrays.values():
            array.attach(self.path)

    def _copy(
        self,
        path: Path,
        changes: Mapping[str, Callable[[NDArray[Any], int], NDArray[Any]]],
        attributes: Mapping[str, Any],
    ) -> dict[str, GrowingArray]:
        names = [name for name in self._arrays if name in changes]
        left_out = {self.path / name for name in names} | {self.path / COMMIT_FILE}
        for file in self.path.rglob("*"):
            if file.is_file() and left_out.isdisjoint([file, *file.parents]):
                copied = path / file.relative_to(self.path)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copied)
        zarr.open_group(path, mode="r+").attrs.update(attributes)
        changed = {name: self._changed(path, name, changes[name]) for name in names}
        shutil.copyfile(self.path / COMMIT_FILE, path / COMMIT_FILE)
        return changed

    def _changed(self, path: Path, name: str, change: Callable[[NDArray[Any], int], NDArray[Any]]) -> GrowingArray:
        old = self._arrays[name]
        new = GrowingArray(path, name, self._dims[name], change(old.read(0, 1), 0), old.chunk_rows)
        for start in range(0, old.length, new.chunk_rows):
            stop = min(start + new.chunk_rows, old.length)
            new.append(change(old.read(start, stop), start))
        return new
