"""What of a store belongs to some successive steps, and what it points to is numbered anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explaind.store import StoreReader

__all__ = ["Stretch", "stretch"]

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Stretch:
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


def stretch(store: StoreReader, steps: range) -> Stretch:
    """Find what belongs to some successive steps, but for what a store has of some moments only."""
    first, stop, found = steps.start, steps.stop, Stretch()
    found.rows["step"] = np.arange(first, stop)
    found.rows["moment"] = np.arange(first, stop + 1)
    if not store.has("snapshot_step"):  # until format 2, snapshots are all moments
        found.rows["snapshot"] = found.rows["moment"]
    if store.has("call_step"):
        _add_calls(store, steps, found)
    if store.has("fixed"):
        pointing = {"moment_fixed" if store.has("moment_fixed") else "snapshot_fixed": slice(first, stop + 1)}
        if store.has("call_fixed"):
            calls = found.rows["call"]
            pointing["call_fixed"] = slice(int(calls[0]), int(calls[-1]) + 1) if len(calls) else slice(0, 0)
        old = {name: store.read(name, rows.start, rows.stop) for name, rows in pointing.items()}
        versions = np.unique(np.concatenate(list(old.values())))
        found.rows["fixed_version"] = versions
        found.values.update({name: np.searchsorted(versions, numbers) for name, numbers in old.items()})
    notes = store.attributes.get("metadata", {})
    found.attributes["metadata"] = notes | {"exported_from": {"run": store.path.name, "steps": [first, stop]}}
    if "checkpoints" in store.attributes:
        found.attributes["checkpoints"] = store.attributes["checkpoints"][first : stop + 1]
    return found


def _add_calls(store: StoreReader, steps: range, found: Stretch) -> None:
    """The calls of the steps, their rows, and the inputs that these use."""
    call_step, counts = store.read("call_step"), store.read("call_rows")
    first, stop = np.searchsorted(call_step, [steps.start, steps.stop]).tolist()
    kinds = store.read("call_kind") if store.has("call_kind") else np.zeros_like(call_step)  # format 1 has one
    before, within = int(counts[:first].sum()), int(counts[first:stop].sum())
    found.rows["call"] = np.arange(first, stop)
    found.values["call_step"] = call_step[first:stop] - steps.start
    found.rows["row"] = np.arange(before, before + within)
    layouts = np.array([kind["inputs"] for kind in store.attributes.get("call_kinds", [])] or [0])
    for kind in range(len(layouts)):
        start, size = (int(counts[part][kinds[part] == kind].sum()) for part in (slice(first), slice(first, stop)))
        found.rows[f"row_of_kind_{kind}"] = np.arange(start, start + size)
    row_layouts = np.repeat(layouts[kinds[first:stop]], counts[first:stop])
    row_input, numbers = store.read("row_input", before, before + within), np.empty(within, np.int64)
    for layout in range(int(layouts.max()) + 1):
        members = row_layouts == layout
        used, firsts, places = np.unique(row_input[members], return_index=True, return_inverse=True)
        order = np.argsort(firsts)  # as they are first used
        found.rows[f"input_{layout}" if layout else "input"] = used[order]
        numbers[members] = np.argsort(order)[places]
    found.values["row_input"] = numbers
