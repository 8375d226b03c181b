"""Files that are written as a whole, or not at all, and forced to the device where that was asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from explaind.paths import aside

__all__ = ["force", "force_tree", "put", "replacement"]


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


def force(files: Iterable[str], root: Path) -> None:
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


@contextmanager
def replacement(store: Path, *, durable: bool) -> Iterator[Path]:
    """Where to make a store that takes the place of the one that is there; at any moment one of them is whole."""
    beside, old = store.with_name(f"{store.name}.new.partial"), aside(store)
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield beside
        if durable:
            force_tree(beside)
        if store.exists():
            store.rename(old)
        beside.rename(store)
    except BaseException:
        if old.exists() and not store.exists():
            old.rename(store)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if durable:
        force([], store.parent)
    shutil.rmtree(old, ignore_errors=True)


def _force(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
