"""The forward calls of a recorded run: what the model saw, and the cotangents that came back to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.calls import CallKind, tensor_names
from explaind.errors import DamagedStoreError
from explaind.parameters import ParameterTable, named_dtype
from explaind.recording.calls import input_array, output_grad_array
from explaind.recording.references import DIGEST_BYTES, digest_array
from explaind.referenced_inputs import InputLayout, ReferencedInputs, Wanted
from explaind.replay.batch import BatchCall
from explaind.store import StoreReader, decoding

__all__ = ["RecordedCall", "RecordedCalls"]


@dataclass(frozen=True, kw_only=True)
class RecordedCall(BatchCall):
    """One forward call of a recorded step, as `recording.capture.ForwardCall` saw it."""

    examples: NDArray[np.int64]
    """Example id of every row."""
    rows: slice
    """Where its rows lie among all rows of the run."""
    output_fingerprint: NDArray[np.float64]
    """Norm and sum of its output, `[2]`."""

    @property
    def output_grad(self) -> Tensor:
        """The cotangent of a model that returns one tensor."""
        (only,) = self.output_grads.values()
        return only


class RecordedCalls:
    """Reads the calls of the published steps of a store.

    Args:
        store: the store.
        table: order of the recorded parameters.
        num_steps: number of whole steps.
        source: takes example ids to their batch, if the store only refers to inputs.

    Raises:
        KeyError, TypeError, ValueError: the store's attributes are incomplete.
    """

    def __init__(
        self,
        store: StoreReader,
        table: ParameterTable,
        num_steps: int,
        source: Callable[[list[int]], Any] | None = None,
    ) -> None:
        self._store = store
        self.table = table
        """Order of the recorded parameters."""
        self.num_steps = num_steps
        """S, the number of whole steps; parameters exist for steps 0 … S."""
        self._kinds, self._input_layouts = _read_calls(store.attributes)
        self._input_cache: dict[str, NDArray[Any]] = {}
        self._references: ReferencedInputs | None = None
        if self.refers_to_data:
            self._references = ReferencedInputs(store.path, _read_layouts(store, self._input_layouts), source)

    @cached_property
    def examples(self) -> NDArray[np.int64]:
        """Ids of all examples that were in a batch, sorted, `[example]`."""
        rows = self._row_offsets[self._num_calls(self.num_steps)]
        if not rows:  # no gradient came back to any call
            return np.zeros(0, dtype=np.int64)
        return np.unique(self._store.read("row_example", 0, int(rows)))

    def calls(self, step: int) -> list[RecordedCall]:
        """The forward calls that step's gradient came through, in the order of their backward passes."""
        self._check_step(step, self.num_steps - 1)
        with decoding(f"the calls of step {step}", self._store.path):
            return [self._call(index) for index in range(self._num_calls(step), self._num_calls(step + 1))]

    def call_examples(self, step: int) -> NDArray[np.int64]:
        """Example ids of all rows of a step, `[row]`."""
        start, stop = (int(self._row_offsets[self._num_calls(s)]) for s in (step, step + 1))
        return self._store.read("row_example", start, stop)

    def stored_example_grads(self, rows: slice) -> Tensor:
        """The per-example gradients that were written down for some rows, `[row, element]`."""
        return torch.from_numpy(self._store.read("example_grad", rows.start, rows.stop))

    @cached_property
    def _call_steps(self) -> NDArray[np.int64]:
        steps = self._store.read("call_step") if self._store.has("call_step") else np.zeros(0, dtype=np.int64)
        if np.any(np.diff(steps, prepend=0) < 0):
            raise DamagedStoreError(f"the calls of {self._store.path} are not in the order of their steps")
        return steps

    @cached_property
    def _row_offsets(self) -> NDArray[np.int64]:
        """Number of rows before each call, `[call + 1]`."""
        counts = self._store.read("call_rows") if len(self._call_steps) else np.zeros(0, dtype=np.int64)
        length = self._store.length("row")
        if np.any((counts < 0) | (counts > length)) or counts.sum() > length:
            raise DamagedStoreError(f"the calls of {self._store.path} have more rows than there are, or less than none")
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def call_samples(self) -> list[tuple[int, int]]:
        """One (step, call within it) for every kind of call and combination of training modes, with the most rows."""
        count = self._num_calls(self.num_steps)
        if not count:
            return []
        signs = np.concatenate([self._store.read("training", 0, count), self._call_kinds[:count, None]], axis=1)
        most = np.argsort(-np.diff(self._row_offsets)[:count], kind="stable")
        _, first = np.unique(signs[most], axis=0, return_index=True)
        steps = [(int(self._call_steps[call]), int(call)) for call in np.sort(most[first])]
        return [(step, call - self._num_calls(step)) for step, call in steps]

    def _num_calls(self, step: int) -> int:
        """Number of calls before a step."""
        return int(np.searchsorted(self._call_steps, step))

    def _call(self, index: int) -> RecordedCall:
        start, stop = int(self._row_offsets[index]), int(self._row_offsets[index + 1])
        number = int(self._call_kinds[index])
        kind, layout = self._kinds[number]
        position = self._store.read("row_input", start, stop)
        if np.any(position < 0):
            raise ValueError("a row's input has a negative number")
        first, examples = int(self._kind_offsets[index]), self._store.read("row_example", start, stop)
        return RecordedCall(
            kind=kind,
            inputs=self._call_inputs(index, layout, position, examples),
            output_grads={
                name: torch.from_numpy(
                    self._store.read(output_grad_array(number, place, name), first, first + stop - start)
                )
                for place, name in enumerate(kind.outputs)
            },
            examples=examples,
            rows=slice(start, stop),
            training=self._store.read("training", index, index + 1)[0],
            rng_state=self._store.read("rng_state", index, index + 1)[0],
            reached=self._call_reached(index),
            fixed_version=self._call_fixed(index),
            output_fingerprint=self._store.read("output_fingerprint", index, index + 1)[0],
        )

    def _call_inputs(
        self, index: int, layout: int, position: NDArray[np.int64], examples: NDArray[np.int64]
    ) -> Mapping[str, Tensor]:
        names = self._input_layouts[layout]
        if self._references is None:
            return {n: torch.from_numpy(self._inputs(input_array(layout, n))[position]).to(t) for n, t in names.items()}
        digests = {name: self._inputs(digest_array(layout, name))[position] for name in names}
        step = int(self._call_steps[index])
        return self._references.of(
            Wanted(step=step, layout=layout, numbers=position, examples=examples, digests=digests)
        )

    def _call_reached(self, index: int) -> frozenset[str]:
        if not self._store.has("call_reached"):
            return frozenset(self.table.names)
        reached = self._store.read("call_reached", index, index + 1)[0]
        return frozenset(name for name, entered in zip(self.table.names, reached, strict=True) if entered)

    def _call_fixed(self, index: int) -> int:
        if self._store.has("call_fixed"):
            return int(self._store.read("call_fixed", index, index + 1)[0])
        return self._moment_fixed(int(self._call_steps[index]))

    def _moment_fixed(self, step: int) -> int:
        """Version of the buffers and frozen parameters before a step."""
        name = "moment_fixed" if self._store.has("moment_fixed") else "snapshot_fixed"  # until format 2
        return int(self._store.read(name, step, step + 1)[0])

    @cached_property
    def _call_kinds(self) -> NDArray[np.int64]:
        """Number of each call's kind, `[call]`."""
        if not self._store.has("call_kind"):
            return np.zeros(len(self._call_steps), dtype=np.int64)
        kinds = self._store.read("call_kind")
        if np.any((kinds < 0) | (kinds >= len(self._kinds))):
            raise DamagedStoreError(f"a call of {self._store.path} is of a kind that it does not have")
        return kinds

    @cached_property
    def _kind_offsets(self) -> NDArray[np.int64]:
        """Number of rows of the same kind before each call, `[call]`."""
        counts, offsets = np.diff(self._row_offsets), np.zeros(len(self._call_steps), dtype=np.int64)
        for kind in np.unique(self._call_kinds):
            members = self._call_kinds == kind
            offsets[members] = np.cumsum(counts[members]) - counts[members]
        return offsets

    def _inputs(self, array: str) -> NDArray[Any]:
        if array not in self._input_cache:
            self._input_cache[array] = self._store.read(array)
        return self._input_cache[array]

    @property
    def refers_to_data(self) -> bool:
        """Whether inputs are not stored, but found in the data set by the ids of the examples."""
        return bool(self._store.attributes.get("inputs") == "by_reference")

    @property
    def uses_objective(self) -> bool:
        """Whether an objective was recorded in place of cotangents."""
        return any(kind.part is None for kind, _ in self._kinds)

    def kinds_of(self, part: str) -> list[CallKind]:
        """The kinds in which a part of the model was called."""
        return [kind for kind, _ in self._kinds if kind.part == part]

    def _check_step(self, step: int, last: int) -> None:
        if not 0 <= step <= last:
            raise IndexError(f"step {step} is not between 0 and {last} ({self.num_steps} steps are recorded).")


