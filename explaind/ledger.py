"""Where the terms of the steps are entered, block of queries by block of queries, and labelled in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from explaind.attribution import TERMS
from explaind.path.step import StepTerms
from explaind.path.sweep import Sweep
from explaind.stream import STEP_AXES, Sink
from explaind.windows import Windows

__all__ = ["Ledger", "certificate", "term_sizes"]

_EXAMPLES = ("example", "group", "token")


def term_sizes(coordinates: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Of every term the lengths of its axes.

    Examples and tokens are the contribution's only; single elements also the decay's.
    """
    sizes = {axis: len(labels) for axis, labels in coordinates.items()}
    without = {"contribution": (), "decay": _EXAMPLES}
    return {
        name: {axis: size for axis, size in sizes.items() if axis not in without.get(name, (*_EXAMPLES, "element"))}
        for name in TERMS
    }


class Ledger:
    """Sums what the axes leave out, and hands over blocks of steps as they become whole.

    Args:
        coordinates: labels of the axes that are kept.
        sink: where the arrays come together.
        queries: the queries whose terms are entered, among all.
        windows: what the window axis sums, if it is kept.
    """

    def __init__(self, coordinates: Mapping[str, Any], sink: Sink, queries: slice, windows: Windows | None) -> None:
        self._sizes, self._sink, self._queries = term_sizes(coordinates), sink, queries
        axis = next((axis for axis in STEP_AXES if axis in coordinates), None)
        self._axis, self._windows = axis, windows
        steps = windows.place if windows else {step: n for n, step in enumerate(coordinates[axis])} if axis else {}
        self._place = steps
        self._open: dict[str, tuple[int, NDArray[np.float64]]] = {}
        """Of every term the first step of the block that is being filled, and the block."""

    def enter(self, step: int, terms: StepTerms) -> None:
        """Add a step's terms; the steps come in order, upward or downward."""
        place = self._place.get(step, 0)
        for name, sizes in self._sizes.items():
            values = _summed(getattr(terms, name), sizes)
            length = self._sink.block_steps(name) if self._axis else 1
            first = place - place % length
            if name in self._open and self._open[name][0] != first:
                self._hand_over(name)
            if name not in self._open:
                self._open[name] = (first, self._new_block(name, first, length, values))
            block = self._open[name][1]
            if self._axis:
                block = np.moveaxis(block, list(sizes).index(self._axis), 0)[place - first, ...]
            if self._axis and not self._windows:
                block[...] = values
            else:
                block += values

    def finish(self) -> None:
        """Hand over the blocks that are left."""
        for name in list(self._open):
            self._hand_over(name)

    def _new_block(self, name: str, first: int, length: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self._axis:
            return np.zeros_like(values)
        sizes = self._sizes[name]
        place, steps = list(sizes).index(self._axis), min(length, sizes[self._axis] - first)
        return np.full((*values.shape[:place], steps, *values.shape[place:]), 0.0 if self._windows else np.nan)

    def _hand_over(self, name: str) -> None:
        first, block = self._open.pop(name)
        own = {"query": self._queries}
        if self._axis:
            own[self._axis] = slice(first, first + block.shape[list(self._sizes[name]).index(self._axis)])
        self._sink.put(name, tuple(own.get(axis, slice(None)) for axis in self._sizes[name]), block)


def _summed(term: Tensor, sizes: Mapping[str, int]) -> NDArray[np.float64]:
    """A step's term without the axes of length one that are not kept."""
    axes = ("query", "example", "token", "layer") if term.ndim == 4 else ("query", "layer")
    called = {"group": "example", "parameter": "layer", "element": "layer"}
    kept = {called.get(axis, axis) for axis in sizes}
    array: NDArray[np.float64] = term.cpu().numpy()
    return array[tuple(slice(None) if axis in kept else 0 for axis in axes)]


def certificate(sweep: Sweep, updates: list[int]) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    """What is known of every query beside the terms: the path's ends and length, and the measured error of its steps.

    Args:
        sweep: after its last step.
        updates: labels of the axis `update_step`.
    """
    steps = sorted(sweep.integrals)
    # A segment that only an average needed counts with the wanted one before it.
    place = np.searchsorted(updates, steps, side="right") - 1

    def by_label(rows: list[Tensor]) -> NDArray[Any]:
        stacked = np.stack([row.cpu().numpy() for row in rows])
        total = np.zeros((len(updates), stacked.shape[1]), stacked.dtype)
        np.add.at(total, place, stacked)
        return total.T

    errors, nodes = ([getattr(sweep.integrals[s], x) for s in steps] for x in ("residual", "num_nodes"))
    ends = {"initial": sweep.values[:, 0], "prediction": sweep.values[:, -1]}
    ends |= {"omitted": sweep.omitted, "path_length": sweep.path_length}
    return {
        "quadrature": (("query", "update_step"), by_label(errors)),
        "num_nodes": (("query", "update_step"), by_label(nodes)),
        **{name: (("query",), values.cpu().numpy()) for name, values in ends.items()},
    }
