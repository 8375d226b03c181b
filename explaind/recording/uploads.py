"""Files of a store that is written to object storage."""

from __future__ import annotations

from pathlib import Path

from explaind.places import Place
from explaind.recording.files import LOCAL, Files
from explaind.remote import RemotePath

__all__ = ["Uploads", "files_of"]

_LARGEST_BYTES = 8 << 20


class Uploads:
    """Files on their way below a name in object storage: they are collected, and sent at once, as each takes its time.

    Args:
        store: the name, below which all of them are.
    """

    def __init__(self, store: RemotePath) -> None:
        self._store = store
        self._waiting: dict[str, bytes] = {}
        self._num_bytes = 0

    def put(self, file: str, *parts: bytes, force: bool = False) -> None:
        """Take in a file; it replaces one of the same name. Forcing means nothing there: what is there is safe."""
        content = b"".join(parts)
        self._waiting[file.removeprefix(f"{self._store}/")] = content
        self._num_bytes += len(content)
        if self._num_bytes >= _LARGEST_BYTES:
            self.send()

    def make_directory(self, directory: str) -> None:
        """There are none."""

    def send(self) -> None:
        """Send what was taken in, in any order; all of it is there when this returns."""
        if not self._waiting:
            return
        waiting, self._waiting, self._num_bytes = self._waiting, {}, 0
        self._store.put(waiting)


def files_of(store: Place) -> Files:
    """How the files of a store are written."""
    return LOCAL if isinstance(store, Path) else Uploads(store)
