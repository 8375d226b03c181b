"""Joins a training loop through PyTorch's own hooks and writes down every optimizer step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from explaind.errors import NonFiniteError, RecordingError
from explaind.parameters import ParameterTable
from explaind.recording.capture import CallCapture, ForwardCall
from explaind.recording.gradients import Arrivals, all_finite, first_nonfinite, skipped_by_scaler, unscaled
from explaind.recording.naming import ExampleNames
from explaind.recording.optimizers import Optimizers
from explaind.recording.ownership import GroupMembers, check_model_and_optimizers, owning_groups, tracked_parameters
from explaind.recording.plan import RecordingPlan, any_loss, measure
from explaind.recording.replays import StepReplays
from explaind.recording.steps import StepRows
from explaind.replay.model import sparse_weights
from explaind.store import check_free, free_path

__all__ = ["Recorder", "trace"]


def trace(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    store: str | Path | None = None,
    *,
    example_grads: Literal["replayed", "stored"] = "replayed",
    objective: Callable[[nn.Module, Any], Tensor] | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Recorder:
    """Record every optimizer step of the enclosed training loop, so that it can be decomposed exactly.

    The loop needs no change, and its weights come out bit-identical. Per step s the store gets θ_s, the
    optimizer's state and hyperparameters, the gradient G_s, and for each forward call of the model its inputs,
    the cotangents c = ∂L/∂f, the examples' ids, the training mode and the random number generator's state.

    Args:
        model: called as `model(…)` in the loop, with tensors that have a row per example; what the loss is computed
            from has one too. A ModuleDict or ModuleList stands for modules that the loop calls one by one.
        optimizer: owns all parameters of `model` that require gradients, and no others. Several that share them, such
            as `[muon, adamw]`, make one step together: a round in which each steps at most once. Frozen parameters
            may be added to them as groups while they train.
        store: directory of the zarr store to write; by default the first free `storage/run-N.zarr`.
        example_grads: `"replayed"` recomputes per-example gradients from the record when they are needed;
            `"stored"` writes them down, at `num_rows · D` numbers per step.
        objective: `objective(model, batch)` returns the losses of a batch's examples, `[example]` or
            `[example, token]`, whose sum is the loop's loss; for models that compute their loss inside, or whose
            outputs are too large to keep cotangents of. The batch is the one that `recorder.batches` yielded.
        overwrite: replace a run that is already at `store`.
        metadata: JSON-able notes to keep with the run.

    Returns:
        A context manager; `recorder.batches(loader)` and `recorder.examples(ids)` name the examples.

    Raises:
        TypeError: `model` is no module, or `optimizer` is no optimizer, nor several; or they cannot be traced.
        ValueError: the optimizer's parameters are not those of the model.
        StoreExistsError: something is at `store` already.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with explaind.trace(model, optimizer, store) as recorder:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.eye(2)).square().sum().backward()
        ...         optimizer.step()
        >>> recorder.num_steps
        3
    """
    if example_grads not in ("replayed", "stored"):
        raise ValueError(f"example_grads must be 'replayed' or 'stored', got {example_grads!r}")
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise TypeError(f"metadata must be plain data that JSON can hold: {error}.") from error
    path = Path(store) if store is not None else free_path(Path("storage"))
    return Recorder(
        model,
        optimizer,
        path,
        example_grads=example_grads,
        objective=objective,
        overwrite=overwrite,
        metadata=dict(metadata or {}),
    )


class Recorder:
    """A recording in progress; made by `trace`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        path: Path,
        *,
        example_grads: Literal["replayed", "stored"],
        objective: Callable[[nn.Module, Any], Tensor] | None,
        overwrite: bool,
        metadata: dict[str, Any],
    ) -> None:
        self._called = model
        model = getattr(model, "_orig_mod", model)  # of a compiled model the one that it was made of
        optimizers = Optimizers(optimizer if isinstance(optimizer, Sequence) else [optimizer])
        check_model_and_optimizers(model, optimizers)
        self.path = path
        """Directory of the store."""
        self._model = model
        self._objective = objective
        self._optimizers = optimizers
        self._tracked = tracked_parameters(model, optimizers)
        self._table = ParameterTable.of(self._tracked, owning_groups(self._tracked, optimizers))
        self._members = GroupMembers(optimizers)
        self._stepping = False
        self._stepped: set[Optimizer] = set()
        self._names = ExampleNames()
        self._arrivals = Arrivals(self._tracked, self._table)
        self._watched: set[str] = set()
        self._loss = self._step_loss = math.nan
        self._hooks: list[Any] = []
        self._entered = False
        self._options: dict[str, Any] = {
            "example_grads": example_grads,
            "objective": objective,
            "overwrite": False,
            "metadata": metadata,
        }
        self._overwrite = overwrite
        self._replays = StepReplays(
            model,
            self._tracked,
            self._table,
            objective=objective,
            fixed_tensors=lambda version: self._rows.fixed_tensors(version),
        )
        self._rows = StepRows(
            model,
            optimizers,
            path,
            self._tracked,
            self._table,
            names=self._names,
            example_grads=self._example_grads if example_grads == "stored" else None,
            metadata=metadata,
        )
        check_free(path, overwrite=overwrite)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps recorded so far."""
        return self._rows.num_steps

    def __repr__(self) -> str:
        state = "recording" if self._hooks else "not recording"
        return f"<Recorder {state} to {self.path}, {self.num_steps} steps>"

    def plan(
        self,
        *inputs: Any,
        steps: int,
        examples: int | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> RecordingPlan:
        """What recording a loop will cost in room and time, before it begins.

        Copies of model and optimizers make a few steps, with and without recording them, in a directory beside the
        store that is deleted again; nothing else is written, and nothing is changed.

        Args:
            inputs: a batch, as the loop calls the model with; with an objective the batch that it is given.
            steps: number of optimizer steps that the loop will make.
            examples: number of distinct examples in all batches; without it, that of `inputs`.
            loss: takes the model's output for `inputs` to the loop's loss. Without it the cotangents at the output are
                taken to be dense; where they have many zeros, as with a negative log-likelihood, it will be less.
            kwargs: further arguments of the model.

        Raises:
            RecordingError: the recording has begun, or the loop calls the parts of a container, not a model.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> plan = explaind.trace(model, optimizer, store).plan(torch.eye(2), steps=1000)
            >>> plan.steps, plan.examples, plan.total_bytes > 1000 * plan.bytes_per_step["parameters"]
            (1000, 2, True)
        """
        if self._entered:
            raise RecordingError("a plan is made before the recording begins: explaind.trace(…).plan(…).")
        if isinstance(self._model, (nn.ModuleList, nn.ModuleDict)):
            raise RecordingError(
                "the loop calls the parts of a container one by one, which a plan cannot imitate. Make a plan for a "
                "module that calls them."
            )

        def record(path: Path, model: nn.Module, optimizers: list[Optimizer]) -> Recorder:
            return Recorder(model, optimizers, path, **self._options)

        def compute(model: nn.Module, recorder: Recorder | None) -> Tensor:
            if self._objective is None:
                return (loss or any_loss)(model(*inputs, **kwargs))
            batch = inputs[0] if len(inputs) == 1 else inputs
            if recorder is not None:
                recorder._names.whole(batch)
            return self._objective(model, batch).sum()

        return measure(self._model, self._optimizers, record, compute, path=self.path, steps=steps, examples=examples)

    # ------------------------------------------------------------------ naming examples

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Iterate over a DataLoader, naming each batch's examples by their index in the data set.

        The batches, their order and the random numbers drawn are those of `loader`.

        Raises:
            TypeError: not a DataLoader, or one without indices.
            RecordingError: loaders of two data sets, or two loaders at once.
        """
        self._check_entered()
        return self._names.batches(loader)

    def examples(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> None:
        """Name by hand the rows of the forward calls of this step, one integer id per row.

        Call it again in every step, and before each micro-batch.

        Raises:
            TypeError: the ids are not integers.
        """
        self._check_entered()
        self._names.by_hand(ids)

    def _check_entered(self) -> None:
        if not self._hooks:
            raise RecordingError(
                "nothing is being recorded: use `with explaind.trace(…) as recorder:` around the loop."
            )

    def log(self, *, loss: float | Tensor) -> None:
        """Note the loss of the current step, to be shown in `run.history`.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        self._loss = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(self._loss):
            raise NonFiniteError(f"the loss is {self._loss} at step {self.num_steps}.")

    # ------------------------------------------------------------------ context manager

    def __enter__(self) -> Self:
        if self._entered:
            raise RecordingError("a recorder records once: call explaind.trace again for another run.")
        self._entered = True
        self._rows.open(overwrite=self._overwrite)
        self._capture = CallCapture(
            self._model,
            self._called,
            current_step=lambda: self.num_steps,
            named=self._names.named,
            objective=self._objective is not None,
            before_call=self._before_call,
            fixed_version=self._rows.fixed_version,
            gradients_cleared=self._gradients_cleared,
            arrival=self._arrivals.expect,
        )
        self._hooks = [
            *(optimizer.register_step_pre_hook(self._before_step) for optimizer in self._optimizers),
            *(optimizer.register_step_post_hook(self._after_step) for optimizer in self._optimizers),
        ]
        self._watch_gradients()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._capture.remove()
        if self._stepped and not self._stepping:
            self._end_step()
        self._rows.close()

    # ------------------------------------------------------------------ hooks

    def _gradients_cleared(self) -> bool:
        return not any(p.grad is not None and bool(p.grad.any()) for p in self._tracked.values())

    def _watch_gradients(self) -> None:
        """See the gradients of the parameters that require some by now."""
        for name, parameter in self._tracked.items():
            if parameter.requires_grad and name not in self._watched:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._note_arrival(name)))
                self._watched.add(name)

    def _note_arrival(self, name: str) -> Callable[[Tensor], None]:
        settle = self._capture.settle
        return lambda parameter: settle(name)

    def _before_call(self) -> None:
        if self._stepped and not self._stepping:  # a forward pass begins the next round, also if not all have stepped
            self._end_step()
        self._take_in_parameters()
        self._watch_gradients()

    def _take_in_parameters(self) -> None:
        """Record the parameters, too, that the optimizers were given since the last step."""
        if self._rows.unfinished or not self._members.have_changed():
            return
        every = tracked_parameters(self._model, self._optimizers)
        owned = {id(parameter) for group in self._optimizers.param_groups for parameter in group["params"]}
        if foreign := len(owned) - len(every):
            raise RecordingError(
                f"a group was added to the optimizer with {foreign} parameter{'s' if foreign > 1 else ''} that the "
                f"traced model does not have; what they do cannot be recorded. The {self.num_steps} steps before are "
                f"safe in {self.path}."
            )
        places = self._members.places()
        tracked = self._tracked | {name: parameter for name, parameter in every.items() if name not in self._tracked}
        table = ParameterTable.of(tracked, owning_groups(tracked, self._optimizers))
        self._rows.widen(tracked, table, places)
        self._replays.widen(tracked, table)
        self._arrivals.widen(tracked, table)
        self._tracked, self._table = tracked, table

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if skipped_by_scaler(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._record_step(optimizer)
            return None

        # With a closure the gradient is computed inside `step`: it is complete once the closure returns.
        def traced_closure() -> Any:
            loss = closure()
            if loss is not None:
                self.log(loss=loss)
            self._record_step(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": traced_closure}
        return (args[0], traced_closure, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if skipped_by_scaler(optimizer):
            return
        if not all_finite(self._table.flatten(self._tracked)):
            name = first_nonfinite(self._tracked)
            raise NonFiniteError(
                f"step {self.num_steps} made entries of the parameter '{name}' NaN or infinite. The steps before it "
                f"are safe in {self.path}."
            )
        self._stepping = False
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self._end_step()

    def _end_step(self) -> None:
        self._rows.finish(loss=self._step_loss)
        self._stepped.clear()
        self._names.end_step()

    def _record_step(self, optimizer: Optimizer) -> None:
        if self._stepping or (self._rows.unfinished and not self._stepped):
            raise RecordingError(
                f"the optimizer's step {self.num_steps} began again before it was finished: an error stopped it, or "
                "its step() calls that of another optimizer class. A recording cannot go on after that."
            )
        if optimizer in self._stepped:
            self._end_step()
        self._take_in_parameters()
        calls = self._capture.take()
        if self._gradients_cleared():  # and so the calls before it do not count
            calls = []
        own = set(map(id, chain.from_iterable(group["params"] for group in optimizer.param_groups)))
        found = {name: parameter.grad for name, parameter in self._tracked.items() if id(parameter) in own}
        sparse = {name for name, gradient in found.items() if gradient is not None and gradient.is_sparse}
        if sparse and (unknown := sorted(sparse - sparse_weights(self._model))):
            raise RecordingError(
                f"the gradient of '{unknown[0]}' is sparse, and not as that of a torch.nn.Embedding or EmbeddingBag "
                "with sparse=True. Use one of these layers, or keep the gradient dense with sparse=False."
            )
        gradients = unscaled(found, optimizer)
        gradient, params = self._table.flatten(gradients), self._table.flatten(self._tracked)
        self._check_step(calls, gradients, gradient, params)
        rescaling = self._arrivals.rescaling(gradients, gradient, self.num_steps)
        if not self._stepped:
            self._rows.begin(params)
            self._rows.add_calls(calls)
            self._step_loss, self._loss = self._loss, math.nan
        self._rows.add_gradients(gradients, gradient, rescaling)
        self._stepping = True
        if self._objective is not None and self.num_steps == 0 and calls:
            with self._capture.paused():
                self._replays.check_objective(calls, gradients, rescaling, self.num_steps)
        self._arrivals.forget(gradients)

    def _example_grads(self, call: ForwardCall) -> NDArray[Any]:
        with self._capture.paused():
            return self._replays.example_grads(call)

    # ------------------------------------------------------------------ checks

    def _check_step(
        self, calls: Sequence[ForwardCall], gradients: Mapping[str, Tensor | None], gradient: Tensor, params: Tensor
    ) -> None:
        if self._stepped and calls:
            raise RecordingError(
                f"a backward pass came between the steps of two optimizers in step {self.num_steps}, so they do not "
                "share one gradient. Compute all gradients before the first of them steps, or make the forward pass of "
                "the second after the step of the first."
            )
        for what, flat, tensors in (("gradient of", gradient, gradients), ("parameter", params, self._tracked)):
            if not all_finite(flat):
                raise NonFiniteError(
                    f"the {what} '{first_nonfinite(tensors)}' has NaN or infinite entries at step {self.num_steps}. "
                    f"The steps before it are safe in {self.path}."
                )
        for call in calls:
            if call.step == self.num_steps and (changed := call.first_changed(self._capture.parameters)) is not None:
                raise RecordingError(
                    f"the parameter '{changed}' was changed between the forward pass and the optimizer's step "
                    f"{self.num_steps}, so the gradient is not that of the weights that the step begins with. Change "
                    "weights after the step (to decay or clamp them, say). A step along the gradient at other weights, "
                    "as in sharpness-aware minimisation, cannot be traced."
                )
        if not self._stepped and not calls and not self._gradients_cleared():
            raise RecordingError(
                f"no call of the traced model reached the gradient of step {self.num_steps}. Call the model itself, "
                "model(x), not model.forward(x) or one of its parts, inside the traced block."
            )
        if self._members.have_changed():
            raise RecordingError(
                f"a parameter group was added between the steps of two optimizers in step {self.num_steps}. Add it "
                "after both or before both."
            )
