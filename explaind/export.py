"""Some steps of a run as a run of their own, with the moments stored that are stored of it, or with fewer."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from explaind.commit import COMMIT_FILE, Commit, new_id
from explaind.errors import StoreFormatError
from explaind.kept import Kept, as_stored, recorded_params, thinned
from explaind.places import Place
from explaind.record import Record
from explaind.recording.chunks import GrowingArray, describe, rows_of_a_chunk
from explaind.recording.files import put
from explaind.recording.host import machine
from explaind.recording.snapshots import digests
from explaind.recording.state import is_state
from explaind.store import FORMAT_VERSION, Layout, StoreReader
from explaind.stream import new_store
from explaind.stretch import Stretch, stretch

__all__ = ["export"]

_BLOCK_BYTES = 4 << 20


def export(record: Record, store: StoreReader, path: Place, *, steps: range, every: int | None, progress: bool) -> None:
    """Write some steps of a record to a new store; see `Run.export`."""
    found, kept = stretch(store, steps), None
    attributes = store.attributes | found.attributes
    if every is not None:
        if attributes["explaind_format"] < 2:
            raise StoreFormatError(f"{store.path} has format 1, of which all moments are stored: leave out every=.")
        kept = thinned(record, store, steps, every, progress=progress)
        attributes |= _replayed_here(every) | {"threads": attributes.get("threads", torch.get_num_threads())}
    elif store.has("snapshot_step"):
        kept = as_stored(store, steps)
    with new_store(path) as unfinished:
        describe(unfinished, attributes)
        new = _NewStore(unfinished)
        for name in tqdm(
            _copied(store, found, kept),
            desc="export",
            unit="array",
            disable=None if progress else True,
            delay=1,
            leave=False,
        ):
            layout = store.layout(name)
            blocks = found.blocks(store, name, layout.dims[0], _rows_at_once([layout]))
            if kept is not None and name == "snapshot_fixed":  # as it is called until format 2
                name, layout = "moment_fixed", replace(layout, dims=("moment",))
            new.add(name, layout, blocks)
        if kept is not None:
            _add_moments(new, record, store, kept, steps)
        new.commit()


def _copied(store: StoreReader, found: Stretch, kept: Kept | None) -> list[str]:
    """The arrays of which rows are copied as they are."""
    names = [name for name in store.commit.arrays if store.layout(name).dims[0] in found.rows]
    if kept is not None:
        own = {"params"} if kept.gradients is None else {"params", "gradient"}
        names = [name for name in names if name not in own and not is_state(name)]
    return names


def _replayed_here(every: int) -> dict[str, Any]:
    """What a store says of moments that were found to be replayed here."""
    return {
        "explaind_format": FORMAT_VERSION,
        "snapshot_every": every,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
    }


def _add_moments(new: _NewStore, record: Record, store: StoreReader, kept: Kept, steps: range) -> None:
    """Add what is stored of some moments only."""

    def params(name: str, step: int) -> NDArray[Any]:
        return recorded_params(record, store, step)[None]

    def state(name: str, step: int) -> NDArray[Any]:
        found = record.state_row(name, step)
        if found is None:
            layout = layouts[name]
            found = np.full((1, *layout.shape[1:]), np.nan if name.startswith("state_scalar/") else 0, layout.dtype)
        return found

    def gradient(name: str, step: int) -> NDArray[Any]:
        return record.flat_gradient(step).numpy()[None]

    new.add_steps("snapshot", kept.params, {"params": store.layout("params")}, params)
    new.add_values("snapshot_step", np.array(kept.params) - steps.start, "snapshot")
    if kept.states:
        layouts = {name: store.layout(name) for name in store.commit.arrays if is_state(name)}
        new.add_steps("state_snapshot", kept.states, layouts, state)
        new.add_values("state_step", np.array(kept.states) - steps.start, "state_snapshot")
    if kept.gradients:
        new.add_steps("stored_gradient", kept.gradients, {"gradient": store.layout("params")}, gradient)
        new.add_values("gradient_step", np.array(kept.gradients) - steps.start, "stored_gradient")
    if kept.gradients is not None and not store.has("digest"):
        every = range(steps.start, steps.stop + 1)
        own = np.stack([digests(record.table, recorded_params(record, store, step)) for step in every])
        new.add_values("digest", own, "moment", "parameter")


class _NewStore:
    """Writes arrays, each from its first row to its last, and then their commit."""

    def __init__(self, path: Path) -> None:
        self._path, self._arrays, self._lengths = path, dict[str, GrowingArray](), dict[str, int]()

    def add(self, name: str, layout: Layout, blocks: Iterable[NDArray[Any]]) -> None:
        """Write an array that has the rows of these blocks."""
        array = self._begun(name, layout.dims, np.empty((0, *layout.shape[1:]), layout.dtype), layout.chunk_rows)
        for rows in blocks:
            array.append(rows)
        self._finish(layout.dims[0], [array])

    def add_values(self, name: str, values: NDArray[Any], *dims: str) -> None:
        """Write an array whose rows are at hand."""
        array = self._begun(name, dims, values[:0], rows_of_a_chunk(values, len(values)))
        array.append(values)
        self._finish(dims[0], [array])

    def add_steps(
        self,
        dimension: str,
        steps: Sequence[int],
        layouts: Mapping[str, Layout],
        row: Callable[[str, int], NDArray[Any]],
    ) -> None:
        """Write arrays with a row for each of some steps; `row` makes it, `[1, …]`, of an array at a step."""
        arrays = {
            name: self._begun(
                name, (dimension, *own.dims[1:]), np.empty((0, *own.shape[1:]), own.dtype), own.chunk_rows
            )
            for name, own in layouts.items()
        }
        at_once = _rows_at_once(layouts.values())
        for start in range(0, len(steps), at_once):
            rows = [{name: row(name, step) for name in arrays} for step in steps[start : start + at_once]]
            for name, array in arrays.items():
                array.append(*(each[name] for each in rows))
        self._finish(dimension, arrays.values())

    def commit(self) -> None:
        """Say that all is written."""
        tails: dict[str, int | None] = {name: array.tail for name, array in sorted(self._arrays.items())}
        commit = Commit(lengths=self._lengths, arrays=tails, complete=True, id=new_id())
        put(f"{self._path}/{COMMIT_FILE}", commit.to_json().encode())

    def _begun(self, name: str, dims: tuple[str, ...], like: NDArray[Any], chunk_rows: int) -> GrowingArray:
        self._arrays[name] = GrowingArray(self._path, name, dims, like, chunk_rows)
        return self._arrays[name]

    def _finish(self, dimension: str, arrays: Iterable[GrowingArray]) -> None:
        for array in arrays:
            array.settle()
            array.trim()
            self._lengths[dimension] = array.length


def _rows_at_once(layouts: Iterable[Layout]) -> int:
    """How many rows of arrays fit in a block."""
    row_bytes = sum(np.dtype(layout.dtype).itemsize * math.prod(layout.shape[1:]) for layout in layouts)
    return max(1, _BLOCK_BYTES // max(1, row_bytes))