def _read_calls(attributes: dict[str, Any]) -> tuple[list[tuple[CallKind, int]], list[dict[str, torch.dtype]]]:
    """Every kind of call with the number of its input layout, and each layout's types by name."""
    if "constants" in attributes:  # format 1 has one kind: tensors and plain data, and one output tensor
        arguments = {name: {"tensor": name} for name in attributes["inputs"]}
        arguments |= {name: {"value": value} for name, value in attributes["constants"].items()}
        template = {
            "args": [arguments[name] for name in sorted(filter(str.isdigit, arguments), key=int)],
            "kwargs": {name: part for name, part in arguments.items() if not name.isdigit()},
        }
        kinds = [(CallKind(part="", template=template, outputs=("",), autocast=None), 0)]
        layouts = [attributes["inputs"]]
    else:
        kinds = [(CallKind.from_json(kind), int(kind["inputs"])) for kind in attributes.get("call_kinds", [])]
        layouts = attributes.get("input_layouts", [])
    for kind, layout in kinds:
        if layout < 0 or not set(tensor_names(kind.template)) <= layouts[layout].keys():
            raise ValueError(f"the layout of a call's inputs does not have all of its tensors: {kind.template!r:.200}")
    return kinds, [{name: named_dtype(dtype) for name, dtype in layout.items()} for layout in layouts]


def _read_layouts(store: StoreReader, dtypes: list[dict[str, torch.dtype]]) -> list[InputLayout]:
    """What the inputs of each layout are like that the store refers to."""
    layouts = []
    for number, (own, types) in enumerate(zip(store.attributes.get("input_shapes", []), dtypes, strict=True)):
        shapes = {name: tuple(map(int, shape)) for name, shape in own.items()}
        arrays = [digest_array(number, name) for name in shapes]
        is_whole = shapes.keys() == types.keys() and all(size >= 0 for shape in shapes.values() for size in shape)
        if not is_whole or any(store.has(name) and store.row_shape(name) != (DIGEST_BYTES,) for name in arrays):
            raise ValueError(f"inputs of layout {number} cannot have the shapes {own!r:.200}, or other digests")
        num_inputs = store.length(f"input_{number}" if number else "input")
        layouts.append(InputLayout(shapes=shapes, dtypes=types, num_inputs=num_inputs))
    return layouts
