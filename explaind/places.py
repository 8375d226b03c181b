"""Where a store is: a directory of this machine, or a name in object storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from explaind.remote import RemotePath

__all__ = ["Place", "file_sizes", "place_of", "read_each", "read_file"]

Place: TypeAlias = Path | RemotePath
"""A directory or file, or what stands for it in object storage."""

_READ_AT_ONCE = 16

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def place_of(store: str | Place) -> Place:
    """The place that a path or a URL names.

    Raises:
        ValueError: it is a URL that was made a `Path`, one of a directory without its whole path, or of unknown kind.
        ImportError: the package for storage of this kind is not installed.

    Example:
        >>> place_of("storage/run.zarr"), place_of("file:///runs/one.zarr"), place_of("memory://run.zarr")
        (PosixPath('storage/run.zarr'), PosixPath('/runs/one.zarr'), RemotePath('memory://run.zarr'))
    """
    if isinstance(store, RemotePath):
        return store
    if isinstance(store, Path):
        if store.parts and len(scheme := store.parts[0]) > 2 and scheme.endswith(":") and not Path(scheme).exists():
            raise ValueError(f"{store} was a URL before it became a Path, which has one slash less: give it as a text.")
        return store
    if "://" not in store:
        return Path(store)
    if not store.startswith("file:"):
        return RemotePath(store)
    parts = urlsplit(store)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{store} does not have the whole path of a directory; expected file:///path/to/run.zarr.")
    return Path(url2pathname(parts.path))


def read_file(file: Place, *, most: int) -> bytes:
    """The content of a file, before which memory is taken only for so many bytes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has more than `most` bytes.
    """
    if isinstance(file, RemotePath):
        content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        return content
    if not file.is_file():
        raise FileNotFoundError("it is missing")
    if file.stat().st_size > most:
        raise ValueError(f"it has {file.stat().st_size:,} bytes")
    return file.read_bytes()


def read_each(place: Place, read: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """What is read of each item; some at once where every request takes its time."""
    if isinstance(place, Path):
        return [read(item) for item in items]
    with ThreadPoolExecutor(_READ_AT_ONCE) as threads:
        return list(threads.map(read, items))


def file_sizes(place: Place) -> Iterator[tuple[str, int]]:
    """Every file by its place below a directory, and its size."""
    if isinstance(place, RemotePath):
        yield from place.sizes()
        return
    for file in place.rglob("*"):
        try:
            if file.is_file():
                yield file.relative_to(place).as_posix(), file.stat().st_size
        except FileNotFoundError:  # a writer renamed it just now
            continue
