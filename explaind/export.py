"""Some steps of a run as a run of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm import tqdm

from explaind.recording.chunks import GrowingArray
from explaind.store import Commit, StoreReader
from explaind.stream import new_store

__all__ = ["export"]

_BLOCK_BYTES = 4 << 20

Index = NDArray[np.int64]


def export(store: StoreReader, path: Path, *, steps: range, progress: bool) -> None:
    """Write some steps of a store to a new one; see `Run.export`."""
    selection = _select(store, steps)
    layouts = {name: store.layout(name) for name in store.commit.arrays}
    layouts = {name: layout for name, layout in layouts.items() if layout.dims[0] in selection.rows}
    lengths = {layout.dims[0]: len(selection.rows[layout.dims[0]]) for layout in layouts.values()}
    with new_store(path) as unfinished:
        zarr.create_group(unfinished, attributes=store.attributes | selection.attributes)
        hidden = None if progress else True
        for name in tqdm(layouts, desc="export", unit="array", disable=hidden, delay=1, leave=False):
            layout = layouts[name]
            like = np.empty((0, *layout.shape[1:]), layout.dtype)
            array = GrowingArray(unfinished, name, layout.dims, like, layout.chunk_rows)
            at_once = max(1, _BLOCK_BYTES * layout.shape[0] // max(1, layout.num_bytes))
            for rows in selection.blocks(store, name, layout.dims[0], at_once):
                array.append(rows)
            array.trim()
        Commit(lengths=lengths, arrays=list(layouts), complete=True).write(unfinished)


@dataclass(frozen=True)
class _Selection:
    """What of a store belongs to some of its steps."""

    rows: dict[str, Index] = field(default_factory=dict)
    """The rows to take along each growing dimension, in their new order."""
    values: dict[str, NDArray[Any]] = field(default_factory=dict)
    """All rows of the arrays that point to steps or to other rows, which have new numbers."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What the new run says of itself that the old one does not."""

    def blocks(self, store: StoreReader, name: str, dimension: str, at_once: int) -> Iterator[NDArray[Any]]:
        """The rows of an array, not more at once than so many."""
        if name in self.values:
            yield self.values[name]
            return
        rows = self.rows[dimension]
        for stretch in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            for start in range(0, len(stretch), at_once):
                block = stretch[start : start + at_once]
                yield store.read(name, int(block[0]), int(block[-1]) + 1)


def _select(store: StoreReader, steps: range) -> _Selection:
    first, stop, selection = steps.start, steps.stop, _Selection()
    selection.rows["step"] = np.arange(first, stop)
    selection.rows["snapshot"] = np.arange(first, stop + 1)
    if store.has("call_step"):
        _select_calls(store, steps, selection)
    if store.has("fixed"):
        pointing = {"snapshot_fixed": slice(first, stop + 1)}
        if store.has("call_fixed"):
            calls = selection.rows["call"]
            pointing["call_fixed"] = slice(int(calls[0]), int(calls[-1]) + 1) if len(calls) else slice(0, 0)
        old = {name: store.read(name, rows.start, rows.stop) for name, rows in pointing.items()}
        versions = np.unique(np.concatenate(list(old.values())))
        selection.rows["fixed_version"] = versions
        selection.values.update({name: np.searchsorted(versions, numbers) for name, numbers in old.items()})
    notes = store.attributes.get("metadata", {})
    selection.attributes["metadata"] = notes | {"exported_from": {"run": store.path.name, "steps": [first, stop]}}
    if "checkpoints" in store.attributes:
        selection.attributes["checkpoints"] = store.attributes["checkpoints"][first : stop + 1]
    return selection


def _select_calls(store: StoreReader, steps: range, selection: _Selection) -> None:
    """The calls of the steps, their rows, and the inputs that these use."""
    call_step, counts = store.read("call_step"), store.read("call_rows")
    first, stop = np.searchsorted(call_step, [steps.start, steps.stop]).tolist()
    kinds = store.read("call_kind") if store.has("call_kind") else np.zeros_like(call_step)  # format 1 has one
    before, within = int(counts[:first].sum()), int(counts[first:stop].sum())
    selection.rows["call"] = np.arange(first, stop)
    selection.values["call_step"] = call_step[first:stop] - steps.start
    selection.rows["row"] = np.arange(before, before + within)
    layouts = np.array([kind["inputs"] for kind in store.attributes.get("call_kinds", [])] or [0])
    for kind in range(len(layouts)):
        start, size = (int(counts[part][kinds[part] == kind].sum()) for part in (slice(first), slice(first, stop)))
        selection.rows[f"row_of_kind_{kind}"] = np.arange(start, start + size)
    row_layouts = np.repeat(layouts[kinds[first:stop]], counts[first:stop])
    row_input, numbers = store.read("row_input", before, before + within), np.empty(within, np.int64)
    for layout in range(int(layouts.max()) + 1):
        members = row_layouts == layout
        used, firsts, places = np.unique(row_input[members], return_index=True, return_inverse=True)
        order = np.argsort(firsts)  # as they are first used
        selection.rows[f"input_{layout}" if layout else "input"] = used[order]
        numbers[members] = np.argsort(order)[places]
    selection.values["row_input"] = numbers
