"""Follows a training loop through PyTorch's own hooks, and makes steps of what they see."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from explaind.errors import NonFiniteError, RecordingError
from explaind.parameters import ParameterTable
from explaind.places import Place
from explaind.recording.capture import CallCapture
from explaind.recording.checks import (
    check_calls_reach,
    check_finite,
    check_one_gradient,
    check_sparse,
    check_unchanged,
)
from explaind.recording.companions import Companions
from explaind.recording.continuation import Continuation
from explaind.recording.forwards import ForwardCall
from explaind.recording.gradients import Arrivals, all_finite, first_nonfinite, skipped_by_scaler, unscaled
from explaind.recording.lock import lock_of
from explaind.recording.loop_state import LoopState
from explaind.recording.memory import CopyMemory
from explaind.recording.naming import ExampleNames
from explaind.recording.optimizers import Optimizers
from explaind.recording.ownership import GroupMembers, owning_groups, tracked_parameters
from explaind.recording.passes import BackwardPasses
from explaind.recording.replays import StepReplays
from explaind.recording.resumption import Resumption, find_resumption
from explaind.recording.same_run import check_same_run
from explaind.recording.steps import StepRows
from explaind.rescaling import Rescaling

__all__ = ["TracedLoop"]

_CHECKED_STEPS = 2
"""Of the first steps, all gradients are replayed to see whether a reader can do that; later those of some steps."""


class TracedLoop:
    """The hooks on a model, its parameters and its optimizers, and the step in progress.

    Args:
        model: the model.
        called: what the loop calls: the model, its compiled form, or a container of what it calls.
        optimizers: all that train it.
        path: directory of the store.
        names: knows the examples of the batches.
        objective: what stands for the model's calls, if anything.
        stores_example_grads: whether per-example gradients are written down.
        by_reference: whether inputs are only referred to.
        snapshot_every: number of steps from one stored moment to the next.
        metadata: the user's notes.
    """

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        optimizers: Optimizers,
        path: Place,
        *,
        names: ExampleNames,
        objective: Callable[[nn.Module, Any], Tensor] | None,
        stores_example_grads: bool,
        by_reference: bool,
        snapshot_every: int,
        metadata: dict[str, Any],
    ) -> None:
        self._model, self._called, self._optimizers, self._path = model, called, optimizers, path
        self._names, self._objective = names, objective
        self._tracked = tracked_parameters(model, optimizers)
        self._table = ParameterTable.of(self._tracked, owning_groups(self._tracked, optimizers))
        self._members = GroupMembers(optimizers)
        self._copies, self._looks = CopyMemory(), CopyMemory()
        self._arrivals = Arrivals(self._tracked, self._table)
        self._passes = BackwardPasses(gradients_cleared=self._gradients_cleared, arrival=self._arrivals.expect)
        self.rows = StepRows(
            model,
            optimizers,
            path,
            self._tracked,
            self._table,
            names=names,
            example_grads=self._example_grads if stores_example_grads else None,
            by_reference=by_reference,
            snapshot_every=snapshot_every,
            metadata=metadata,
        )
        """What is written of the steps."""
        self._replays = StepReplays(
            model, self._tracked, self._table, objective=objective, fixed_tensors=self.rows.fixed_tensors
        )
        self._snapshot_every, self._keeps_gradients = snapshot_every, False
        self._first = 0
        self._stepping = False
        self._stepped: set[Optimizer] = set()
        self._watched: set[str] = set()
        self._loss = self._step_loss = math.nan
        self._hooks: list[Any] = []

    @property
    def joined(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._hooks)

    def join(self, *, overwrite: bool, durable: bool, resume: bool) -> None:
        """Make the store, or go on with the one that is there, and put the hooks on."""
        resumption, lock = None, lock_of(self._path)
        try:
            if resume and (resumption := find_resumption(self._path, self._model, self._objective)) is not None:
                self._go_on_with(resumption)
            self.rows.open(overwrite=overwrite or resume, durable=durable, resumption=resumption, lock=lock)
            self.continuation = Continuation(
                LoopState(self._model, self._optimizers, Companions()),
                self.rows,
                self._names,
                resumption,
                keeps_gradients=lambda: self._keeps_gradients,
            )
            """Where the loop can go on if it is interrupted, and where it does."""
        except BaseException:
            lock.release()
            raise
        self._capture = CallCapture(
            self._model,
            self._called,
            current_step=lambda: self.rows.num_steps,
            named=self._names.named,
            objective=self._objective is not None,
            before_call=self._before_call,
            fixed_version=self.rows.fixed_version,
            passes=self._passes,
        )
        self._hooks = [
            *(optimizer.register_step_pre_hook(self._before_step) for optimizer in self._optimizers),
            *(optimizer.register_step_post_hook(self._after_step) for optimizer in self._optimizers),
        ]
        self._watch_gradients()

    def _go_on_with(self, resumption: Resumption) -> None:
        """Compare a run with what is to be recorded now, and take over its order of parameters and groups."""
        recorded, table = resumption.attributes, resumption.table
        check_same_run(
            recorded, self.rows.attributes, table, owning_groups(self._tracked, self._optimizers), self._path
        )
        self._tracked, self._table = {name: self._tracked[name] for name in table.names}, table
        self.rows.reorder(self._tracked, table, recorded)
        self._replays.widen(self._tracked, table)
        self._arrivals.widen(self._tracked, table)
        self._first, self._keeps_gradients = resumption.step, resumption.point["keeps_gradients"]
        _ = resumption.moment  # what cannot be read of it is to be said before anything is changed

    def leave(self, *, in_order: bool) -> None:
        """Take the hooks off, and write what is left.

        Args:
            in_order: whether no error has stopped the loop.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._capture.remove()
        try:
            if self._stepped and not self._stepping:
                self._end_step()
            self.continuation.leave(in_order=in_order)
        finally:
            self.rows.close()

    def log(self, loss: float | Tensor) -> None:
        """Note the loss of the step in progress.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        self._loss = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(self._loss):
            raise NonFiniteError(f"the loss is {self._loss} at step {self.rows.num_steps}.")

    # ------------------------------------------------------------------ forward and backward passes

    def _gradients_cleared(self) -> bool:
        return not any(p.grad is not None and bool(p.grad.any()) for p in self._tracked.values())

    def _watch_gradients(self) -> None:
        """See the gradients of the parameters that require some by now."""
        for name, parameter in self._tracked.items():
            if parameter.requires_grad and name not in self._watched:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._note_arrival(name)))
                self._watched.add(name)

    def _note_arrival(self, name: str) -> Callable[[Tensor], None]:
        reach = self._passes.reach
        return lambda parameter: reach(name)

    def _before_call(self) -> None:
        if self._stepped and not self._stepping:  # a forward pass begins the next round, also if not all have stepped
            self._end_step()
        self.continuation.begin_step()
        self._take_in_parameters()
        self._watch_gradients()

    def _take_in_parameters(self) -> None:
        """Record the parameters, too, that the optimizers were given since the last step."""
        if self.rows.unfinished or not self._members.have_changed():
            return
        every = tracked_parameters(self._model, self._optimizers)
        owned = {id(parameter) for group in self._optimizers.param_groups for parameter in group["params"]}
        if foreign := len(owned) - len(every):
            raise RecordingError(
                f"a group was added to the optimizer with {foreign} parameter{'s' if foreign > 1 else ''} that the "
                f"traced model does not have; what they do cannot be recorded. The {self.rows.num_steps} steps before "
                f"are safe in {self._path}."
            )
        places = self._members.places()
        tracked = self._tracked | {name: parameter for name, parameter in every.items() if name not in self._tracked}
        table = ParameterTable.of(tracked, owning_groups(tracked, self._optimizers))
        self.rows.widen(tracked, table, places)
        self._replays.widen(tracked, table)
        self._arrivals.widen(tracked, table)
        self._tracked, self._table = tracked, table

    def _example_grads(self, call: ForwardCall) -> NDArray[Any]:
        with self._capture.paused():
            return self._replays.example_grads(call)

    # ------------------------------------------------------------------ optimizer steps

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if skipped_by_scaler(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._record(optimizer)
            return None

        # With a closure the gradient is computed inside `step`: it is complete once the closure returns.
        def traced_closure() -> Any:
            loss = closure()
            if loss is not None:
                self.log(loss)
            self._record(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": traced_closure}
        return (args[0], traced_closure, *args[2:]), kwargs

    def _record(self, optimizer: Optimizer) -> None:
        """Take down what an optimizer is about to do."""
        if self._stepping or (self.rows.unfinished and not self._stepped):
            raise RecordingError(
                f"the optimizer's step {self.rows.num_steps} began again before it was finished: an error stopped it, "
                "or its step() calls that of another optimizer class. A recording cannot go on after that."
            )
        if optimizer in self._stepped:
            self._end_step()
        self._take_in_parameters()
        first, step, calls = not self._stepped, self.rows.num_steps, self._passes.take()
        own = set(map(id, chain.from_iterable(group["params"] for group in optimizer.param_groups)))
        found = {name: parameter.grad for name, parameter in self._tracked.items() if id(parameter) in own}
        check_sparse(found, self._model)
        gradients = unscaled(found, optimizer)
        gradient, params = self._flat(gradients, self._copies), self._flat(self._tracked, self._copies)
        if cleared := not gradient.numpy().any() and self._gradients_cleared():  # so the calls before it do not count
            calls = []
        if not first:
            check_one_gradient(calls, step)
        check_finite("gradient of", gradient, gradients, step, self._path)
        check_finite("parameter", params, self._tracked, step, self._path)
        check_unchanged(calls, self._capture.parameters, step)
        if first:
            check_calls_reach(calls, step, cleared=cleared)
        self._members.check(step)
        rescaling = self._arrivals.rescaling(gradients, gradient, step)
        if first:
            self.rows.begin(params)
            self.rows.add_calls(calls)
            self._step_loss, self._loss = self._loss, math.nan
        self.rows.add_gradients(gradients, gradient, rescaling)
        if self._snapshot_every > 1:
            self._decide_what_to_keep(
                calls, gradients, gradient, rescaling, is_checked=first and self._is_checked(step)
            )
        self._stepping = True
        if self._objective is not None and step == self._first and calls:
            with self._capture.paused():
                self._replays.check_objective(calls, gradients, rescaling, step)
        self._arrivals.forget(gradients)

    def _is_checked(self, step: int) -> bool:
        return step - self._first < _CHECKED_STEPS or step % self._snapshot_every == 0

    def _decide_what_to_keep(
        self,
        calls: Sequence[ForwardCall],
        gradients: Mapping[str, Tensor | None],
        flat: Tensor,
        rescaling: Mapping[str, tuple[float, float]],
        *,
        is_checked: bool,
    ) -> None:
        """Have the gradient stored if a reader could not replay it."""
        if is_checked and not self._keeps_gradients:
            found = Rescaling.of_pairs(self._table, rescaling)
            with self._capture.paused():
                self._keeps_gradients = not self._replays.reproduce(calls, gradients, flat, found)
            if self._keeps_gradients:
                warnings.warn(
                    f"the gradient of step {self.rows.num_steps} is not, bit for bit, what the recorded forward calls "
                    "give when they are made again: the loss has a term that is not computed from the model's outputs, "
                    "gradients are edited, or the computation is not deterministic. From here on gradients are stored, "
                    f"about {flat.nbytes / 2**20:.2g} MiB per step; snapshot_every saves the rest.",
                    stacklevel=2,
                )
        self.rows.keeps_gradients |= self._keeps_gradients or not self._arrivals.is_exact

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if skipped_by_scaler(optimizer):
            return
        self._end_params = self._flat(self._tracked, self._looks)
        if not all_finite(self._end_params):
            name = first_nonfinite(self._tracked)
            raise NonFiniteError(
                f"step {self.rows.num_steps} made entries of the parameter '{name}' NaN or infinite. The steps before "
                f"it are safe in {self._path}."
            )
        self._stepping = False
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self._end_step()

    def _end_step(self) -> None:
        self.rows.finish(loss=self._step_loss, params=self._end_params)
        self._stepped.clear()
        self._names.end_step()
        self.continuation.end_step()

    def _flat(self, tensors: Mapping[str, Tensor | None], memory: CopyMemory) -> Tensor:
        return self._table.flatten(tensors, out=memory.empty((self._table.num_elements,), self._table.dtype))
