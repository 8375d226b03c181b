"""The optimizer's state at some moments: taken down by `StateHistory`, written by `StateRows`, read by `read_state`.

A tensor of its parameter's shape is part of a row with an entry per element. A number, or a tensor without axes, is
part of a row with an entry per parameter. A tensor of any other shape, such as a factored moment, has its own array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import is_not
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.parameters import Parameter, ParameterTable, named_dtype
from explaind.recording.host import same_bits, to_numpy
from explaind.recording.memory import CopyMemory
from explaind.recording.optimizers import Optimizers
from explaind.recording.writer import Rows
from explaind.store import StoreReader

__all__ = ["StateHistory", "StateRows", "StateSnapshot", "StateTypes", "is_state", "read_state", "state_in_loop"]

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


@dataclass(frozen=True)
class _Found:
    """The entries of one snapshot: of each key those that are written in the same way, by parameter."""

    elements: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbers: dict[str, dict[int, Any]] = field(default_factory=dict)
    shaped: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    present: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StateSnapshot:
    """The optimizer's state at one moment, as rows of the store's arrays."""

    rows: Mapping[str, NDArray[Any]]
    """A row `[1, …]` of every array that there is state for."""
    arrays: Mapping[str, _Array]
    """All arrays that there has been state for so far."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return sum(row.nbytes for row in self.rows.values())

    def same_bits(self, other: StateSnapshot) -> bool:
        """Whether both are the same, bit for bit."""
        return self.rows.keys() == other.rows.keys() and all(
            row.dtype == other.rows[name].dtype and same_bits(row, other.rows[name]) for name, row in self.rows.items()
        )

    def decoded(self, table: ParameterTable, types: StateTypes) -> dict[str, dict[str, Tensor]]:
        """The state as `read_state` gives it."""
        keys = sorted(name.removeprefix("state_present/") for name in self.rows if name.startswith("state_present/"))
        return _decode(keys, lambda name: self.rows[name][0] if name in self.rows else None, table, types)


def is_state(array: str) -> bool:
    """Whether an array of this name holds optimizer state."""
    return array.partition("/")[0] in ("state", "state_scalar", "state_shaped", "state_present")


class StateRows:
    """Rows of snapshots for the store, in which each array has one for every snapshot that is written."""

    def __init__(self) -> None:
        self._begun = set[str]()
        self._num_written = 0

    def go_on(self, names: Iterable[str], num_written: int) -> None:
        """Go on after so many snapshots, which have rows of these arrays."""
        self._begun, self._num_written = set(names), num_written

    def __call__(self, snapshot: StateSnapshot) -> list[Rows]:
        """The rows of a snapshot; what there has been no state for so far gets those of the earlier ones too."""
        rows: list[Rows] = []
        for name, array in snapshot.arrays.items():
            if name not in self._begun and self._num_written:  # The optimizer has made this state since.
                rows.append((name, array.rows(self._num_written), array.dims))
            self._begun.add(name)
            rows.append((name, snapshot.rows.get(name, array.rows(1)), array.dims))
        self._num_written += 1
        return rows


