"""What is written of every step, in which array; a step counts once the optimizer has finished it."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.parameters import ParameterTable
from explaind.places import Place
from explaind.recording.calls import CallRows
from explaind.recording.contents import batch_rows
from explaind.recording.fixed import FixedTensors, module_types
from explaind.recording.forwards import ForwardCall
from explaind.recording.gradients import all_finite
from explaind.recording.groups import GroupHistory
from explaind.recording.host import machine
from explaind.recording.lock import Lock
from explaind.recording.loop_points import LoopPoint, PointRows
from explaind.recording.memory import CopyMemory
from explaind.recording.naming import ExampleNames
from explaind.recording.optimizers import Optimizers
from explaind.recording.pace import Pace
from explaind.recording.references import References
from explaind.recording.repeated import Repeated, among
from explaind.recording.resumption import Resumption
from explaind.recording.snapshots import Moment, MomentRows, Update, gradient_rows
from explaind.recording.state import StateHistory
from explaind.recording.widening import Widening
from explaind.recording.writer import Later, Rows, StoreWriter
from explaind.replay.model import sparse_weights
from explaind.replay.updates import UpdateReplay

__all__ = ["StepRows"]

_PER_PARAMETER = ("step", "parameter")


class StepRows:
    """Turns steps into rows of the store's arrays; `storage/README.md` says what each array means.

    Args:
        model, optimizers: what is recorded.
        path: directory of the store.
        tracked: the recorded parameters, by name.
        table: their order.
        names: gives the rows' example ids.
        example_grads: computes the per-example gradients of a call, `[row, element]`; None if they are not stored.
        by_reference: whether inputs are only referred to.
        snapshot_every: number of steps from one stored moment to the next.
        metadata: the user's notes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        path: Place,
        tracked: Mapping[str, nn.Parameter],
        table: ParameterTable,
        *,
        names: ExampleNames,
        example_grads: Callable[[ForwardCall], NDArray[Any]] | None,
        by_reference: bool,
        snapshot_every: int,
        metadata: dict[str, Any],
    ) -> None:
        self.num_steps = 0
        """Number of finished steps."""
        self.unfinished = False
        """Whether a step has begun that the optimizer has not finished."""
        self.keeps_gradients = False
        """Whether the gradient of the step in progress is stored although its moment may not be."""
        self._path, self._optimizers, self._tracked, self._table = path, optimizers, tracked, table
        self._names, self._example_grads, self._snapshot_every = names, example_grads, snapshot_every
        self._model = model
        self._references = References(path) if by_reference else None
        self._update: Update | None = None
        self._groups = GroupHistory(optimizers)
        self._fixed = FixedTensors(model, tracked)
        self._has_gradient = Repeated(among)
        self._scale_and_limit = Repeated(_columns)
        self.points = PointRows()
        """Where the loop can go on, if it is resumed."""
        self._memory = CopyMemory()
        self._end_params: Tensor | None = None
        self.attributes = self._layout(table, self._groups, self._fixed.layout) | {
            "modules": module_types(model),
            "model": type(model).__name__,
            "optimizer": optimizers.name,
            "example_grads": "replayed" if example_grads is None else "stored",
            "inputs": "by_reference" if by_reference else "stored",
            "device": str(next(iter(tracked.values())).device),
            "snapshot_every": snapshot_every,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "metadata": metadata,
        }
        """The description of the run when it begins."""
        if snapshot_every > 1 and self._update_replay() is None:
            raise ValueError(
                f"snapshot_every={snapshot_every} needs optimizers whose updates can be replayed: those of "
                f"torch.optim, with dense gradients. This run has {optimizers.name}"
                f"{' and sparse gradients' if sparse_weights(model) else ''}; record it with snapshot_every=1."
            )

    def _layout(self, table: ParameterTable, groups: GroupHistory, fixed: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The attributes that say what each element, parameter, group and byte is."""
        return {
            "parameters": table.to_json(),
            "fixed": fixed,
            "group_optimizers": self._optimizers.group_classes,
            "groups": groups.constants,
            "group_keys": groups.keys,
            "group_types": groups.types,
        }

    def open(self, *, overwrite: bool, durable: bool, resumption: Resumption | None, lock: Lock | None) -> None:
        """Create the store and publish it, with no step yet; or go on with the one that is there.

        Args:
            overwrite: replace a run that is there.
            durable: force every block to the device.
            resumption: where to go on.
            lock: the lock on the store, if it is held already.
        """
        attributes = self.attributes if resumption is None else resumption.changes(self.attributes["metadata"])
        self._writer = StoreWriter(
            self._path,
            attributes=attributes,
            overwrite=overwrite,
            durable=durable,
            lock=lock,
            begun=None if resumption is None else resumption.begun(durable=durable),
        )
        self.pace = Pace(self._writer, self.points)
        """When what is collected is published."""
        self._calls = CallRows(
            names=self._names,
            example_grads=self._example_grads,
            references=self._references,
            hold=self._hold,
            describe=self._writer.set_attributes,
        )
        self._state = StateHistory(self._optimizers, self._tracked, self._table, self._writer.set_attributes)
        self._moments = MomentRows(
            self._table,
            self._groups,
            every=self._snapshot_every,
            replay=self._update_replay(),
            types=lambda: self._state.types,
        )
        if resumption is not None:
            self._go_on(resumption)
            return
        self._next_state = self._state.take()
        self._writer.flush()
        self._writer.wait()

    def _go_on(self, resumption: Resumption) -> None:
        point = resumption.point
        self.num_steps = resumption.step
        self._calls.go_on(resumption.calls())
        self._moments.go_on(*resumption.state_arrays())
        if point["fixed_version"] >= 0 and self._fixed.layout:
            self._fixed.go_on(point["fixed_version"], resumption.fixed_bytes)
        self._names.go_on(point["named"])

    def reorder(self, tracked: Mapping[str, nn.Parameter], table: ParameterTable, recorded: Mapping[str, Any]) -> None:
        """Go on in the order of a run, before anything is recorded."""
        self._tracked, self._table = tracked, table
        self._groups.go_on(recorded["groups"], recorded["group_keys"], recorded["group_types"])

    def take_state(self) -> None:
        """Take down the optimizers' state once more, as it was put back."""
        self._next_state = self._state.take()

    def take_point(self, content: Callable[[], dict[str, Any]]) -> None:
        """Take down a point from which the loop can go on.

        Args:
            content: gives what `LoopState` says of it.
        """
        version, fixed = self._fixed.look()
        own = {
            "fixed_version": version,
            "fixed": None if fixed is None else torch.from_numpy(fixed),
            "named": self._names.are_given,
        }
        params, is_sure = self._end_params, False
        if params is None or self.points.wants_params:
            out = self._memory.empty((self._table.num_elements,), self._table.dtype)
            params, is_sure = self._table.flatten(self._tracked, out=out), True
        self.points.hold(
            LoopPoint(step=self.num_steps, content=lambda: own | content(), params=params.numpy(), is_sure=is_sure)
        )

    def add_batch(self, iteration: int, indices: Sequence[int], batch: Any) -> None:
        """Take down what a data loader gave in an iteration over it."""
        self._writer.add(batch_rows(iteration, self.num_steps, indices, batch))

    def widen(self, tracked: Mapping[str, nn.Parameter], table: ParameterTable, places: Sequence[int]) -> None:
        """Go on, between two steps, with parameters that were frozen so far; earlier rows get what they were then.

        Args:
            tracked: all parameters from now on, by name.
            table: their order, the new ones last.
            places: number of each earlier parameter group among those that there are now.

        Raises:
            RecordingError: the disk is full; the store is as it was.
        """
        widening = Widening(old=self._table, new=table, fixed=self._fixed.layout)
        groups = self._groups.widened(places)
        self._writer.flush()
        self._writer.wait()
        changes = widening.changes(self._writer.dims, self._writer.read_row)
        changes["hyperparameters"] = lambda rows, start: groups.rearrange(rows, self._groups, places)
        fixed = [entry for entry in self._fixed.layout if entry["name"] not in tracked]
        self._writer.rewrite(changes, attributes=self._layout(table, groups, fixed))
        self._tracked, self._table, self._groups = tracked, table, groups
        self._fixed.release(tracked, widening.without_new)
        self._state.widen(tracked, table)
        self._moments.widen(table, groups, self._update_replay())
        self._next_state, self._update, self._end_params = self._state.take(), None, None
        self.points.release()

    def _update_replay(self) -> UpdateReplay | None:
        """Makes updates again, if that can be done with what is recorded."""
        if sparse_weights(self._model):
            return None
        device = next(iter(self._tracked.values())).device
        return UpdateReplay.of(self._table, self._optimizers.group_classes, device)

    def begin(self, params: Tensor) -> None:
        """Take down θ_s, the parameters `[element]` that the step starts from.

        Raises:
            RecordingError: what was taken down before could not be written, or not be referred to.
        """
        self._writer.check()
        if self._references is not None:
            self._references.check()
        self.pace.begin_step(self.num_steps)
        self.points.begin(self.num_steps, params.numpy())
        self.unfinished = True
        self._add_moment(params, self._groups.values())
        self._held: list[Rows | Later] = []
        self.keeps_gradients = False
        self._gradient: Tensor | None = None
        self._updated: set[str] = set()
        self._rescaling = dict.fromkeys(self._table.names, (1.0, math.inf))

    def add_calls(self, calls: Sequence[ForwardCall]) -> None:
        """Take down the forward calls that the step's gradient came through."""
        for call in calls:
            self._calls.hold(call, self.num_steps, self._table.names)

    def add_gradients(
        self,
        gradients: Mapping[str, Tensor | None],
        flat: Tensor,
        rescaling: Mapping[str, tuple[float, float]],
    ) -> None:
        """Take down what an optimizer is about to use: G_s of its parameters, and its settings.

        Args:
            gradients: of the optimizer's parameters, by name.
            flat: the same, `[element]`.
            rescaling: how they were rescaled since the backward pass, the pair (s, c) of each.
        """
        settings = self._groups.values()
        if self._gradient is None:
            self._gradient, self._hyperparameters = flat, settings
        else:
            for parameter in self._table:
                if parameter.name in gradients:
                    self._gradient[parameter.slice] = flat[parameter.slice]
                    self._hyperparameters[parameter.group] = settings[parameter.group]
        self._rescaling |= rescaling
        self._updated |= {name for name, gradient in gradients.items() if gradient is not None}

    def finish(self, *, loss: float, params: Tensor) -> None:
        """The optimizers have made the step: it counts, and their new state is written.

        Args:
            loss: what was logged.
            params: the parameters at the end of the step, `[element]`.
        """
        self._end_params = params
        assert self._gradient is not None
        scale, limit = self._scale_and_limit(self._rescaling)
        gradient, updated = self._gradient.numpy(), self._has_gradient((self._table.names, self._updated))
        if self._snapshot_every == 1:
            self._hold_one("gradient", gradient, ("step", "element"))
        elif self.keeps_gradients:
            self._held += gradient_rows(self.num_steps, gradient)
        self._hold_one("updated", updated, _PER_PARAMETER)
        self._hold_one("gradient_scale", scale, _PER_PARAMETER)
        self._hold_one("gradient_limit", limit, _PER_PARAMETER)
        self._hold_one("hyperparameters", self._hyperparameters, ("step", "group", "hyperparameter"))
        self._hold_one("loss", np.float64(loss), ("step",))
        self._next_state = self._state.take()
        is_kept = self._snapshot_every == 1 or self.keeps_gradients
        self._update = Update(gradient, updated, self._hyperparameters, is_kept)
        self._writer.add(*self._held)
        self._fixed.forget()
        self.unfinished = False
        self.num_steps += 1

    def close(self) -> None:
        """Write the last parameters and publish everything.

        Raises:
            RecordingError: what was taken down could not be written, or not be referred to.
        """
        # A step that was not finished is no step: the parameters before it are written already.
        if not self.unfinished and all_finite(params := self._table.flatten(self._tracked)):
            self._add_moment(params, None)
            self.points.begin(self.num_steps, params.numpy())
        self._writer.add(*self.points.rows(self.num_steps))
        self._writer.close()
        if self._references is not None:
            self._references.check()

    def _add_moment(self, params: Tensor, hyperparameters: NDArray[np.float64] | None) -> None:
        version = np.array([self.fixed_version()], dtype=np.int64)
        moment = Moment(self.num_steps, params.numpy(), self._next_state, self._update, hyperparameters)
        rows = Later(lambda: self._moments(moment), moment.num_bytes)
        self._writer.add(("moment_fixed", version, ("moment",)), rows)

    def fixed_version(self) -> int:
        """Number of the present version of the buffers and frozen parameters, which is written if it is a new one."""
        version, rows = self._fixed.version()
        if rows is not None:
            self._writer.add(("fixed", rows, ("fixed_version", "fixed_byte")))
        return version

    def fixed_tensors(self, version: int) -> dict[str, Tensor]:
        """The buffers and frozen parameters of a version of the step in progress, by name."""
        return self._fixed.recent(version)

    def _hold(self, rows: Rows | Later) -> None:
        """Hold rows of the step in progress back until the optimizer has finished it."""
        self._held.append(rows)

    def _hold_one(self, name: str, row: Any, dims: tuple[str, ...]) -> None:
        self._hold((name, np.asarray(row)[None], dims))


def _columns(pairs: Mapping[str, tuple[float, float]]) -> NDArray[np.float64]:
    """The first numbers of some pairs, and the second ones, `[2, pair]`."""
    return np.array(list(pairs.values())).T
