"""One writer for each store: a lock that the operating system takes back from a process that dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
import weakref
from pathlib import Path
from typing import Protocol

from explaind.errors import StoreInUseError
from explaind.places import Place

__all__ = ["Lock", "WriterLock", "lock_of"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class Lock(Protocol):
    """Something that a writer holds."""

    def release(self) -> object:
        """Let others write."""
        ...


class _NoLock:
    """What a writer to object storage holds: there are no locks."""

    def release(self) -> None:
        """There is nothing to release."""


def lock_of(store: Place) -> Lock:
    """Keep other writers away from a store, where that is possible.

    Raises:
        StoreInUseError: another recorder writes it.
    """
    return WriterLock(store.resolve()) if isinstance(store, Path) else _NoLock()


class WriterLock:
    """Keeps other writers away from a store until it is released, or this process ends in whatever way.

    It is a lock on a file beside the store, so that it also holds while one store takes the place of another.

    Args:
        store: the directory, which need not exist.

    Raises:
        StoreInUseError: another recorder holds it, in this process or in another.
    """

    def __init__(self, store: Path) -> None:
        file = store.with_name(f"{store.name}.lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open(file, store)
        # Who has released it meanwhile has deleted the file, and a lock on that would keep nobody out.
        while not _is_still(file, descriptor):
            os.close(descriptor)
            descriptor = _open(file, store)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._descriptor = descriptor
        self.release = weakref.finalize(self, _release, file, descriptor)
        """Let others write."""
        _HELD.add(self)

    def leave_to_parent(self) -> None:
        """In a process that was forked: the lock is the parent's."""
        if self.release.detach():
            os.close(self._descriptor)


_HELD: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for lock in list(_HELD):
        lock.leave_to_parent()


# A worker of a data loader has what its parent has open, and may live a little longer.
os.register_at_fork(after_in_child=_leave_all_to_parent)


def _open(file: Path, store: Path) -> int:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise StoreInUseError(
            f"{store} is being written by {holder}. Wait until that recording has ended, or record to another place."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        warnings.warn(
            f"the file system of {store} has no locks: make sure that nothing else records to it.",
            RuntimeWarning,
            stacklevel=2,
        )
    return descriptor


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(file: Path, descriptor: int) -> None:
    file.unlink(missing_ok=True)
    os.close(descriptor)
