"""Files that are written as a whole, or not at all, and forced to the device where that was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from explaind.places import Place

__all__ = ["LOCAL", "Files", "force", "force_tree", "put"]


class Files(Protocol):
    """How the files of a store are written, by the texts of their whole names."""

    def put(self, file: str, *parts: bytes, force: bool = False) -> None:
        """Write a file as a whole, at the latest with the next `send`."""
        ...

    def make_directory(self, directory: str) -> None:
        """Make a directory in one that must be there."""
        ...

    def send(self) -> None:
        """See to it that a reader finds all that was put."""
        ...


class _Local:
    """Files of this machine."""

    def put(self, file: str, *parts: bytes, force: bool = False) -> None:
        """See `put`."""
        put(file, *parts, force=force)

    def make_directory(self, directory: str) -> None:
        """See `Files.make_directory`."""
        Path(directory).mkdir(exist_ok=True)

    def send(self) -> None:
        """Everything is there already."""


def put(file: str, *parts: bytes, force: bool = False) -> None:
    """Write a file beside the old one, then rename it; with `force` its content reaches the device before its name.

    Each call of the system lets the loop have the interpreter, and has to get it back, which may take 0.1 ms of both:
    there are no more of them than it takes.
    """
    descriptor = os.open(f"{file}.partial", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        left = sum(map(len, parts)) - os.writev(descriptor, parts)
        while left:
            left -= os.write(descriptor, b"".join(parts)[-left:])
        if force:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(f"{file}.partial", file)  # noqa: PTH105 (a Path takes as long as the file itself)


LOCAL: Files = _Local()
"""How files of this machine are written."""


def force(files: Iterable[str], root: Place) -> None:
    """Force files to the device, and the directories from them up to `root`, in which their names are."""
    directories: dict[str, None] = {}
    for file in files:
        _force(file)
        parent = os.path.dirname(file)  # noqa: PTH120 (these are many, and texts)
        while len(parent) > len(str(root)):
            directories[parent] = None
            parent = os.path.dirname(parent)  # noqa: PTH120
    for directory in [*directories, str(root)]:
        _force(directory)


def force_tree(directory: Path) -> None:
    """Force all that is in a directory to the device."""
    force([str(file) for file in directory.rglob("*") if file.is_file()], directory)


def _force(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
