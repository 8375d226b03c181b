"""The optimizer's state, snapshot by snapshot: written by `StateHistory`, read by `read_state`.

A tensor of its parameter's shape is part of a row with an entry per element. A number, or a tensor without axes, is
part of a row with an entry per parameter. A tensor of any other shape, such as a factored moment, has its own array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.parameters import Parameter, ParameterTable, named_dtype
from explaind.recording.capture import to_numpy
from explaind.recording.optimizers import Optimizers
from explaind.store import StoreReader, StoreWriter

__all__ = ["StateHistory", "StateTypes", "read_state", "state_in_loop"]

StateTypes = Mapping[str, Mapping[str, list[str]]]
"""`{state: {parameter: [type, place]}}` of what differs from `_usual`; the place is `"python"` for plain numbers."""


@dataclass(frozen=True)
class _Array:
    """What an array's rows are like, and what stands in them where there is no state."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    empty: float
    dims: tuple[str, ...]

    def rows(self, number: int) -> NDArray[Any]:
        """Rows without any state."""
        return np.full((number, *self.shape), self.empty, self.dtype)


class StateHistory:
    """Writes `optimizer.state` at every snapshot; what is neither a number nor a real tensor is only named.

    Args:
        optimizers: whose state.
        tracked: the recorded parameters, by name.
        table: their order.
        writer: takes the rows, and the attributes that describe them.
    """

    def __init__(
        self, optimizers: Optimizers, tracked: Mapping[str, nn.Parameter], table: ParameterTable, writer: StoreWriter
    ) -> None:
        self._optimizers, self._tracked, self._table, self._writer = optimizers, tracked, table, writer
        self._wide = to_numpy(torch.empty(0, dtype=table.dtype)).dtype
        self._arrays: dict[str, _Array] = {}
        self._kinds: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {}
        self._types: dict[str, dict[str, list[str]]] = {}
        self._left_out: set[str] = set()
        self._num_snapshots = 0

    def add(self) -> None:
        """Write a row of every array; a parameter without this state is zero in it, or NaN among numbers."""
        rows: dict[str, NDArray[Any]] = {}
        states, size = self._optimizers.state, len(self._table)

        def row(name: str, shape: tuple[int, ...], dtype: Any, *dims: str, empty: float = 0) -> NDArray[Any]:
            if name not in self._arrays:
                self._arrays[name] = _Array(shape, np.dtype(dtype), empty, ("snapshot", *dims))
                if self._num_snapshots:  # The optimizer made this state just now.
                    self._write(name, self._arrays[name].rows(self._num_snapshots))
            if name not in rows:
                rows[name] = self._arrays[name].rows(1)
            entries: NDArray[Any] = rows[name][0]
            return entries

        for place, parameter in enumerate(self._table):
            tensor = self._tracked[parameter.name]
            for key, value in states.get(tensor, {}).items():
                if value is None:
                    continue
                if isinstance(value, Tensor) and value.is_sparse:  # SGD's momentum of sparse gradients
                    value = value.coalesce().to_dense()
                kind = self._kind(parameter, value)
                if kind is None or self._kinds.setdefault((key, place), kind) != kind:
                    self._leave_out(key)
                    continue
                if kind[0] == "number":
                    row(f"state_scalar/{key}", (size,), np.float64, "parameter", empty=np.nan)[place] = float(value)
                elif kind[0] == "elements":
                    elements = row(f"state/{key}", (self._table.num_elements,), self._wide, "element")
                    elements[parameter.slice] = to_numpy(value).reshape(-1)
                else:
                    own = to_numpy(value)
                    axes = (f"{key}_{axis}" for axis in range(1, own.ndim + 1))
                    row(f"state_shaped/{key}/{place}", own.shape, own.dtype, *axes)[...] = own
                row(f"state_present/{key}", (size,), np.bool_, "parameter")[place] = True
                self._note_type(key, parameter, tensor, value)
        for name, array in self._arrays.items():
            self._write(name, rows[name] if name in rows else array.rows(1))
        self._num_snapshots += 1

    def _write(self, name: str, rows: NDArray[Any]) -> None:
        self._writer.add(name, rows, self._arrays[name].dims)

    def widen(self, tracked: Mapping[str, nn.Parameter], table: ParameterTable) -> None:
        """Go on with more parameters."""
        self._tracked, self._table = tracked, table
        self._wide = to_numpy(torch.empty(0, dtype=table.dtype)).dtype
        for name, array in self._arrays.items():
            if array.dims[-1] == "element":
                self._arrays[name] = replace(array, shape=(table.num_elements,), dtype=self._wide)
            elif array.dims[-1] == "parameter":
                self._arrays[name] = replace(array, shape=(len(table),))

    def _kind(self, parameter: Parameter, value: Any) -> tuple[str, tuple[int, ...]] | None:
        """How an entry is written, and its shape; None if it cannot be."""
        if isinstance(value, (int, float)):
            return "number", ()
        if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
            return None
        if value.ndim == 0:
            return "number", ()
        exact = value.is_floating_point() and torch.promote_types(value.dtype, self._table.dtype) == self._table.dtype
        return "elements" if exact and value.shape == parameter.shape else "shaped", tuple(value.shape)

    def _note_type(self, key: str, parameter: Parameter, tensor: Tensor, value: Any) -> None:
        if isinstance(value, Tensor):
            found = [str(value.dtype).removeprefix("torch."), str(value.device)]
        else:
            found = ["float64" if isinstance(value, float) else "int64", "python"]
        if found != _usual(parameter, getattr(value, "ndim", 0), str(tensor.device)):
            known = self._types.setdefault(key, {})
            if known.get(parameter.name) != found:
                known[parameter.name] = found
                self._writer.set_attributes(state_types=self._types)

    def _leave_out(self, key: str) -> None:
        if key not in self._left_out:
            self._left_out.add(key)
            self._writer.set_attributes(unrecorded_state=sorted(self._left_out))


