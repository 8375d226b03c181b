"""Writes a store in a thread of its own, block by block, while the training loop fills the next block."""

from __future__ import annotations

import atexit
import copy
import errno
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explaind.commit import COMMIT_FILE, Commit, is_published, new_id, thinned
from explaind.errors import RecordingError, StoreUnreachableError
from explaind.metadata import read_attributes
from explaind.paths import check_free
from explaind.places import Place
from explaind.recording.begun import Begun
from explaind.recording.chunks import GrowingArray, describe, rows_of_a_chunk
from explaind.recording.files import force
from explaind.recording.lock import Lock, lock_of
from explaind.recording.replacing import another, replaceable
from explaind.recording.uploads import files_of
from explaind.store import FORMAT_VERSION

__all__ = ["Later", "Rows", "StoreWriter"]

Rows = tuple[str, NDArray[Any], tuple[str, ...]]
"""An array's name, some new rows of it, and the names of its dimensions, the growing one first."""

_BLOCK_BYTES = 4 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHEAP_SECONDS, _SHARE, _POSTPONED_SECONDS = 0.02, 0.1, 10.0
"""What publishing may take: so long, or that part of the time, if it need not be postponed for longer than that."""


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
        path: directory of the store, or its name in object storage.
        attributes: JSON-able description of the run, kept in the root group.
        overwrite: replace a run that is already there (only ever a run: other directories are refused).
        durable: force every block to the device before it is published; object storage does that always.
        lock: the lock on the store, if the caller has it already.
        begun: go on with the store that is there.

    Raises:
        StoreExistsError: something is at `path`, and it may not be replaced.
        StoreInUseError: another writer is at work there.
        StoreUnreachableError: object storage cannot be written.
    """

    def __init__(
        self,
        path: Place,
        *,
        attributes: Mapping[str, Any],
        overwrite: bool,
        durable: bool = False,
        lock: Lock | None = None,
        begun: Begun | None = None,
    ) -> None:
        self.path = path.resolve()  # the loop may change its directory
        self._files = files_of(self.path)
        self._durable, self._id = durable and isinstance(path, Path), new_id()
        self._lock = lock or lock_of(self.path)
        self._commit_seconds, self._committed = 0.0, time.monotonic()
        self._num_commits, self._earlier = 0, dict[int, Commit]()
        self._arrays: dict[str, GrowingArray] = {}
        self._dims: dict[str, tuple[str, ...]] = {}
        # The last block is being filled. An interrupt can strike anywhere: what hands blocks over is one append.
        self._blocks = [_Block()]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explaind-writer")
        self._written: Future[None] = Future()
        self._written.set_result(None)
        try:
            if begun is None:
                check_free(self.path, overwrite=overwrite)  # another one may have written since it was last looked at
                self._create({"explaind_format": FORMAT_VERSION, **attributes})
            else:
                self._go_on(begun, attributes)
        except BaseException:
            self._lock.release()
            raise
        self._process = os.getpid()
        # It must not keep alive what nobody uses any more, as that holds the lock.
        self._at_exit = partial(_publish_last, weakref.ref(self))
        atexit.register(self._at_exit)

    # ------------------------------------------------------------------ in the thread of the loop

    @property
    def wants_flush(self) -> bool:
        """Whether enough rows have gathered to be worth writing."""
        return self.num_bytes >= _BLOCK_BYTES

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows that have gathered."""
        return self._blocks[-1].num_bytes

    def will_want_flush(self, num_bytes: int) -> bool:
        """Whether enough rows will have gathered after so many bytes more."""
        return self.num_bytes + num_bytes >= _BLOCK_BYTES

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
            self._lock.release()
            atexit.unregister(self._at_exit)

    def publish_last(self) -> None:
        """The interpreter ends, and nobody has closed: publish what is written, however shortly before."""
        is_ours = self._process == os.getpid() and isinstance(self.path, Path)  # else it is the process that forked
        if is_ours and self._written.done() and self._written.exception() is None:
            with suppress(OSError):
                self._commit(complete=False)

    # ------------------------------------------------------------------ in the thread of its own

    def _publish(self) -> None:
        while len(self._blocks) > 1:
            with self._explained(self._blocks[0].num_bytes):
                if self._is_due or isinstance(self.path, Path):  # asking object storage takes its time
                    self._check_there()
                self._write(self._blocks[0])
                if self._is_due:
                    self._commit(complete=False)
            del self._blocks[0]

    def _check_there(self) -> None:
        if not (self.path / "zarr.json").is_file():
            raise FileNotFoundError(f"{self.path} is gone")

    @property
    def _is_due(self) -> bool:
        """Whether a block is published at once: forcing it may take a slow device longer than the loop can wait."""
        pause = min(self._commit_seconds / _SHARE, _POSTPONED_SECONDS)
        return self._commit_seconds < _CHEAP_SECONDS or time.monotonic() - self._committed >= pause

    def _complete(self) -> None:
        with self._explained(0):
            self._check_there()
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
                if isinstance(self.path, Path):  # where a writer that was killed may have begun it
                    shutil.rmtree(self.path / name, ignore_errors=True)
                self._arrays[name] = GrowingArray(
                    self.path, name, self._dims[name], parts[0], chunk_rows, durable=self._durable, files=self._files
                )
            self._arrays[name].append(*parts)
        if block.attributes:
            self._describe(self.path, block.attributes)

    def _describe(self, store: Place, attributes: Mapping[str, Any]) -> None:
        """Add to the attributes of a store's root group."""
        self._files.send()
        describe(store, read_attributes(store) | dict(attributes), durable=self._durable, files=self._files)

    def _commit(self, *, complete: bool) -> None:
        began = time.monotonic()
        files = [file for array in self._arrays.values() for file in array.settle()]
        if self._durable:
            force(files, self.path)
        self._files.send()
        commit = replace(self._state_of(self._arrays), complete=complete)
        self._put_commit(self.path, replace(commit, earlier=tuple(self._earlier.values())))
        self._earlier = thinned(self._earlier | {self._num_commits: commit})
        self._num_commits += 1
        self._committed = time.monotonic()
        self._commit_seconds = self._committed - began

    def _state_of(self, arrays: Mapping[str, GrowingArray]) -> Commit:
        """What can be published of some arrays."""
        lengths: dict[str, int] = {}
        for name, array in arrays.items():
            dimension = self._dims[name][0]
            lengths[dimension] = min(lengths.get(dimension, array.length), array.length)
        tails = {
            name: array.tail if array.length == lengths[self._dims[name][0]] else None
            for name, array in sorted(arrays.items())
        }
        return Commit(lengths=lengths, arrays=tails, complete=False)

    def _put_commit(self, store: Place, commit: Commit) -> None:
        content = replace(commit, id=self._id).to_json()
        self._files.put(f"{store}/{COMMIT_FILE}", content.encode(), force=self._durable)
        self._files.send()
        if self._durable:
            force([], store)

    def _go_on(self, begun: Begun, attributes: Mapping[str, Any]) -> None:
        """Take over a store; if what is published is damaged while its end is replaced, all before that counts."""
        self._arrays, self._dims = dict(begun.arrays), dict(begun.dims)
        for commit in (*begun.published.earlier, self._state_of(self._arrays)):
            self._earlier = thinned(self._earlier | {self._num_commits: commit})
            self._num_commits += 1
        self._put_commit(self.path, replace(begun.published, complete=False, earlier=tuple(self._earlier.values())))
        self.set_attributes(**attributes)

    # ------------------------------------------------------------------ stores that take another's place

    def _create(self, attributes: Mapping[str, Any]) -> None:
        """Make an empty store, beside one that it replaces, or after it where nothing can be renamed."""
        if isinstance(self.path, Path):
            with another(self.path, durable=self._durable) as beside:
                beside.mkdir()
                self._begin(beside, attributes)
        else:
            self.path.clear(first=COMMIT_FILE, last="zarr.json")
            self._begin(self.path, attributes)

    def _begin(self, store: Place, attributes: Mapping[str, Any]) -> None:
        describe(store, attributes, files=self._files)
        self._files.send()
        self._put_commit(store, Commit(lengths={}, arrays={}, complete=False))

    @contextmanager
    def _explained(self, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except StoreUnreachableError:
            raise
        except OSError as error:
            if not (self.path / "zarr.json").is_file():
                raise RecordingError(
                    f"{self.path} was deleted or moved while it was recorded. Leave it where it is until the traced "
                    "block has ended, or record to another place."
                ) from error
            steps = Commit.read(self.path).num_steps if is_published(self.path) else 0
            safe = f"The first {steps} steps are safe there and can be opened;"
            if error.errno in _NO_ROOM:
                raise RecordingError(
                    f"no room left on the disk for {self.path}: {num_bytes / 2**20:.1f} MiB more are "
                    f"needed. {safe} free some space or choose another place for the next run."
                ) from error
            raise RecordingError(
                f"{self.path} cannot be written any more: {error}. {safe} see to the disk, or choose another place "
                "for the next run."
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
            RecordingError: the disk is full, or it is object storage. The store is as it was.
        """
        path = replaceable(self.path)
        with self._explained(0):
            self._commit(complete=False)
            self._id = new_id()
            with another(path, durable=self._durable) as beside:
                changed = self._copy(path, beside, changes, attributes)
        self._arrays |= changed
        self._earlier = {}
        for array in self._arrays.values():
            array.attach(self.path)

    def _copy(
        self,
        old: Path,
        path: Path,
        changes: Mapping[str, Callable[[NDArray[Any], int], NDArray[Any]]],
        attributes: Mapping[str, Any],
    ) -> dict[str, GrowingArray]:
        names = [name for name in self._arrays if name in changes]
        left_out = {old / name for name in names} | {old / COMMIT_FILE}
        for file in old.rglob("*"):
            if file.is_file() and left_out.isdisjoint([file, *file.parents]):
                copied = path / file.relative_to(old)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copied)
        self._describe(path, attributes)
        changed = {name: self._changed(path, name, changes[name]) for name in names}
        self._put_commit(path, self._state_of(self._arrays | changed))
        return changed

    def _changed(self, path: Path, name: str, change: Callable[[NDArray[Any], int], NDArray[Any]]) -> GrowingArray:
        old = self._arrays[name]
        like = change(old.read(0, 1), 0)
        new = GrowingArray(path, name, self._dims[name], like, old.chunk_rows, durable=self._durable)
        for start in range(0, old.length, new.chunk_rows):
            stop = min(start + new.chunk_rows, old.length)
            new.append(change(old.read(start, stop), start))
        new.settle()
        return new


def _publish_last(writer: weakref.ref[StoreWriter]) -> None:
    """At the end of the interpreter, if the writer is still there."""
    if (found := writer()) is not None:
        found.publish_last()
