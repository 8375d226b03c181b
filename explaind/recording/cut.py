"""Where a store is cut to be continued: how many rows of each array stay, and what is known of the calls in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from explaind.recording.calls import EarlierCalls, input_array, output_grad_array
from explaind.store import StoreReader

__all__ = ["calls_before", "lengths_before"]

_STEPS = {"snapshot": "snapshot_step", "state_snapshot": "state_step", "stored_gradient": "gradient_step"}
"""Arrays that say of which step an entry along a dimension is."""


def lengths_before(store: StoreReader, step: int) -> dict[str, int]:
    """How many entries along each growing dimension belong to earlier steps, the moments before them, and their calls.

    What is before a step is known to the loop that goes on with it, and is written once more.
    """
    lengths = {"step": step, "moment": step}
    for dimension, name in _STEPS.items():
        if store.has(name):
            lengths[dimension] = int(np.searchsorted(store.read(name), step))
    if not store.has("call_step"):
        return lengths
    calls = int(np.searchsorted(store.read("call_step"), step))
    counts, kinds = store.read("call_rows", 0, calls), store.read("call_kind", 0, calls)
    lengths |= {"call": calls, "row": int(counts.sum())}
    layouts = np.array([kind["inputs"] for kind in store.attributes["call_kinds"]], np.int64)
    for kind in range(len(layouts)):
        lengths[f"row_of_kind_{kind}"] = int(counts[kinds == kind].sum())
    row_input, row_layouts = store.read("row_input", 0, lengths["row"]), np.repeat(layouts[kinds], counts)
    for layout in range(int(layouts.max()) + 1):  # inputs are numbered in the order of their first use
        used = row_input[row_layouts == layout]
        lengths[f"input_{layout}" if layout else "input"] = int(used.max()) + 1 if len(used) else 0
    return lengths


def calls_before(store: StoreReader, lengths: Mapping[str, int]) -> EarlierCalls:
    """What is known of the calls that stay where a store is cut at these lengths."""
    num_calls, num_rows = lengths.get("call", 0), lengths.get("row", 0)
    every = store.attributes.get("call_kinds", [])
    call_kinds = store.read("call_kind", 0, num_calls) if num_calls else np.zeros(0, np.int64)
    kinds = every[: int(call_kinds.max(initial=-1)) + 1]
    types = store.attributes.get("input_layouts", [])[: max((kind["inputs"] + 1 for kind in kinds), default=0)]
    firsts, inputs = [], []
    row_input = store.read("row_input", 0, num_rows) if num_rows else np.zeros(0, np.int64)
    row_kinds = np.repeat(call_kinds, store.read("call_rows", 0, num_calls)) if num_calls else call_kinds
    row_layouts = np.array([kind["inputs"] for kind in kinds], np.int64)[row_kinds]
    for layout, names in enumerate(types):
        rows = np.flatnonzero(row_layouts == layout)
        firsts.append(rows[np.unique(row_input[rows], return_index=True)[1]])
        arrays = {name: input_array(layout, name) for name in names}
        inputs.append({name: store.read(array, 0, len(firsts[-1])) for name, array in arrays.items()})
    order = np.sort(np.concatenate([np.zeros(0, np.int64), *firsts]))
    shapes = [
        [store.row_shape(output_grad_array(number, place, name)) for place, name in enumerate(kind["outputs"])]
        for number, kind in enumerate(kinds)
    ]
    return EarlierCalls(
        layouts=types,
        inputs=inputs,
        contents=[np.searchsorted(order, rows).tolist() for rows in firsts],
        kinds=kinds,
        output_shapes=shapes,
    )
