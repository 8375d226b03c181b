"""Object storage as `fsspec` reaches it: what stores need of it, with the names that `pathlib.Path` has for them.

Objects are put whole or not at all, but can be neither renamed nor locked, and there are no directories: what is below
a name are the objects whose names begin with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from explaind.errors import StoreUnreachableError

__all__ = ["RemotePath", "reached"]


class RemotePath:
    """An object, or what lies below a name, given by a URL such as `s3://bucket/run.zarr`.

    Whatever goes wrong on the way there is a `StoreUnreachableError`, but for a `FileNotFoundError` where nothing is.

    Args:
        url: an URL that fsspec knows.

    Raises:
        ImportError: the package for storage of this kind is not installed.
        ValueError: it is of no kind that fsspec knows.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise ImportError(f"{url} is read and written with fsspec: pip install fsspec.") from error
        self._url = url.rstrip("/")
        with reached(url):
            self._fs, key = url_to_fs(self._url)
        self._key: str = key.rstrip("/")

    def _other(self, url: str, key: str) -> Self:
        other = object.__new__(type(self))
        other._url, other._fs, other._key = url, self._fs, key
        return other

    def __truediv__(self, name: str) -> Self:
        return self._other(f"{self._url}/{name}", f"{self._key}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._url.rpartition("/")[2]

    def resolve(self) -> Self:
        """The same: it is a whole URL."""
        return self

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    # ------------------------------------------------------------------ reading

    def read(self, most: int) -> bytes:
        """The first bytes of an object, all if it has no more than `most`.

        Raises:
            FileNotFoundError: there is none.
        """
        try:
            with reached(self._url):
                return bytes(self._fs.cat_file(self._key, start=0, end=most))
        except StoreUnreachableError as error:
            if "not satisfiable" in str(error.__cause__):  # as S3 says of objects without bytes
                return b""
            raise

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        self._fs.invalidate_cache()
        try:
            with reached(self._url):
                return bool(self._fs.info(self._key)["type"] == "file")
        except FileNotFoundError:
            return False

    def exists(self) -> bool:
        """Whether there is an object of or below this name; directories without any, where they exist, do not count."""
        self._fs.invalidate_cache()
        try:
            with reached(self._url):
                return any(files for _, _, files in self._fs.walk(self._key, on_error="raise"))
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there is an object below this name."""
        return self.exists()

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Every object below this name, by its name from here on, and its size."""
        self._fs.invalidate_cache()
        with reached(self._url):
            found = self._fs.find(self._key, detail=True)
        for key, info in found.items():
            yield key.removeprefix(f"{self._key}/"), info["size"]

    # ------------------------------------------------------------------ writing

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Write objects below this name, each as a whole, in any order; they are there when this returns."""
        with reached(self._url):
            self._fs.pipe({f"{self._key}/{name}": content for name, content in objects.items()})

    def upload(self, directory: Path, *, last: Sequence[str]) -> None:
        """Write the files of a directory below this name; some, if they are there, after all others and in order."""
        names = [file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()]
        for part in ([name for name in names if name not in last], *([name] for name in last)):
            if there := [name for name in part if name in names]:
                with reached(self._url):
                    self._fs.put([str(directory / name) for name in there], [f"{self._key}/{name}" for name in there])

    def clear(self, *, first: str, last: str) -> None:
        """Delete all objects below this name; one of them before, and one after all others."""
        names = [name for name, _ in self.sizes()]
        for part in ([first], [name for name in names if name not in (first, last)], [last]):
            if there := [f"{self._key}/{name}" for name in part if name in names]:
                with reached(self._url):
                    self._fs.rm(there)


@contextmanager
def reached(url: Any) -> Iterator[None]:
    """Say that storage cannot be reached, whatever its client raises.

    Raises:
        StoreUnreachableError: the client failed.
        FileNotFoundError: it works, but there is no such object.
        ImportError: it is not installed.
        ValueError: there is no client for this kind of URL.
    """
    try:
        yield
    except (FileNotFoundError, StoreUnreachableError):
        raise
    except ImportError as error:
        raise ImportError(f"{url} cannot be reached without another package: {error}.") from error
    except Exception as error:  # each client has its own error types
        if str(error).startswith("Protocol not known"):
            raise ValueError(
                f"{url} is of no kind that fsspec knows; expected one such as s3://bucket/name."
            ) from error
        raise StoreUnreachableError(
            f"{url} cannot be reached: {error!r:.500}. Look at the address, the credentials and the network."
        ) from error
