"""The scalars of a query's inputs as functions of the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from explaind.calls import rebuild
from explaind.outputs import Output
from explaind.path.kinks import averaged, watched
from explaind.path.query_calls import query_call
from explaind.query import Query
from explaind.replay.model import call_function, cast, modes, vectorizable
from explaind.run import Run

__all__ = ["QueryInputs"]


class QueryInputs:
    """output(f(x_i; θ))_i of every input i, evaluated in eval mode.

    Args:
        run: gives the model and the layout of θ.
        query: inputs x and output.
        fixed: buffers and frozen parameters by name.
        dtypes: types that may be computed in.
        device: where to compute.

    Raises:
        ValueError: the inputs are not those the model was called with.
    """

    def __init__(
        self,
        run: Run,
        query: Query,
        *,
        fixed: Mapping[str, Tensor],
        dtypes: set[torch.dtype],
        device: torch.device,
    ) -> None:
        self._run, self._output, self._device = run, query.output, device
        self._function, self._template = query_call(run, query)
        self._tensors = {name: tensor.to(device) for name, tensor in query.arguments.items()}
        self._fixed = {dtype: cast(fixed, dtype, device) for dtype in dtypes}
        self._is_ready = False
        self.number = query.num_inputs
        """How many there are."""
        if isinstance(query.output, Output):
            self._targets = query.output.targets_for(query.num_inputs).to(device)

    @property
    def by_row(self) -> bool:
        """Whether the output is made row by row, else from all of the model's output."""
        return isinstance(self._output, Output)

    def take(self, rows: Tensor) -> QueryInputs:
        """Some of them, `[row]`."""
        if len(rows) == self.number:
            return self
        part = copy.copy(self)
        part._tensors, part.number = {name: tensor[rows] for name, tensor in self._tensors.items()}, len(rows)
        if self.by_row:
            part._targets = self._targets[rows]
        return part

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Set the model up once for all that is evaluated in the block; else it is for every evaluation."""
        if self._is_ready:
            yield
            return
        with modes(self._run.model, False), vectorizable(self._run.model):
            self._is_ready = True
            try:
                yield
            finally:
                self._is_ready = False

    def leaves(self, params: Tensor) -> dict[str, Tensor]:
        """Flat parameters by name, to be differentiated by."""
        return {name: tensor.requires_grad_() for name, tensor in self._run.table.unflatten(params.detach()).items()}

    def scalars(
        self,
        params: Tensor | Mapping[str, Tensor],
        rows: Tensor,
        slopes: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """The scalars of some inputs, evaluated as one batch, in the type of the parameters, `[row]`.

        Raises:
            ValueError: the output does not fit the model's.
        """
        tensors = self._run.table.unflatten(params) if isinstance(params, Tensor) else params
        inputs = self._chosen(rows, next(iter(tensors.values())).dtype)
        targets = self._targets[rows] if self.by_row else None

        def function(*args: Any, **kwargs: Any) -> Any:
            with slopes or nullcontext():  # which take part in every call of torch, so that it should be no other's
                output = self._function(*args, **kwargs)
                return self._scalars_of(output, targets)

        with self.ready():
            scalars = self._evaluate(tensors, inputs, function)
        if not isinstance(scalars, Tensor) or scalars.ndim != 1:
            shape = tuple(scalars.shape) if isinstance(scalars, Tensor) else type(scalars).__name__
            raise ValueError(f"the query's output must give one scalar per query, shape [query]; it gave {shape}.")
        return scalars

    def _scalars_of(self, output: Any, targets: Tensor | None) -> Any:
        """The scalars of a model's output."""
        if not isinstance(self._output, Output):
            return self._output(output)
        assert targets is not None
        picked = self._output.pick(output)
        self._output.check(picked)
        if picked.shape[:1] != (len(targets),):
            raise ValueError(
                f"the output '{self._output.name}' needs a row of the model's output for every input; of "
                f"{len(targets)} inputs the model made an output of shape {tuple(picked.shape)}."
            )
        return self._output.function(picked, targets)

    def gradients(
        self, wanted: Mapping[str, Tensor], others: Mapping[str, Tensor], rows: Tensor, ends: Iterable[Tensor]
    ) -> dict[str, Tensor]:
        """Gradients of some inputs' scalars, each evaluated on its own, by vmap.

        Args:
            wanted: the parameters by which.
            others: parameters, of which those are used that are not wanted.
            rows: the inputs, `[row]`.
            ends: flat parameters at the ends of a sub-interval, over which the slopes of kinked functions are averaged;
                else none.

        Returns:
            `{name: [row, *shape]}`.
        """
        fixed = {name: tensor.detach() for name, tensor in others.items() if name not in wanted}
        tensors = [self._run.table.unflatten(end) for end in ends]

        def scalar(params: dict[str, Tensor], inputs: dict[str, Tensor], target: Tensor) -> Tensor:
            def function(*args: Any, **kwargs: Any) -> Any:
                return self._scalars_of(self._function(*args, **kwargs), target)

            seen = []
            for end in tensors:
                with watched() as arguments:
                    self._evaluate(end, inputs, function)
                seen.append(arguments)
            with averaged(*seen) if seen else nullcontext():
                scalars: Tensor = self._evaluate({**fixed, **params}, inputs, function)
            return scalars.sum()

        chosen = self._chosen(rows, next(iter(wanted.values())).dtype)
        single = {name: tensor.unsqueeze(1) for name, tensor in chosen.items()}
        params = {name: tensor.detach() for name, tensor in wanted.items()}
        with self.ready():
            found: dict[str, Tensor] = vmap(grad(scalar), in_dims=(None, 0, 0))(
                params, single, self._targets[rows].unsqueeze(1)
            )
        return found

    def _chosen(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Some inputs by name, in some type."""
        every = len(rows) == self.number
        return cast({n: t if every else t[rows] for n, t in self._tensors.items()}, dtype, self._device)

    def _evaluate(
        self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor], function: Callable[..., Any]
    ) -> Any:
        """What a function of the model and the inputs makes with these parameters."""
        fixed = self._fixed[next(iter(tensors.values())).dtype]
        args, kwargs = rebuild(self._template, inputs)
        return call_function(function, self._run.model, {**fixed, **tensors}, args, kwargs)
