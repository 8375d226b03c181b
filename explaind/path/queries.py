"""The queries of one attribution as functions of the flat parameter vector, with their gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from explaind.calls import rebuild, tensor_names
from explaind.outputs import Output
from explaind.path.kinks import averaged, watched
from explaind.query import Query
from explaind.replay.model import call_function, cast, modes, vectorizable
from explaind.run import Run

__all__ = ["QueryFunction"]

_BLOCK_BYTES = 16 << 20


class QueryFunction:
    """q_j(θ) = Σ_i w_{ji} · output(f(x_i; θ))_i, evaluated in eval mode.

    Args:
        run: gives the model and the layout of θ.
        query: inputs x, output and weights w.
        fixed: buffers and frozen parameters by name.
        combined: sum all queries into one.
        dtype: type of the gradients; values are always float64.
        device: where to compute.

    Raises:
        ValueError: the inputs are not those the model was called with, or the output does not fit the model's.
    """

    def __init__(
        self,
        run: Run,
        query: Query,
        *,
        fixed: Mapping[str, Tensor],
        combined: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._run, self._output, self._dtype, self._device = run, query.output, dtype, device
        self._function, self._template = query_call(run, query)
        self._inputs = {d: cast(query.arguments, d, device) for d in {dtype, torch.float64}}
        self._fixed = {d: cast(fixed, d, device) for d in {dtype, torch.float64}}
        trained = run.flat_params(run.num_steps).to(device=device, dtype=torch.float64)
        with torch.no_grad():
            scalars = self._scalars(trained)
        if not isinstance(scalars, Tensor) or scalars.ndim != 1:
            shape = tuple(scalars.shape) if isinstance(scalars, Tensor) else type(scalars).__name__
            raise ValueError(f"the query's output must give one scalar per query, shape [query]; it gave {shape}.")
        weights = torch.eye(len(scalars), dtype=torch.float64) if query.weights is None else query.weights
        if weights.shape[1] != len(scalars):
            raise ValueError(
                f"the mean is over {weights.shape[1]} inputs, but the query's output gave {len(scalars)} scalars; a "
                "mean needs one scalar per input."
            )
        weights = weights.to(device=device, dtype=torch.float64)
        self._weights = weights.sum(dim=0, keepdim=True) if combined else weights
        names = tuple(query.names if query.names is not None else range(len(self._weights)))
        self.names: tuple[Any, ...] = ("sum",) if combined else names
        """A label per query."""
        if len(self.names) != len(self._weights):
            raise ValueError(f"{len(self.names)} query names were given for {len(self._weights)} queries.")
        self.separate = False
        """Whether every query is evaluated from its own inputs alone, else all inputs as one batch."""
        if isinstance(self._output, Output):
            self._targets = self._output.targets_for(query.num_inputs).to(device)
            self._members, self._member_weights = _pad(self._weights)
            self.separate = self._separates(trained, self._weights @ scalars)

    def _separates(self, trained: Tensor, values: Tensor) -> bool:
        """Whether the queries' own inputs give the values that all inputs together give, and can be differentiated."""
        every = torch.arange(self.num_queries, device=self._device)
        try:
            with torch.no_grad():
                alone = self._per_query(self._scalar, [trained], every, torch.float64)
            self._per_query(grad(self._scalar), [trained], every[:1], torch.float64)
        except (RuntimeError, ValueError):  # how vmap and batch layers say that a row cannot be evaluated alone
            return False
        return torch.allclose(alone, values, rtol=1e-9, atol=1e-9 * float(values.abs().max()))

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return len(self._weights)

    def at(self, params: Tensor) -> Tensor:
        """q(θ) of all queries, float64 `[query]`."""
        with torch.no_grad():
            return self._weights @ self._scalars(params)

    def values(self, start: Tensor, update: Tensor, positions: Tensor, which: Tensor) -> Tensor:
        """q(θ + tΔ) of pairs of a query and a position t, float64 `[pair]`."""
        result = torch.empty(len(which), dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for pairs, (params,) in self._blocks(start, update, [positions], torch.float64):
                if params.ndim == 1:
                    result[pairs] = self._weights[which[pairs]] @ self._scalars(params)
                else:
                    result[pairs] = self._per_query(self._scalar, [params], which[pairs], torch.float64)
        return result

    def gradients(
        self,
        start: Tensor,
        update: Tensor,
        positions: Tensor,
        which: Tensor,
        *,
        ends: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """∇q(θ + tΔ) of pairs of a query and a position t, `[pair, element]`.

        With `ends`, positions `[pair]` of the sub-interval that each node stands for, ReLUs are differentiated by
        their average slope over it.
        """
        blocks = []
        for pairs, (params, *at_ends) in self._blocks(start, update, [positions, *(ends or ())], self._dtype):
            if self.separate:
                tensors = self._per_query(grad(self._scalar), [params, *at_ends], which[pairs], self._dtype)
                blocks.append(self._run.table.flatten_rows(tensors))
            else:
                # Plain autograd differentiates what torch.func cannot, such as checkpoints and custom functions.
                leaf = params.requires_grad_()
                with torch.enable_grad():
                    scalars = self._scalars(leaf, at_ends)
                cotangents = self._weights[which[pairs]].to(self._dtype)
                rows = [torch.autograd.grad(scalars, leaf, c, retain_graph=True)[0] for c in cotangents]
                blocks.append(torch.stack(rows))
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]

    def _blocks(
        self, start: Tensor, update: Tensor, positions: list[Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Split the pairs into consecutive blocks that are evaluated at once.

        Yields the pairs, and θ + tΔ for each list of positions: one vector `[element]` where all pairs of the block
        have the same ones, else `[pair, element]`.
        """
        block = max(1, _BLOCK_BYTES // (len(start) * dtype.itemsize))
        shared = not self.separate or bool((positions[0] == positions[0][0]).all())
        first = 0
        while first < len(positions[0]):
            last = min(first + block, len(positions[0]))
            if shared:
                other = (positions[0][first:last] != positions[0][first]).nonzero()
                last = first + int(other[0]) if len(other) else last
            part = slice(first, last)
            at = [t[first] if shared else t[part, None] for t in positions]
            yield part, [(start + t * update).to(dtype) for t in at]
            first = last

    def _scalars(self, params: Tensor, ends: Sequence[Tensor] = ()) -> Tensor:
        """The output's scalars of all inputs in the type of `params`, `[input]`."""
        inputs, unflatten = self._inputs[params.dtype], self._run.table.unflatten
        with modes(self._run.model, False), vectorizable(self._run.model):
            return self._output(self._evaluate(unflatten(params), inputs, [unflatten(end) for end in ends]))

    def _scalar(
        self,
        tensors: dict[str, Tensor],
        inputs: dict[str, Tensor],
        targets: Tensor,
        weights: Tensor,
        ends: Sequence[dict[str, Tensor]],
    ) -> Tensor:
        """One query from its own inputs."""
        assert isinstance(self._output, Output)
        output = self._output.pick(self._evaluate(tensors, inputs, ends))
        return (self._output.function(output, targets) * weights).sum()

    def _evaluate(
        self, tensors: dict[str, Tensor], inputs: dict[str, Tensor], ends: Sequence[dict[str, Tensor]]
    ) -> Any:
        """The model's output, with ReLUs that are differentiated by their average slope between two ends, if given."""
        fixed = self._fixed[next(iter(tensors.values())).dtype]

        def call(params: dict[str, Tensor]) -> Any:
            args, kwargs = rebuild(self._template, inputs)
            return call_function(self._function, self._run.model, {**fixed, **params}, args, kwargs)

        if not ends:
            return call(tensors)
        seen = []
        for end in ends:
            with watched() as arguments:
                call(end)
            seen.append(arguments)
        with averaged(*seen):
            return call(tensors)

    def _per_query(self, function: Callable[..., Any], params: list[Tensor], which: Tensor, dtype: torch.dtype) -> Any:
        """Vectorise a function of one query, like `_scalar`, over queries that only look at their own inputs.

        Args:
            function: see `_scalar`.
            params: θ at the node and, if slopes are to be averaged, at both ends.
            which: the queries.
            dtype: type to compute in.
        """
        members = self._members[which]
        tensors, *ends = (self._run.table.unflatten(p) for p in params)
        along = 0 if params[0].ndim == 2 else None
        with modes(self._run.model, False), vectorizable(self._run.model):
            return vmap(function, in_dims=(along, 0, 0, 0, along))(
                tensors,
                {name: values[members] for name, values in self._inputs[dtype].items()},
                self._targets[members],
                self._member_weights[which].to(dtype),
                ends,
            )


def query_call(run: Run, query: Query) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of the model that a query evaluates, and its arguments' template.

    Raises:
        ValueError: the model was not called with these inputs in the loop, or in several ways.
    """
    given, template = query.call
    if query.forward is not None:
        return query.forward, template
    if isinstance(run.model, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            "the run's model is a container of modules that the loop called one by one, so say how a prediction is "
            'made: Query(…, forward=lambda parts, x: parts["decoder"](parts["encoder"](x))).'
        )
    recorded = {json.dumps(kind.template): kind.template for kind in run.kinds_of("")}.values()
    fitting = [known for known in recorded if set(tensor_names(known)) == set(given)]
    if recorded and not fitting:
        names = " or ".join(", ".join(tensor_names(known)) for known in recorded)
        raise ValueError(
            f"the model was called with the inputs {names}, the query has {', '.join(given)} (numbers are positions). "
            "Give tensors for the same ones (plain arguments are taken from the recording), or forward=."
        )
    if len(fitting) > 1:
        raise ValueError(
            "the model was called with these inputs and different plain arguments, so say which are meant: "
            "Query(…, forward=lambda model, x: model(x, …))."
        )
    return _call_model, fitting[0] if fitting else template


def _call_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _pad(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs that each query has, padded to the same number by inputs of weight zero: `[query, member]` twice."""
    width = max(1, int((weights != 0).sum(dim=1).max()))
    members = (weights != 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return members, weights.gather(1, members)
