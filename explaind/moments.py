"""What a run was at each of its moments, the times before step s = 0 … S: θ_s, the optimizer's state, and G_s.

What is not stored is replayed from the last moment before it that is: the gradient from the recorded forward calls,
the update by torch's own optimizer. The record holds, for every moment, the parameters or a digest of them; what is
replayed must agree with it.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.errors import DamagedStoreError, ReplayWarning, VerificationError
from explaind.recording.host import machine, same_bits
from explaind.recording.snapshots import digests
from explaind.recording.state import StateSnapshot, read_state
from explaind.replay.batch import accumulate
from explaind.replay.model import Forward, dense
from explaind.replay.updates import UpdateReplay
from explaind.rescaling import Rescaling
from explaind.store import decoding
from explaind.threads import num_threads

if TYPE_CHECKING:
    from explaind.record import Record
    from explaind.store import StoreReader

__all__ = ["Moments"]

_CACHE_BYTES = 256 << 20
_ELSEWHERE = 1e-4
"""Largest part of a parameter's size by which a replay may differ on another machine than that of the recording."""


_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class _Replayed:
    params: Tensor
    """`[element]`"""
    state: StateSnapshot

    @property
    def num_bytes(self) -> int:
        return self.params.nbytes + self.state.num_bytes


class Moments:
    """Reads and replays the moments of a run.

    Args:
        record: the run.
        store: where it is.
    """

    def __init__(self, record: Record, store: StoreReader) -> None:
        self._record: Record = weakref.proxy(record)  # which has this, and much memory: both are to go at once
        self._store, self._table = store, record.table
        every = np.arange(record.num_steps + 1)  # until format 2
        self._snapshots = self._places("snapshot_step", every)
        self._states = self._places("state_step", every)
        self._gradients = self._places("gradient_step", every if store.has_along("gradient", "step") else every[:0])
        if not self._states.keys() <= self._snapshots.keys():
            raise DamagedStoreError(f"{store.path} has the optimizer's state of moments without their parameters.")
        about = store.attributes
        same = about.get("machine") == machine() and about.get("versions", {}).get("torch") == torch.__version__
        self._is_elsewhere = not same
        self._replay: UpdateReplay | None = None
        self._place = -1
        """Where the replay is."""
        self._known: OrderedDict[int, _Replayed] = OrderedDict()
        self._known_gradients: OrderedDict[int, Tensor] = OrderedDict()
        self._lock = RLock()

    def _places(self, name: str, otherwise: NDArray[np.int64]) -> dict[int, int]:
        """Where the row of each step is that an array has rows for."""
        steps = self._store.read(name) if self._store.has(name) else otherwise
        if np.any(np.diff(steps, prepend=-1) <= 0):
            raise DamagedStoreError(f"the steps in '{name}' of {self._store.path} do not ascend.")
        return {int(step): place for place, step in enumerate(steps)}

    @property
    def replays_gradients(self) -> bool:
        """Whether the model is run to know moments."""
        return len(self._gradients) < self._record.num_steps

    @property
    def cached_bytes(self) -> int:
        """Most bytes of replayed moments that are kept in memory."""
        vectors = 1 + sum(self._store.has_along(f"state/{key}", "state_snapshot") for key in self._store.names("state"))
        between = self._record.num_steps + 1 - min(len(self._states), len(self._snapshots))
        whole = (vectors + self.replays_gradients) * self._table.num_elements * self._table.dtype.itemsize * between
        return min(2 * _CACHE_BYTES, whole)

    def params(self, step: int) -> Tensor:
        """θ_step, `[element]`."""
        if step in self._snapshots:
            return self._stored_params(step)
        return self._at(step).params.detach()  # a caller may want gradients by his own

    def state(self, step: int) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state before a step, as `read_state` gives it."""
        if step in self._states:
            with decoding(f"the state before step {step}", self._record.path):
                return read_state(self._store, self._table, self._states[step], self._record.state_types)
        return self._at(step).state.decoded(self._table, self._record.state_types)

    def gradient(self, step: int) -> Tensor:
        """G_step, `[element]`."""
        if step in self._gradients:
            place = self._gradients[step]
            return torch.from_numpy(self._store.read("gradient", place, place + 1)[0].copy())
        with self._lock:
            if step not in self._known_gradients:
                self._reach(step + 1)  # so that it is known to lead there
            return self._known_gradients[step].detach()

    def state_row(self, name: str, step: int) -> NDArray[Any] | None:
        """The row `[1, …]` of an array of state before a step; None if a replay had nothing for it."""
        if step in self._states:
            place = self._states[step]
            return self._store.read(name, place, place + 1)
        return self._at(step).state.rows.get(name)

    # ------------------------------------------------------------------ replays

    def _at(self, step: int) -> _Replayed:
        """A moment of which not all is stored."""
        with self._lock:
            if step not in self._known:
                self._reach(step)
            return self._known[step]

    def _reach(self, step: int) -> None:
        """Replay the steps that lead to a moment, from the last one before it that is stored or known."""
        with decoding(f"what is stored before step {step}", self._record.path):
            start = max(before for before in chain(self._states, self._known) if before < step)
        if not (self._replay is not None and start <= self._place < step):
            self._go_to(start)
        while self._place < step:
            self._advance()

    def _go_to(self, step: int) -> None:
        """Begin to replay from a moment that is stored, or known."""
        record = self._record
        if self._replay is None:
            self._replay = UpdateReplay.of(self._table, record.group_optimizers, record.device_here)
        if self._replay is None:
            raise DamagedStoreError(f"{record.path} does not have the optimizer's state before step {step}.")
        params, state, settings = self.params(step), self.state(step), self._settings(min(step, record.num_steps - 1))
        with decoding(f"the optimizer before step {step}", record.path):
            self._replay.load(params, state, record.state_types, settings)
        self._place = step

    def _advance(self) -> None:
        """Replay a step."""
        assert self._replay is not None
        step, table = self._place, self._table
        self._place = -1  # if an error stops it
        gradient = self.gradient(step) if step in self._gradients else self.replayed_gradient(step)
        own = table.unflatten(gradient, trained_dtype=True)
        has = dict(zip(table.names, self._record.updated[step], strict=True))
        settings = self._settings(step)
        with decoding(f"the optimizer at step {step}", self._record.path):
            self._replay.step({name: gradient for name, gradient in own.items() if has[name]}, settings)
        params = self._agreed(step + 1, self._replay.params)
        self._place = step + 1
        if step not in self._gradients:
            _keep(self._known_gradients, step, gradient, lambda gradient: gradient.nbytes)
        if step + 1 not in self._states:
            _keep(self._known, step + 1, _Replayed(params, self._replay.state()), lambda moment: moment.num_bytes)

    def replayed_gradient(self, step: int) -> Tensor:
        """What a replay of the recorded calls gives for G_step, `[element]`."""
        record, device = self._record, self._record.device_here
        trained = self._table.unflatten(self.params(step), trained_dtype=True)
        params = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in trained.items()}
        with num_threads(self._store.attributes.get("threads")):
            for call in record.calls(step):
                forward = Forward(record.model, call.kind, record.objective)
                accumulate(forward, call, params, record.fixed_version(call.fixed_version), device)
        has = dict(zip(self._table.names, record.updated[step], strict=True))
        gradients = {name: dense(p.grad) for name, p in params.items() if has[name] and p.grad is not None}
        scales, limits = record.gradient_rescaling(step)
        pairs = {name: (s, c) for name, s, c in zip(self._table.names, scales, limits, strict=True)}
        return Rescaling.of_pairs(self._table, pairs).rounded(self._table, self._table.flatten(gradients))

    def _settings(self, step: int) -> list[dict[str, Any]]:
        return [self._record.settings(step, group) for group in range(self._record.num_groups)]

    def _stored_params(self, step: int) -> Tensor:
        place = self._snapshots[step]
        return torch.from_numpy(self._store.read("params", place, place + 1)[0].copy())  # what is read is shared

    def _agreed(self, step: int, replayed: Tensor) -> Tensor:
        """What a replay gave, or what is stored in its place, as far as they agree.

        Raises:
            VerificationError: they do not.
        """
        if step in self._snapshots:
            stored = self._stored_params(step)
            if not same_bits(stored.numpy(), replayed.numpy()):
                self._disagree(step, replayed, stored)
            return stored
        recorded = self._store.read("digest", step, step + 1)[0]
        differ = (digests(self._table, replayed.numpy()) != recorded) & (recorded >= 0)
        if differ.any() and not self._is_elsewhere:
            raise self._diverged(step, self._table.names[int(differ.argmax())], "")
        return replayed

    def _disagree(self, step: int, replayed: Tensor, stored: Tensor) -> None:
        for parameter in self._table:
            one, other = (flat[parameter.slice].to(torch.float64) for flat in (replayed, stored))
            error, size = float((one - other).norm()), float(other.norm())
            if error and not (self._is_elsewhere and error <= _ELSEWHERE * size):
                raise self._diverged(step, parameter.name, f" by {error / size if size else error:.1e} of its size")
        warnings.warn(
            f"{self._record.path} was recorded on another machine or with another version of torch, where sums are "
            f"rounded otherwise: replayed parameters differ from the recorded ones by up to {_ELSEWHERE:.0e} of their "
            "size.",
            ReplayWarning,
            stacklevel=2,
        )

    def _diverged(self, step: int, name: str, by: str) -> VerificationError:
        return VerificationError(
            f"the replay of {self._record.path} diverges from the record: after step {step - 1} the parameter '{name}' "
            f"differs{by}, for the first time. Steps up to {step - 1} can be used (steps=…), as can those after the "
            "next stored snapshot. The gradient of that step had a part that is not computed from the recorded calls, "
            "or the computation is not deterministic."
        )


def _keep(known: OrderedDict[int, _Value], step: int, value: _Value, size: Callable[[_Value], int]) -> None:
    """Remember a value, and forget the first ones where there are too many."""
    known[step] = value
    while len(known) > 1 and sum(map(size, known.values())) > _CACHE_BYTES:
        known.popitem(last=False)
