"""The arrays of a store that is continued, cut to what stays of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from explaind.commit import Commit
from explaind.errors import ResumeError
from explaind.metadata import ArrayMetadata
from explaind.recording.chunks import GrowingArray
from explaind.store import StoreReader

__all__ = ["Begun", "attach"]


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What an earlier writer has left of a store that is continued."""

    arrays: dict[str, GrowingArray]
    """Its arrays, which end where it goes on."""
    dims: dict[str, tuple[str, ...]]
    """Names of their dimensions."""
    published: Commit
    """What readers believe until more is published."""


def attach(store: StoreReader, lengths: Mapping[str, int], *, durable: bool) -> Begun:
    """Open the arrays of a store at these lengths, to go on with them.

    Raises:
        ResumeError: another version of explaind has written them in another way.
    """
    arrays, dims = dict[str, GrowingArray](), dict[str, tuple[str, ...]]()
    path = Path(str(store.path))
    for name in store.commit.arrays:
        layout = store.layout(name)
        length = lengths.get(layout.dims[0], 0)
        if not length:  # as if it was not there yet
            continue
        metadata = ArrayMetadata.read(path, name, sealed=True)
        last = store.read(name, (length - 1) // layout.chunk_rows * layout.chunk_rows, length)
        try:
            arrays[name] = GrowingArray.continued(path, name, metadata, length, last, durable=durable)
        except ValueError as error:
            raise ResumeError(f"{store.path} cannot be continued: {error}. Record to another path.") from error
        dims[name] = layout.dims
    for left in list(path.rglob("*.partial")):  # of a writer that was killed
        left.unlink(missing_ok=True)
    earlier = Commit.read(store.path).earlier
    valid = [commit for commit in earlier if all(n <= lengths.get(d, 0) for d, n in commit.lengths.items())]
    return Begun(arrays=arrays, dims=dims, published=replace(store.commit, earlier=tuple(valid)))
