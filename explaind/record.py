"""The record of a run, step by step: what the recorder wrote, as the tensors it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.calls import CallKind
from explaind.errors import DamagedStoreError, ModelMismatchError, StoreFormatError, UnknownUpdateRuleError
from explaind.optimizers import RULES, UpdateRule
from explaind.parameters import ParameterTable, named_dtype
from explaind.recording.calls import input_array, output_grad_array
from explaind.recording.fixed import decode_fixed, fixed_tensors, module_types
from explaind.recording.groups import group_settings
from explaind.recording.state import StateTypes, read_state
from explaind.store import StoreReader

__all__ = ["Record", "RecordedCall"]


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """One forward call of a recorded step, as `recording.capture.ForwardCall` saw it."""

    kind: CallKind
    """What was called, and how."""
    inputs: dict[str, Tensor]
    """Its tensors `[row, …]` by name."""
    output_grads: dict[str, Tensor]
    """c_{k,s} = ∂L_s/∂f(x_k) of every output that the loss depends on, `[row, …]`; none with an objective."""
    examples: NDArray[np.int64]
    """Example id of every row."""
    rows: slice
    """Where its rows lie among all rows of the run."""
    training: NDArray[np.bool_]
    """`module.training` of every module."""
    rng_state: NDArray[np.uint8]
    """Random number generators just before it."""
    reached: frozenset[str]
    """Names of the parameters whose gradients the cotangents entered, all but those that were frozen in that pass."""
    fixed_version: int
    """Version of the buffers and frozen parameters just before it."""
    output_fingerprint: NDArray[np.float64]
    """Norm and sum of its output, `[2]`."""

    @property
    def output_grad(self) -> Tensor:
        """The cotangent of a model that returns one tensor."""
        (only,) = self.output_grads.values()
        return only


class Record:
    """The published steps of a store, and the model that they belong to, if it was given."""

    def __init__(self, path: Path, model: nn.Module | None) -> None:
        self._store = StoreReader(path)
        attributes = self._store.attributes
        try:
            self.table = ParameterTable.from_json(attributes["parameters"])
            self.optimizer: str = attributes["optimizer"]
            self._modules: dict[str, str] = attributes["modules"]
            self._kinds, self._input_layouts = _read_calls(attributes)
            self._fixed_layout: list[dict[str, Any]] = attributes["fixed"]
            self._group_keys: list[str] = attributes["group_keys"]
            self._group_constants: list[dict[str, Any]] = attributes["groups"]
            self._group_optimizers: list[str] = attributes.get(
                "group_optimizers", [self.optimizer] * len(self._group_constants)
            )
            self._group_types: list[dict[str, str]] = attributes.get("group_types", [{}] * len(self._group_constants))
            self.device = torch.device(attributes["device"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedStoreError(f"the attributes of {path} are incomplete: {error!r}") from error
        self.path = path
        self.num_steps = self._store.commit.num_steps
        """S, the number of whole steps; parameters exist for steps 0 … S."""
        if self.num_steps < 1:
            reason = (
                "Was optimizer.step() called inside the traced block?"
                if self._store.commit.complete
                else "It is still being recorded, or was stopped before its first step was written."
            )
            raise StoreFormatError(f"{path} has no finished optimizer step. {reason}")
        self.complete = self._store.commit.complete
        """Whether the recording ended in an orderly way; False while it goes on or if it was killed."""
        self.metadata: dict[str, Any] = attributes.get("metadata", {})
        self.stores_example_grads = attributes.get("example_grads") == "stored"
        self.unrecorded_state: list[str] = attributes.get("unrecorded_state", [])
        """Names of optimizer state that is neither a number nor a real tensor, or changed its shape."""
        self.state_types: StateTypes = attributes.get("state_types", {})
        """Types and places of the state that does not have the usual ones."""
        self._input_cache: dict[tuple[int, str], NDArray[Any]] = {}
        self._model = getattr(model, "_orig_mod", model)  # of a compiled model the one that it was made of
        if model is not None:
            if not isinstance(model, nn.Module):
                raise TypeError(f"model must be a torch.nn.Module such as make_model() returns; got {model!r}.")
            self._check_model(self.model)

    @property
    def model(self) -> nn.Module:
        """The model given to `open_run`.

        Raises:
            ValueError: none was given.
        """
        if self._model is None:
            raise ValueError("this needs the model: open the run with explaind.open_run(path, model=make_model()).")
        return self._model

    @cached_property
    def examples(self) -> NDArray[np.int64]:
        """Ids of all examples that were in a batch, sorted, `[example]`."""
        rows = self._row_offsets[self._num_calls(self.num_steps)]
        if not rows:  # no gradient came back to any call
            return np.zeros(0, dtype=np.int64)
        return np.unique(self._store.read("row_example", 0, int(rows)))

    @property
    def group_optimizers(self) -> list[str]:
        """Full name of the optimizer class that owns each parameter group, `[group]`."""
        return self._group_optimizers

    @property
    def rules(self) -> list[UpdateRule | None]:
        """Update rule of each parameter group's optimizer, None if it is not known, `[group]`."""
        return [RULES.get(name) for name in self.group_optimizers]

    def require_rules(self) -> list[UpdateRule]:
        """The update rules of all parameter groups.

        Raises:
            UnknownUpdateRuleError: an optimizer has none.
        """
        rules = self.rules
        unknown = [name for name, rule in zip(self.group_optimizers, rules, strict=True) if rule is None]
        if unknown:
            raise UnknownUpdateRuleError(
                f"the update of {', '.join(dict.fromkeys(unknown))} is not known as a linear filter, so it cannot be "
                f"split over gradients and no example can be credited. Known are {', '.join(RULES)}; "
                "explaind.optimizers.register adds one. by=('query', 'step', 'layer') works for any optimizer."
            )
        return [rule for rule in rules if rule is not None]

    @property
    def num_groups(self) -> int:
        """Number of the optimizer's parameter groups."""
        return len(self._group_constants)

    def flat_params(self, step: int) -> Tensor:
        """θ_step as one vector `[element]`."""
        self._check_step(step, self.num_steps)
        return torch.from_numpy(self._store.read("params", step, step + 1)[0])

    def flat_gradient(self, step: int) -> Tensor:
        """G_step as the optimizer saw it, `[element]`."""
        self._check_step(step, self.num_steps - 1)
        return torch.from_numpy(self._store.read("gradient", step, step + 1)[0])

    def state(self, snapshot: int) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state `{parameter: {name: tensor}}` before step `snapshot`, with torch's names.

        A parameter has only the entries that it had in the loop.
        """
        return read_state(self._store, self.table, snapshot, self.state_types)

    def settings(self, step: int, group: int) -> dict[str, Any]:
        """Hyperparameters of a parameter group at a step, with torch's names."""
        values = self._store.read("hyperparameters", step, step + 1)[0]
        return group_settings(self._group_constants, self._group_keys, self._group_types, values, group)

    def gradient_rescaling(self, step: int) -> tuple[list[float], list[float]]:
        """The numbers s and c of every parameter, by which G_step = clamp(s·g, −c, c) of the backward pass's g.

        They are NaN where the recorder did not see g, so that only a replay can tell.
        """
        scale = self._store.read("gradient_scale", step, step + 1)[0]
        limit = self._store.read("gradient_limit", step, step + 1)[0] if self._store.has("gradient_limit") else np.inf
        scales, limits = np.broadcast_arrays(scale, limit, np.empty(len(self.table)))[:2]
        return scales.tolist(), limits.tolist()

    @cached_property
    def updated(self) -> NDArray[np.bool_]:
        """Whether each parameter had a gradient at each step, `[step, parameter]`."""
        return self._store.read("updated", 0, self.num_steps)

    def fixed(self, snapshot: int) -> dict[str, Tensor]:
        """Buffers and frozen parameters before step `snapshot`, by name."""
        if not self._fixed_layout:
            return {}
        return self.fixed_version(int(self._store.read("snapshot_fixed", snapshot, snapshot + 1)[0]))

    def fixed_version(self, version: int) -> dict[str, Tensor]:
        """A version of the buffers and frozen parameters, by name."""
        if not self._fixed_layout:
            return {}
        return decode_fixed(self._fixed_layout, self._store.read("fixed", version, version + 1)[0])

    def calls(self, step: int) -> list[RecordedCall]:
        """The forward calls that step's gradient came through, in the order of their backward passes."""
        self._check_step(step, self.num_steps - 1)
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
        return self._store.read("call_step") if self._store.has("call_step") else np.empty(0, dtype=np.int64)

    @cached_property
    def _row_offsets(self) -> NDArray[np.int64]:
        """Number of rows before each call, `[call + 1]`."""
        counts = self._store.read("call_rows") if len(self._call_steps) else np.empty(0, dtype=np.int64)
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
        first = int(self._kind_offsets[index])
        return RecordedCall(
            kind=kind,
            inputs={
                name: torch.from_numpy(self._inputs(layout, name)[position]).to(dtype)
                for name, dtype in self._input_layouts[layout].items()
            },
            output_grads={
                name: torch.from_numpy(
                    self._store.read(output_grad_array(number, place, name), first, first + stop - start)
                )
                for place, name in enumerate(kind.outputs)
            },
            examples=self._store.read("row_example", start, stop),
            rows=slice(start, stop),
            training=self._store.read("training", index, index + 1)[0],
            rng_state=self._store.read("rng_state", index, index + 1)[0],
            reached=self._call_reached(index),
            fixed_version=self._call_fixed(index),
            output_fingerprint=self._store.read("output_fingerprint", index, index + 1)[0],
        )

    def _call_reached(self, index: int) -> frozenset[str]:
        if not self._store.has("call_reached"):
            return frozenset(self.table.names)
        reached = self._store.read("call_reached", index, index + 1)[0]
        return frozenset(name for name, entered in zip(self.table.names, reached, strict=True) if entered)

    def _call_fixed(self, index: int) -> int:
        if self._store.has("call_fixed"):
            return int(self._store.read("call_fixed", index, index + 1)[0])
        step = int(self._call_steps[index])
        return int(self._store.read("snapshot_fixed", step, step + 1)[0])

    @cached_property
    def _call_kinds(self) -> NDArray[np.int64]:
        """Number of each call's kind, `[call]`."""
        if self._store.has("call_kind"):
            return self._store.read("call_kind")
        return np.zeros(len(self._call_steps), dtype=np.int64)

    @cached_property
    def _kind_offsets(self) -> NDArray[np.int64]:
        """Number of rows of the same kind before each call, `[call]`."""
        counts, offsets = np.diff(self._row_offsets), np.zeros(len(self._call_steps), dtype=np.int64)
        for kind in np.unique(self._call_kinds):
            members = self._call_kinds == kind
            offsets[members] = np.cumsum(counts[members]) - counts[members]
        return offsets

    def _inputs(self, layout: int, name: str) -> NDArray[Any]:
        if (layout, name) not in self._input_cache:
            self._input_cache[layout, name] = self._store.read(input_array(layout, name))
        return self._input_cache[layout, name]

    @property
    def uses_objective(self) -> bool:
        """Whether an objective was recorded in place of cotangents."""
        return any(kind.part is None for kind, _ in self._kinds)

    def kinds_of(self, part: str) -> list[CallKind]:
        """The kinds in which a part of the model was called."""
        return [kind for kind, _ in self._kinds if kind.part == part]

    # ------------------------------------------------------------------ checks

    def _check_step(self, step: int, last: int) -> None:
        if not 0 <= step <= last:
            raise IndexError(f"step {step} is not between 0 and {last} ({self.num_steps} steps are recorded).")

    def _check_model(self, model: nn.Module) -> None:
        given = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        given |= {name: (tuple(t.shape), t.dtype) for name, t in fixed_tensors(model, self.table.names).items()}
        recorded = {p.name: (p.shape, p.dtype) for p in self.table}
        recorded |= {
            entry["name"]: (tuple(entry["shape"]), named_dtype(entry["dtype"])) for entry in self._fixed_layout
        }
        for name in recorded:
            if name not in given:
                raise ModelMismatchError(f"the model has no '{name}', which the run at {self.path} recorded.")
            if recorded[name] != given[name]:
                raise ModelMismatchError(
                    f"'{name}' was recorded with (shape, type) {recorded[name]}, the model's has {given[name]}. "
                    "Build the model as it was trained."
                )
        if extra := [name for name in given if name not in recorded]:
            raise ModelMismatchError(f"the model has '{extra[0]}', which the run at {self.path} did not record.")
        modules = module_types(model)
        for name in self._modules | modules:
            recorded_type, given_type = (types.get(name, "absent") for types in (self._modules, modules))
            if given_type != recorded_type:
                raise ModelMismatchError(
                    f"the module '{name}' is {given_type} in the model and {recorded_type} in the run at {self.path}. "
                    "Build the model as it was trained."
                )


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
    return kinds, [{name: named_dtype(dtype) for name, dtype in layout.items()} for layout in layouts]
