"""Looks for damage in a store: every chunk of every array is read, and all that is wrong is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from explaind.commit import COMMIT_FILE
from explaind.errors import DamagedStoreError
from explaind.store import StoreReader

__all__ = ["Damage", "find_damage"]

_STEPS = {
    "snapshot": "snapshot_step",
    "state_snapshot": "state_step",
    "stored_gradient": "gradient_step",
    "call": "call_step",
}
"""Arrays that say of which step an entry along a dimension is."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something in a store that cannot be read."""

    array: str
    """Name of the array; empty if it is not one alone."""
    file: str
    """The file, below the store's directory."""
    steps: tuple[int, int] | None
    """First and last step that what is lost is of, or from before; None if that is none or cannot be told."""
    problem: str
    """What is wrong, in words."""

    def __str__(self) -> str:
        steps = "" if self.steps is None else f"; it is of steps {self.steps[0]} to {self.steps[1]}"
        return f"{self.file}: {self.problem}{steps}"


def find_damage(store: StoreReader, *, progress: bool = False) -> Iterator[Damage]:
    """Read all that is published of a store, and yield what is missing or fails its checksum.

    Args:
        store: the store.
        progress: show a progress bar if that takes longer than a second.

    Raises:
        StoreFormatError: the store was replaced by another one meanwhile.
    """
    if store.lost is not None:
        yield Damage(array="", file=COMMIT_FILE, steps=None, problem=store.lost)
    chunks = list[tuple[str, int]]()
    for name in store.commit.arrays:
        try:
            chunks += [(name, index) for index in range(store.layout(name).num_chunks)]
        except DamagedStoreError as error:
            yield Damage(array=name, file=f"{name}/zarr.json", steps=None, problem=str(error))
    for name, index in tqdm(
        chunks, desc="read", unit="chunk", disable=None if progress else True, delay=1, leave=False
    ):
        layout = store.layout(name)
        first = index * layout.chunk_rows
        stop = min(first + layout.chunk_rows, layout.shape[0])
        try:
            store.read(name, first, stop)
        except DamagedStoreError as error:
            steps = _steps(store, layout.dims[0], first, stop - 1)
            yield Damage(array=name, file=store.chunk_name(name, index), steps=steps, problem=str(error))


def _steps(store: StoreReader, dimension: str, first: int, last: int) -> tuple[int, int] | None:
    """The steps that entries along a growing dimension belong to; all that have some are ordered by step."""
    if dimension in ("step", "moment") or (dimension == "snapshot" and not store.has("snapshot_step")):
        return first, last
    try:
        if dimension in _STEPS:
            steps = store.read(_STEPS[dimension])
        elif dimension == "row":
            steps = np.repeat(store.read("call_step"), store.read("call_rows"))
        else:
            return None
    except DamagedStoreError:
        return None
    return int(steps[first]), int(steps[last])
