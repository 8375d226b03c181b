"""A store that takes the place of another one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from explaind.errors import RecordingError
from explaind.paths import aside
from explaind.places import Place
from explaind.recording.files import force, force_tree

__all__ = ["another", "replaceable"]


@contextmanager
def another(path: Path, *, durable: bool) -> Iterator[Path]:
    """Where to make a store that takes the place of the one that is there; at any moment one of them is whole.

    Args:
        path: directory of the store.
        durable: whether the new one must be on the device before it takes the place.
    """
    beside, old = path.with_name(f"{path.name}.new.partial"), aside(path)
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield beside
        if durable:
            force_tree(beside)
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if durable:
        force([], path.parent)
    shutil.rmtree(old, ignore_errors=True)


def replaceable(store: Place) -> Path:
    """The directory of a store, whose place another one can take at once.

    Raises:
        RecordingError: it is in object storage.
    """
    if isinstance(store, Path):
        return store
    raise RecordingError(
        f"the optimizer was given more parameters, for which {store} has to be replaced as a whole: in object storage "
        "that cannot be done at once. The steps before are safe there. Record to a directory instead, and bring the "
        "run there with run.export(url)."
    )