def _usual(parameter: Parameter, ndim: int, device: str) -> list[str]:
    """Type and place that state has in torch.optim: those of the parameter, a number on the host."""
    return [str(parameter.dtype).removeprefix("torch."), device] if ndim else ["float32", "cpu"]


def read_state(
    store: StoreReader, table: ParameterTable, snapshot: int, types: StateTypes
) -> dict[str, dict[str, Tensor]]:
    """The state `{parameter: {name: tensor}}` before step `snapshot`, in the loop's types, on the host.

    A parameter has only the entries that it had in the loop; a number is a tensor without axes.
    """

    def row(name: str) -> NDArray[Any] | None:
        return store.read(name, snapshot, snapshot + 1)[0] if store.has(name) else None

    state: dict[str, dict[str, Tensor]] = {name: {} for name in table.names}
    for key in store.names("state_present"):
        present, elements, numbers = (row(f"{kind}/{key}") for kind in ("state_present", "state", "state_scalar"))
        assert present is not None
        for place in np.flatnonzero(present):
            parameter = table[int(place)]
            shaped = row(f"state_shaped/{key}/{place}")
            usual = parameter.dtype
            if shaped is not None:
                value = torch.from_numpy(shaped)
            elif numbers is not None and (elements is None or not np.isnan(numbers[place])):
                value, usual = torch.tensor(float(numbers[place]), dtype=torch.float64), torch.float32
            else:
                assert elements is not None
                value = torch.from_numpy(elements[parameter.slice]).reshape(parameter.shape)
            noted = types.get(key, {}).get(parameter.name)
            state[parameter.name][key] = value.to(named_dtype(noted[0]) if noted else usual)
    return state


def state_in_loop(value: Tensor, key: str, parameter: str, types: StateTypes, device: torch.device) -> Any:
    """A copy of an entry of `read_state` as the loop had it: on the parameter's device, on the host, or a number."""
    usual = "" if value.ndim else "cpu"
    _, place = types.get(key, {}).get(parameter, ["", usual])
    return value.item() if place == "python" else value.to("cpu" if place == "cpu" else device, copy=True)
