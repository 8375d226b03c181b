"""Which moments of a run are written in full: the others can be had by making the optimizers' updates again.

That they can is not taken on trust. The thread that writes makes every update itself, with torch's own optimizers, and
compares: what does not come out bit for bit is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from explaind.parameters import ParameterTable
from explaind.recording.groups import GroupHistory
from explaind.recording.host import same_bits
from explaind.recording.state import StateRows, StateSnapshot, StateTypes
from explaind.recording.writer import Rows
from explaind.replay.updates import UpdateReplay

__all__ = ["STATE_EVERY", "Moment", "MomentRows", "Update", "digests", "gradient_rows"]

STATE_EVERY = 32
"""Steps from one stored optimizer state to the next where parameters and gradients of all steps are stored."""


@dataclass(frozen=True, eq=False)
class Update:
    """What the optimizers were given in a step."""

    gradient: NDArray[Any]
    """G_s, `[element]`."""
    updated: NDArray[np.bool_]
    """Whether there was one, `[parameter]`."""
    hyperparameters: NDArray[np.float64]
    """`[group, hyperparameter]`"""
    is_kept: bool
    """Whether the gradient is stored."""


@dataclass(frozen=True, eq=False)
class Moment:
    """The model and the optimizers before step s."""

    step: int
    """s"""
    params: NDArray[Any]
    """θ_s, `[element]`."""
    state: StateSnapshot
    update: Update | None
    """The step that led here; None for the first moment."""
    hyperparameters: NDArray[np.float64] | None
    """Of the step that follows, `[group, hyperparameter]`; None for the last moment."""

    @property
    def is_last(self) -> bool:
        """Whether the recording ends with it."""
        return self.hyperparameters is None

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self.params.nbytes + self.state.num_bytes + (self.update.gradient.nbytes if self.update else 0)


class MomentRows:
    """Writes moments down, in their order.

    Args:
        table: the recorded parameters.
        groups: the optimizers' parameter groups.
        every: write the parameters at each such step, and the state; if 1, the state at each `STATE_EVERY`-th only.
        replay: makes updates again; None if they cannot be, then everything is written.
        types: gives the types of the state.
    """

    def __init__(
        self,
        table: ParameterTable,
        groups: GroupHistory,
        *,
        every: int,
        replay: UpdateReplay | None,
        types: Callable[[], StateTypes],
    ) -> None:
        self._table, self._groups, self._every, self._replay, self._types = table, groups, every, replay, types
        self._state_every = (STATE_EVERY if every == 1 else every) if replay else 1
        self._state_rows = StateRows()
        self._is_loaded = False

    def widen(self, table: ParameterTable, groups: GroupHistory, replay: UpdateReplay | None) -> None:
        """Go on with more parameters, from a moment that is written in full."""
        self._table, self._groups, self._replay, self._is_loaded = table, groups, replay, False

    def go_on(self, state_arrays: Iterable[str], num_states: int) -> None:
        """Go on after so many moments with state, which is in these arrays; the first one is written in full."""
        self._state_rows.go_on(state_arrays, num_states)

    def __call__(self, moment: Moment) -> list[Rows]:
        """The rows of a moment."""
        same = self._is_reached(moment)
        rows: list[Rows] = []
        if self._every > 1:
            rows.append(("digest", digests(self._table, moment.params)[None], ("moment", "parameter")))
        step = np.array([moment.step], dtype=np.int64)
        if not same or moment.step % self._every == 0 or moment.is_last:
            rows.append(("snapshot_step", step, ("snapshot",)))
            rows.append(("params", moment.params[None], ("snapshot", "element")))
        if not same or moment.step % self._state_every == 0 or moment.is_last:
            rows += [("state_step", step, ("state_snapshot",)), *self._state_rows(moment.state)]
        if not same:
            self._load(moment)
            if moment.update is not None and not moment.update.is_kept:
                rows += gradient_rows(moment.step - 1, moment.update.gradient)
        return rows

    def _is_reached(self, moment: Moment) -> bool:
        """Whether the update that led to the moment is reproduced bit for bit."""
        if self._replay is None or not self._is_loaded or moment.update is None:
            return False
        update = moment.update
        gradients = self._table.unflatten(torch.from_numpy(update.gradient), trained_dtype=True)
        own = {name: gradients[name] for name, has in zip(self._table.names, update.updated, strict=True) if has}
        try:
            self._replay.step(own, self._groups.settings(update.hyperparameters))
        except (RuntimeError, TypeError, ValueError):
            return False
        return same_bits(self._replay.params.numpy(), moment.params) and self._replay.state().same_bits(moment.state)

    def _load(self, moment: Moment) -> None:
        if self._replay is None or moment.hyperparameters is None:
            return
        types = self._types()
        state = moment.state.decoded(self._table, types)
        try:
            self._replay.load(
                torch.from_numpy(moment.params), state, types, self._groups.settings(moment.hyperparameters)
            )
        except (RuntimeError, TypeError, ValueError):  # settings that JSON does not hold
            self._replay = None
        self._is_loaded = self._replay is not None


def gradient_rows(step: int, gradient: NDArray[Any]) -> list[Rows]:
    """The rows of a gradient that is stored although not all are."""
    return [
        ("gradient_step", np.array([step], dtype=np.int64), ("stored_gradient",)),
        ("gradient", gradient[None], ("stored_gradient", "element")),
    ]


def digests(table: ParameterTable, params: NDArray[Any]) -> NDArray[np.int64]:
    """CRC-32C of the bytes of every parameter in θ `[element]`, `[parameter]`."""
    return np.array([google_crc32c.value(params[parameter.slice].tobytes()) for parameter in table], dtype=np.int64)
