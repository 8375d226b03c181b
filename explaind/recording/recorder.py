"""Recording as the user asks for it: `trace` around a training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from explaind.errors import RecordingError
from explaind.paths import check_free, free_path
from explaind.places import Place, place_of
from explaind.recording.loop import TracedLoop
from explaind.recording.naming import ExampleNames
from explaind.recording.optimizers import Optimizers
from explaind.recording.ownership import check_model_and_optimizers
from explaind.recording.plan import RecordingPlan, any_loss, measure

__all__ = ["Recorder", "trace"]


def trace(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    store: str | Place | None = None,
    *,
    snapshot_every: int = 1,
    example_grads: Literal["replayed", "stored"] = "replayed",
    objective: Callable[[nn.Module, Any], Tensor] | None = None,
    inputs: Literal["stored", "by_reference"] = "stored",
    resume: bool = False,
    overwrite: bool = False,
    durable: bool = False,
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
        store: directory of the zarr store to write; by default the first free `storage/run-N.zarr`. Or a URL that
            fsspec knows, such as `s3://bucket/run.zarr`: nothing can keep a second writer away from there.
        snapshot_every: store the parameters before every K-th step only, and with them the optimizer's state. The
            steps between are replayed when they are read, which takes a forward and a backward pass each and gives the
            same numbers; gradients are not stored, unless they cannot be replayed. 1 stores the parameters and
            gradients of all steps.
        example_grads: `"replayed"` recomputes per-example gradients from the record when they are needed;
            `"stored"` writes them down, at `num_rows · D` numbers per step.
        objective: `objective(model, batch)` returns the losses of a batch's examples, `[example]` or
            `[example, token]`, whose sum is the loop's loss; for models that compute their loss inside, or whose
            outputs are too large to keep cotangents of. The batch is the one that `recorder.batches` yielded.
        inputs: `"stored"` writes each distinct input down once; `"by_reference"` only the ids of the examples, which
            `recorder.batches` or `recorder.examples` must give, and 16 bytes for each tensor by which its content is
            known again. What needs the inputs later then takes the data set: `explaind.open_run(…, data=)`. An example
            must come with the same input every time. Of an objective's batch nothing is stored either.
        resume: go on with the run at `store`, from its last whole step; if there is none, or it has no finished step,
            begin one. So a script that is stopped in whatever way can simply be started again. Entering the block, or
            `recorder.restore()`, brings parameters, buffers, the optimizer's state and settings (`lr`) and the random
            numbers of torch, Python and NumPy to where they were, and `recorder.batches` leaves out what was used, so
            that a deterministic loop goes on bit-identically. What else the loop changes, such as a scheduler, is given
            to `recorder.keep`. A loop without `recorder.batches` begins at `recorder.num_steps`. Batches that are left
            out are loaded all the same, and compared with the recording.
        overwrite: replace a run that is already at `store`.
        durable: force every block to the device before it is published, so that a power cut, too, loses nothing
            older. It is written as fast as the device can, and where that is slow it is published less often. Without
            it the system may keep the last half minute in memory; nothing else than a power cut can lose that.
        metadata: JSON-able notes to keep with the run; a run that is resumed adds them to those it has.

    Returns:
        A context manager; `recorder.batches(loader)` and `recorder.examples(ids)` name the examples.

    Raises:
        TypeError: `model` is no module, or `optimizer` is no optimizer, nor several; or they cannot be traced.
        ModelMismatchError: when the recording begins, the model is not that of the run to be resumed.
        ResumeError: when it begins, the optimizer or an option is not; or, in the loop, the data.
        ValueError: the optimizer's parameters are not those of the model, or its updates cannot be replayed although
            `snapshot_every` asks for it.
        StoreExistsError: something is at `store` already.
        StoreInUseError: when the recording begins, another one is writing to `store`.
        StoreUnreachableError: object storage cannot be written.

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
    if inputs not in ("stored", "by_reference"):
        raise ValueError(f"inputs must be 'stored' or 'by_reference', got {inputs!r}.")
    if isinstance(snapshot_every, bool) or not isinstance(snapshot_every, int) or snapshot_every < 1:
        raise ValueError(f"snapshot_every must be a whole number of steps, at least 1; got {snapshot_every!r}.")
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise TypeError(f"metadata must be plain data that JSON can hold: {error}.") from error
    if resume and (overwrite or store is None):
        raise ValueError(
            "resume=True goes on with a run that is there: "
            + ("overwrite=True would delete it; give one of them." if overwrite else "say at which path it is.")
        )
    path = place_of(store) if store is not None else free_path(Path("storage"))
    if resume and not isinstance(path, Path):
        raise ValueError(
            f"resume=True goes on with a run in a directory, where nobody else can write it meanwhile; got {path}. "
            "Record to a directory, and bring the run there with run.export(url)."
        )
    if resume and inputs == "by_reference":
        raise ValueError(
            "resume=True tells inputs by their content, which inputs='by_reference' does not store. Give one of them."
        )
    return Recorder(
        model,
        optimizer,
        path,
        snapshot_every=snapshot_every,
        example_grads=example_grads,
        objective=objective,
        inputs=inputs,
        resume=resume,
        overwrite=overwrite,
        durable=durable,
        metadata=dict(metadata or {}),
    )


class Recorder:
    """A recording in progress; made by `trace`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        path: Place,
        *,
        snapshot_every: int,
        example_grads: Literal["replayed", "stored"],
        objective: Callable[[nn.Module, Any], Tensor] | None,
        inputs: Literal["stored", "by_reference"],
        resume: bool,
        overwrite: bool,
        durable: bool,
        metadata: dict[str, Any],
    ) -> None:
        called = model
        model = getattr(model, "_orig_mod", model)  # of a compiled model the one that it was made of
        optimizers = Optimizers(optimizer if isinstance(optimizer, Sequence) else [optimizer])
        check_model_and_optimizers(model, optimizers)
        self.path = path
        """Where the store is."""
        self._model, self._optimizers, self._objective = model, optimizers, objective
        self._options: dict[str, Any] = {
            "snapshot_every": snapshot_every,
            "example_grads": example_grads,
            "objective": objective,
            "inputs": inputs,
            "resume": False,
            "overwrite": False,
            "durable": durable,
            "metadata": metadata,
        }
        self._resume, self._overwrite, self._durable = resume, overwrite, durable
        self._entered = False
        self._names = ExampleNames()
        self._loop = TracedLoop(
            model,
            called,
            optimizers,
            path,
            names=self._names,
            objective=objective,
            stores_example_grads=example_grads == "stored",
            by_reference=inputs == "by_reference",
            snapshot_every=snapshot_every,
            metadata=metadata,
        )
        self._rows = self._loop.rows
        if not resume:
            check_free(path, overwrite=overwrite)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps recorded so far."""
        return self._rows.num_steps

    def __repr__(self) -> str:
        state = "recording" if self._loop.joined else "not recording"
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
                if recorder is not None and self._options["inputs"] == "by_reference":
                    recorder._names.whole((inputs, kwargs))
                return (loss or any_loss)(model(*inputs, **kwargs))
            batch = inputs[0] if len(inputs) == 1 else inputs
            if recorder is not None:
                recorder._names.whole(batch)
            return self._objective(model, batch).sum()

        return measure(self._model, self._optimizers, record, compute, path=self.path, steps=steps, examples=examples)

    # ------------------------------------------------------------------ naming examples

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Iterate over a DataLoader, naming each batch's examples by their index in the data set.

        The batches, their order and the random numbers drawn are those of `loader`. Where a run is resumed, it gives
        no batch that was used for a step before: none at all in iterations that were over, and the rest of the one
        that was in progress.

        Raises:
            TypeError: not a DataLoader, or one without indices.
            RecordingError: loaders of two data sets, or two loaders at once.
            ResumeError: the run that is resumed was recorded with other data, or in another order.
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
        self._loop.continuation.begin_step()

    # ------------------------------------------------------------------ going on with an interrupted run

    def keep(self, *objects: Any) -> None:
        """Keep the state of more objects, so that resuming brings them to where they were, bit for bit.

        Call it before the loop, and before it is resumed with the same objects in the same order.

        Args:
            objects: have `state_dict()` and `load_state_dict()`, such as a learning-rate scheduler, a GradScaler or
                averaged weights, or are a `torch.Generator` that the loop draws from. Their state is plain data and
                tensors. It is written with every block of steps.

        Raises:
            TypeError: an object has no such state.
            ResumeError: the run that is resumed has kept other objects.
            RecordingError: steps were recorded already.
        """
        self._check_entered()
        if self._loop.continuation.goes_on:
            raise RecordingError("recorder.keep(…) comes before the first step, so that every step is kept with it.")
        for companion in objects:
            self._loop.continuation.keep(companion)

    def restore(self) -> int:
        """Bring model, optimizer, what is kept, and random numbers to where the run goes on.

        Entering the block with `resume=True` does it too, and so does `recorder.batches` when the loop comes to the
        batch that is next. It does nothing if there was no run to go on with.

        Returns:
            The number of steps that are finished.

        Raises:
            RecordingError: a step was made since.
        """
        self._check_entered()
        if self._loop.continuation.goes_on:
            raise RecordingError(
                f"recorder.restore() comes before the first step; there were some since, and it is step "
                f"{self.num_steps} now."
            )
        self._loop.continuation.put_back()
        return self.num_steps

    def _check_entered(self) -> None:
        if not self._loop.joined:
            raise RecordingError(
                "nothing is being recorded: use `with explaind.trace(…) as recorder:` around the loop."
            )

    def log(self, *, loss: float | Tensor) -> None:
        """Note the loss of the current step, to be shown in `run.history`.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        self._loop.log(loss)

    # ------------------------------------------------------------------ context manager

    def __enter__(self) -> Self:
        if self._entered:
            raise RecordingError("a recorder records once: call explaind.trace again for another run.")
        self._entered = True
        self._loop.join(overwrite=self._overwrite, durable=self._durable, resume=self._resume)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.leave(in_order=kind is None)
