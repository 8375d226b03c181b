"""The forward calls of a step as rows of the store: inputs once, cotangents in the order of the calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from explaind.calls import CallKind
from explaind.errors import RecordingError
from explaind.parameters import named_dtype
from explaind.recording.examples import InputTable
from explaind.recording.forwards import ForwardCall
from explaind.recording.host import to_numpy
from explaind.recording.naming import ExampleNames
from explaind.recording.references import References, digest_array, row_digests
from explaind.recording.repeated import Repeated, among
from explaind.recording.writer import Later, Rows

__all__ = ["CallRows", "EarlierCalls", "input_array", "output_grad_array"]


@dataclass(frozen=True, kw_only=True)
class EarlierCalls:
    """What is known of calls that were written before."""

    layouts: list[dict[str, str]]
    """Types of the inputs of each layout."""
    inputs: list[dict[str, NDArray[Any]]]
    """Distinct inputs of each layout, in their order."""
    contents: list[list[int]]
    """Number of each among all inputs, in the order of first use."""
    kinds: list[dict[str, Any]]
    """The kinds, as they are described."""
    output_shapes: list[list[tuple[int, ...]]]
    """Shapes of a row of the outputs of each."""


class CallRows:
    """Sorts calls into kinds, which share their arrays, and writes them down.

    Args:
        names: gives the rows' example ids.
        example_grads: computes the per-example gradients of a call, `[row, element]`; None if they are not stored.
        references: looks after inputs that are only referred to; None if they are stored.
        hold: takes rows of arrays.
        describe: takes attributes of the run.
    """

    def __init__(
        self,
        *,
        names: ExampleNames,
        example_grads: Callable[[ForwardCall], NDArray[Any]] | None,
        references: References | None,
        hold: Callable[[Rows | Later], None],
        describe: Callable[..., None],
    ) -> None:
        self._names, self._example_grads, self._references = names, example_grads, references
        self._hold, self._describe = hold, describe
        self._inputs = InputTable()
        self._layouts: list[dict[str, str]] = []
        self._shapes: list[dict[str, list[int]]] = []
        self._kinds: dict[Any, int] = {}
        self._last: tuple[CallKind, int, list[Any], int] | None = None
        self._reached = Repeated(among)
        self._descriptions: list[dict[str, Any]] = []

    def go_on(self, calls: EarlierCalls) -> None:
        """Go on after the calls that were written before."""
        for inputs, contents in zip(calls.inputs, calls.contents, strict=True):
            self._inputs.go_on(inputs, contents)
        self._layouts, self._descriptions = calls.layouts, calls.kinds
        for number, (description, shapes) in enumerate(zip(calls.kinds, calls.output_shapes, strict=True)):
            kind = CallKind.from_json(description)
            types = [named_dtype(name) for name in description["output_types"]]
            self._kinds[kind.key, description["inputs"], tuple(zip(shapes, types, strict=True))] = number

    def hold(self, call: ForwardCall, step: int, parameters: Sequence[str]) -> None:
        """Write down a call that a step's gradient came through.

        Args:
            call: the call.
            step: the step.
            parameters: names of the recorded parameters.

        Raises:
            RecordingError: it was made with the parameters of an earlier step, its examples are not known, or its
                inputs cannot be referred to.
        """
        if call.step != step:
            raise RecordingError(
                f"step {step} uses a forward call that was made before step {call.step}'s update, with other "
                "parameters. Run the forward pass again after each optimizer step."
            )
        if call.part and call.example_ids is None:
            raise RecordingError(
                f"the modules of a container are called with each other's outputs, so the examples of a call of "
                f"'{call.part}' have no content to be told by. Name them: iterate over recorder.batches(loader), or "
                "call recorder.examples(ids) in every step."
            )
        layout = self._inputs.layout(call.inputs)
        if layout == len(self._layouts):
            self._layouts.append(call.input_dtypes)
            self._shapes.append({name: list(rows.shape[1:]) for name, rows in call.inputs.items()})
        kind = self._kind(call, layout)
        for place, (name, gradient) in enumerate(call.output_grads.items()):
            cotangents = to_numpy(gradient, copy=False)
            self._hold(
                (
                    output_grad_array(kind, place, name),
                    cotangents,
                    (f"row_of_kind_{kind}", *_axes("output", cotangents)),
                )
            )
        ids = self._names.resolve(call.example_ids, call.inputs, step, call.part)
        if self._references is not None:
            self._references.check_call(call, ids)
        num_bytes = sum(rows.nbytes for rows in call.inputs.values())
        self._hold(Later(lambda: self._input_rows(call, layout, ids), num_bytes))
        if self._example_grads is not None:
            self._hold(("example_grad", self._example_grads(call), ("row", "element")))
        self._hold_one("call_step", np.int64(step), ("call",))
        self._hold_one("call_rows", np.int64(call.num_rows), ("call",))
        self._hold_one("call_kind", np.int64(kind), ("call",))
        self._hold_one("call_reached", self._reached((parameters, call.reached)), ("call", "parameter"))
        self._hold_one("call_fixed", np.int64(call.fixed_version), ("call",))
        self._hold_one("output_fingerprint", call.output_fingerprint.cpu().numpy(), ("call", "statistic"))
        self._hold_one("training", call.training, ("call", "module"))
        self._hold_one("rng_state", call.rng_state, ("call", "rng_byte"))

    def _kind(self, call: ForwardCall, layout: int) -> int:
        """Number of the call's kind: calls of one have the same arguments, and tensors shaped alike."""
        kind, shapes = call.kind, [(gradient.shape[1:], gradient.dtype) for gradient in call.output_grads.values()]
        if self._last is None or self._last[:3] != (kind, layout, shapes):
            key = (kind.key, layout, tuple(shapes))
            if key not in self._kinds:
                self._kinds[key] = len(self._kinds)
                types = [str(dtype).removeprefix("torch.") for _, dtype in shapes]
                self._descriptions.append(dataclasses.asdict(kind) | {"inputs": layout, "output_types": types})
                shapes_of = {} if self._references is None else {"input_shapes": self._shapes}
                self._describe(call_kinds=self._descriptions, input_layouts=self._layouts, **shapes_of)
            self._last = (kind, layout, shapes, self._kinds[key])
        return self._last[3]

    def _input_rows(self, call: ForwardCall, layout: int, ids: NDArray[np.int64] | None) -> list[Rows]:
        """Which inputs a call's rows have, and those inputs that are new, or their digests."""
        content, index, new = self._inputs.add(call.inputs, layout)
        rows: list[Rows] = [("row_input", index, ("row",)), ("row_example", content if ids is None else ids, ("row",))]
        dimension = f"input_{layout}" if layout else "input"
        for name, values in call.inputs.items() if len(new) else ():
            if self._references is None:
                rows.append((input_array(layout, name), values[new], (dimension, *_axes(name, values))))
            else:
                rows.append((digest_array(layout, name), row_digests(values[new]), (dimension, "digest_byte")))
        if self._references is not None and ids is not None:
            self._references.note(ids, index, layout, call.step)
        return rows

    def _hold_one(self, name: str, row: Any, dims: tuple[str, ...]) -> None:
        self._hold((name, np.asarray(row)[None], dims))


def input_array(layout: int, name: str) -> str:
    """Name of the array of an input tensor; inputs of one layout are named and shaped alike."""
    return f"inputs-{layout}/{quote(name, safe='')}" if layout else f"inputs/{quote(name, safe='')}"


def output_grad_array(kind: int, place: int, name: str) -> str:
    """Name of the array of cotangents of an output tensor, the `place`-th of its kind."""
    return "output_grad" if kind == 0 and not name else f"output_grads/{kind}.{place}"


def _axes(name: str, rows: NDArray[Any]) -> tuple[str, ...]:
    return tuple(f"{name}_{axis}" for axis in range(1, rows.ndim))
