"""Where a run is, or may be written."""

from __future__ import annotations

import itertools
from pathlib import Path

from explaind.errors import StoreExistsError, StoreUnreachableError
from explaind.metadata import read_json
from explaind.places import Place
from explaind.remote import RemotePath

__all__ = ["aside", "check_free", "free_path", "interrupted"]


def check_free(path: Place, *, overwrite: bool) -> None:
    """Refuse a path where something is that may not be replaced; delete nothing.

    Raises:
        StoreExistsError: there is.
    """
    if left := interrupted(path):
        raise StoreExistsError(left)
    if not path.exists() or (isinstance(path, Path) and path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise StoreExistsError(
            f"{path} exists already. Give another path, or overwrite=True to replace the run that is there."
        )
    if not _is_run(path):
        raise StoreExistsError(f"{path} is not a recorded run, so overwrite=True does not delete it.")


def aside(path: Path) -> Path:
    """Where a store is for the moment in which another one takes its place."""
    return path.with_name(f"{path.name}.old.partial")


def interrupted(path: Place) -> str | None:
    """What to say if a writer was killed just when it replaced a store."""
    if isinstance(path, RemotePath) or path.exists() or not aside(path).exists():
        return None
    return (
        f"the writer of {path} was stopped while it replaced it: the run is at {aside(path)}. Rename that to "
        f"{path.name} to open it or to write over it, or delete it if it is not wanted."
    )


def _is_run(path: Place) -> bool:
    try:
        return "explaind_format" in read_json(path / "zarr.json")["attributes"]
    except StoreUnreachableError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return False


def free_path(directory: Path) -> Path:
    """A path `directory/run-N.zarr` where nothing is yet."""
    return next(path for n in itertools.count(1) if not (path := directory / f"run-{n}.zarr").exists())