class StateHistory:
    """Takes down `optimizer.state`; what is neither a number nor a real tensor is only named.

    Args:
        optimizers: whose state.
        tracked: the recorded parameters, by name.
        table: their order.
        describe: takes attributes of the run.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        tracked: Mapping[str, nn.Parameter],
        table: ParameterTable,
        describe: Callable[..., None],
    ) -> None:
        self._optimizers, self._tracked, self._table, self._describe = optimizers, tracked, table, describe
        self._wide = to_numpy(torch.empty(0, dtype=table.dtype)).dtype
        self._arrays: dict[str, _Array] = {}
        self._kinds: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {}
        self._looks: dict[tuple[str, int], Any] = {}
        self._types: dict[str, dict[str, list[str]]] = {}
        self._left_out: set[str] = set()
        self._values: list[Any] = []
        self._found = _Found()
        self._memory = CopyMemory()

    @property
    def types(self) -> StateTypes:
        """Types and places of the state that does not have the usual ones."""
        return self._types

    @property
    def is_whole(self) -> bool:
        """Whether nothing had to be left out so far."""
        return not self._left_out

    def take(self) -> StateSnapshot:
        """The state of this moment; a parameter without some of it is zero there, or NaN among numbers."""
        states, size = self._optimizers.state, len(self._table)
        every = [states.get(tensor, {}) for tensor in self._tracked.values()]
        values = [value for entries in every for value in entries.values()]
        # Most optimizers change the same tensors at every step.
        if len(values) != len(self._values) or any(map(is_not, values, self._values)):
            self._values, self._found = values, _Found()
            for place, entries in enumerate(every):
                for key, value in entries.items():
                    if value is not None:
                        self._sort(self._found, place, key, value)
        found = self._found
        now: dict[str, NDArray[Any]] = {}

        def put(name: str, row: NDArray[Any], *dims: str, empty: float = 0) -> None:
            now[name] = row[None]
            if name not in self._arrays:
                self._arrays = {**self._arrays, name: _Array(row.shape, row.dtype, empty, ("state_snapshot", *dims))}

        for key, tensors in found.elements.items():
            row = self._memory.empty((self._table.num_elements,), self._table.dtype)
            put(f"state/{key}", self._table.flatten(tensors, out=row).numpy(), "element")
        for key, numbers in found.numbers.items():
            per_parameter = np.full(size, np.nan)
            per_parameter[list(numbers)] = _floats(list(numbers.values()))
            put(f"state_scalar/{key}", per_parameter, "parameter", empty=np.nan)
        for (key, place), value in found.shaped.items():
            own = to_numpy(value)
            put(f"state_shaped/{key}/{place}", own, *(f"{key}_{axis}" for axis in range(1, own.ndim + 1)))
        for key, places in found.present.items():
            has = np.zeros(size, np.bool_)
            has[places] = True
            put(f"state_present/{key}", has, "parameter")
        return StateSnapshot(now, self._arrays)

    def _sort(self, found: _Found, place: int, key: str, value: Any) -> None:
        """Find out how an entry is written, and remember it for entries that look the same."""
        if isinstance(value, Tensor) and value.is_sparse:  # SGD's momentum of sparse gradients
            value = value.coalesce().to_dense()
            self._values = []  # the dense copy serves only once
        look = (value.dtype, value.shape, value.device, value.layout) if isinstance(value, Tensor) else type(value)
        parameter = self._table[place]
        if self._looks.get((key, place)) != look:
            kind = self._kind(parameter, value)
            if kind is None or self._kinds.setdefault((key, place), kind) != kind:
                self._leave_out(key)
                return
            self._note_type(key, parameter, value)
            self._looks[key, place] = look
        way, _ = self._kinds[key, place]
        if way == "elements":
            found.elements.setdefault(key, {})[parameter.name] = value
        elif way == "number":
            found.numbers.setdefault(key, {})[place] = value
        else:
            found.shaped[key, place] = value
        found.present.setdefault(key, []).append(place)

    def widen(self, tracked: Mapping[str, nn.Parameter], table: ParameterTable) -> None:
        """Go on with more parameters."""
        self._tracked, self._table = tracked, table
        self._values, self._found = [], _Found()
        self._wide = to_numpy(torch.empty(0, dtype=table.dtype)).dtype
        wide = {
            "element": {"shape": (table.num_elements,), "dtype": self._wide},
            "parameter": {"shape": (len(table),)},
        }
        self._arrays = {name: replace(a, **wide.get(a.dims[-1], {})) for name, a in self._arrays.items()}  # type: ignore[arg-type]

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

    def _note_type(self, key: str, parameter: Parameter, value: Any) -> None:
        if isinstance(value, Tensor):
            found = [str(value.dtype).removeprefix("torch."), str(value.device)]
        else:
            found = ["float64" if isinstance(value, float) else "int64", "python"]
        if found != _usual(parameter, getattr(value, "ndim", 0), str(self._tracked[parameter.name].device)):
            known = self._types.setdefault(key, {})
            if known.get(parameter.name) != found:
                known[parameter.name] = found
                self._describe(state_types=self._types)

    def _leave_out(self, key: str) -> None:
        if key not in self._left_out:
            self._left_out.add(key)
            self._describe(unrecorded_state=sorted(self._left_out))


def _floats(values: list[Any]) -> list[float]:
    """Numbers and tensors without axes as numbers; tensors that are alike are read at once."""
    alike = {(value.dtype, value.device) if isinstance(value, Tensor) else None for value in values}
    if len(alike) == 1 and None not in alike:
        return [float(number) for number in torch.stack(values).tolist()]
    return [float(value) for value in values]


def _usual(parameter: Parameter, ndim: int, device: str) -> list[str]:
    """Type and place that state has in torch.optim: those of the parameter, a number on the host."""
    return [str(parameter.dtype).removeprefix("torch."), device] if ndim else ["float32", "cpu"]


def read_state(
    store: StoreReader, table: ParameterTable, place: int, types: StateTypes
) -> dict[str, dict[str, Tensor]]:
    """The state `{parameter: {name: tensor}}` that is stored at a place, in the loop's types, on the host.

    A parameter has only the entries that it had in the loop; a number is a tensor without axes.
    """

    def row(name: str) -> NDArray[Any] | None:
        return store.read(name, place, place + 1)[0] if store.has(name) else None

    return _decode(store.names("state_present"), row, table, types)


def _decode(
    keys: Iterable[str], row: Callable[[str], NDArray[Any] | None], table: ParameterTable, types: StateTypes
) -> dict[str, dict[str, Tensor]]:
    """State from its rows by array."""
    state: dict[str, dict[str, Tensor]] = {name: {} for name in table.names}
    for key in keys:
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
