"""The queries of one attribution as functions of the flat parameter vector, with their gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from explaind.calls import rebuild
from explaind.errors import ExplaindError
from explaind.outputs import Output
from explaind.path.factors import Summed
from explaind.path.gradients import combined_rows
from explaind.path.integral import Part
from explaind.path.kinks import Kinks, KnownKinks, averaged, watched
from explaind.path.query_averages import QueryAverages, add_parts
from explaind.path.query_calls import query_call
from explaind.path.uses import Order, Uses
from explaind.quadrature import FixedRule
from explaind.query import Query
from explaind.replay.model import call_function, cast, modes, vectorizable
from explaind.run import Run

__all__ = ["QueryFunction"]

_NUM_PROBES = 4


class QueryFunction:
    """q_j(θ) = Σ_i w_{ji} · output(f(x_i; θ))_i, evaluated in eval mode.

    Queries that depend on their own inputs only are differentiated by one backward pass for all of them, and each
    one's gradient is put together from what it brings to the rows (`explaind.path.uses`).

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
        self._every = torch.arange(query.num_inputs, device=device)
        self.separate = isinstance(self._output, Output)
        """Whether every query is evaluated from its own inputs alone, else all inputs as one batch."""
        if isinstance(self._output, Output):
            self._targets = self._output.targets_for(query.num_inputs).to(device)
        trained = run.flat_params(run.num_steps).to(device=device, dtype=torch.float64)
        with torch.no_grad(), watched() as kinked:
            scalars = self._scalars(trained, self._every, checked=True)
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
        self.kinked = bool(kinked)
        """Whether the model computes functions whose slopes jump."""
        self._kinks = KnownKinks()
        self._orders = self._find_orders(trained, scalars) if self.separate else {}

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return len(self._weights)

    def part(self, queries: slice) -> QueryFunction:
        """Some of the queries, with the inputs that they need."""
        part = copy.copy(self)
        rows, part._weights = self._members(torch.arange(self.num_queries, device=self._device)[queries])
        part._inputs = {dtype: {n: t[rows] for n, t in inputs.items()} for dtype, inputs in self._inputs.items()}
        part._every = torch.arange(len(rows), device=self._device)
        if isinstance(self._output, Output):
            part._targets = self._targets[rows]
        part.names, part._kinks = self.names[queries], KnownKinks()
        return part

    def at(self, params: Tensor) -> Tensor:
        """q(θ) of all queries, float64 `[query]`."""
        with torch.no_grad():
            return self._weights @ self._scalars(params, self._every)

    def values(self, start: Tensor, update: Tensor, position: float, which: Tensor) -> Tensor:
        """See `explaind.path.integral.PathFunction.values`."""
        rows, weights = self._members(which)
        with torch.no_grad(), watched() as seen:
            scalars = self._scalars(start + position * update, rows)
        self._kinks.put(start, update, position, rows, cast(seen, self._dtype, self._device))
        return weights @ scalars

    def averages(
        self,
        start: Tensor,
        update: Tensor,
        ends: tuple[float, float],
        which: Tensor,
        rule: FixedRule,
        *,
        kinks: bool,
        exact: bool,
    ) -> QueryAverages:
        """See `explaind.path.integral.PathFunction.averages`."""
        dtype = torch.float64 if exact else self._dtype
        rows, weights = self._members(which)
        result = QueryAverages(self._run.table, len(which))
        left, length = ends[0], ends[1] - ends[0]
        average = kinks and self.kinked
        seen = [self._kinks_at(start, update, end, rows, dtype) for end in ends] if average else []
        points = [(start + end * update).to(dtype) for end in ends] if average else []
        for node, weight in zip(rule.nodes, rule.weights, strict=True):
            params = (start + (left + length * node) * update).to(dtype)
            self._differentiate(result, params, rows, length * weight * weights, seen, points)
        return result

    def gathered(self, parts: Sequence[Part], total: Tensor | None) -> Tensor:
        """See `explaind.path.integral.PathFunction.gathered`."""
        if total is None:
            total = torch.zeros(self.num_queries, self._run.table.num_elements, dtype=self._dtype, device=self._device)
        add_parts(self._run.table, total, parts)
        return total

    def _kinks_at(self, start: Tensor, update: Tensor, position: float, rows: Tensor, dtype: torch.dtype) -> Kinks:
        """Arguments of the kinked functions at a point of a segment."""
        known = self._kinks.get(start, update, position, rows) if dtype == self._dtype else None
        if known is not None:
            return known
        with torch.no_grad(), watched() as seen:
            self._scalars((start + position * update).to(dtype), rows)
        if dtype == self._dtype:
            self._kinks.put(start, update, position, rows, seen)
        return seen

    def _members(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs that some queries need, `[row]`, and their weights in them, `[pair, row]`."""
        weights = self._weights[which]
        if not self.separate:
            return self._every, weights
        rows = (weights != 0).any(dim=0).nonzero()[:, 0]
        return rows, weights[:, rows]

    def _differentiate(
        self,
        result: QueryAverages,
        params: Tensor,
        rows: Tensor,
        weights: Tensor,
        seen: Sequence[Kinks],
        ends: Sequence[Tensor],
    ) -> None:
        """Add Σ_i w_i ∇ of the inputs' scalars at θ to a result."""
        table, weights = self._run.table, weights.to(params.dtype)
        leaves = {name: tensor.requires_grad_() for name, tensor in table.unflatten(params.detach()).items()}
        single = len(weights) == 1
        with torch.enable_grad():
            scalars = self._scalars(leaves, rows, averaged(*seen) if seen else nullcontext())
        if single or not self.separate:
            every = [
                torch.autograd.grad(scalars, list(leaves.values()), w, retain_graph=not single, materialize_grads=True)
                for w in weights
            ]
            each = torch.eye(len(weights), dtype=params.dtype, device=params.device)
            for name, gradients in zip(leaves, zip(*every, strict=True), strict=True):
                result.add(name, Summed(torch.stack(gradients)), each)
            return
        uses = Uses([scalars], leaves)
        uses.backward([torch.ones_like(scalars)])
        rest = []
        for name in table.names:
            order = self._orders.get(name)
            factors = None if order is None else uses.split(name, len(rows), order)
            if factors is None:
                rest.append(name)
            for part in factors or ():
                result.add(name, part, weights)
        if rest:
            alone = self._rows_alone({name: leaves[name] for name in rest}, leaves, rows, ends if seen else ())
            for name in rest:
                result.add(name, Summed(alone[name]), weights)

    def _rows_alone(
        self, wanted: dict[str, Tensor], others: Mapping[str, Tensor], rows: Tensor, ends: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Gradients of single inputs' scalars by some parameters, by vmap, `{name: [row, *shape]}`."""
        fixed = {name: tensor.detach() for name, tensor in others.items() if name not in wanted}
        tensors = [self._run.table.unflatten(end) for end in ends]

        def scalar(params: dict[str, Tensor], inputs: dict[str, Tensor], target: Tensor) -> Tensor:
            assert isinstance(self._output, Output)
            seen = []
            for end in tensors:
                with watched() as arguments:
                    self._evaluate(end, inputs)
                seen.append(arguments)
            with averaged(*seen) if seen else nullcontext():
                output = self._output.pick(self._evaluate({**fixed, **params}, inputs))
            return self._output.function(output, target).sum()

        dtype = next(iter(wanted.values())).dtype
        chosen = {name: tensor[rows].unsqueeze(1) for name, tensor in self._inputs[dtype].items()}
        params = {name: tensor.detach() for name, tensor in wanted.items()}
        with modes(self._run.model, False), vectorizable(self._run.model):
            gradients: dict[str, Tensor] = vmap(grad(scalar), in_dims=(None, 0, 0))(
                params, chosen, self._targets[rows].unsqueeze(1)
            )
        return gradients

    def _find_orders(self, trained: Tensor, scalars: Tensor) -> dict[str, Order]:
        """Where the inputs' rows lie in the operations; settles whether the queries are separate."""
        orders: dict[str, Order | None] = {}
        generator = torch.Generator().manual_seed(0)
        probes = torch.randperm(len(scalars), generator=generator)[:_NUM_PROBES].to(self._device)
        leaves = {name: t.requires_grad_() for name, t in self._run.table.unflatten(trained.detach()).items()}
        try:
            with torch.enable_grad():
                together = self._scalars(leaves, self._every)
            weights, combined = combined_rows({"": together}, leaves, {}, (0, 0))
            uses = Uses([together], leaves)
            uses.expect(weights, combined)
            uses.backward([torch.ones_like(together)])
            for row in probes:
                with torch.no_grad():
                    alone = self._scalars(leaves, row[None])
                self.separate &= torch.allclose(alone, scalars[row], rtol=1e-9, atol=1e-9 * float(scalars.abs().max()))
            orders = {name: uses.order(name) for name in leaves}
            rest = {name: leaves[name] for name, order in orders.items() if order is None}
            if rest and self.separate:
                self._rows_alone(rest, leaves, probes[:1], ())
        except ExplaindError:
            raise
        except (RuntimeError, ValueError):  # how vmap and batch layers say that a row cannot be evaluated alone
            self.separate = False
        return {name: order for name, order in orders.items() if order is not None}

    def _scalars(
        self,
        params: Tensor | Mapping[str, Tensor],
        rows: Tensor,
        slopes: AbstractContextManager[None] | None = None,
        *,
        checked: bool = False,
    ) -> Tensor:
        """The output's scalars of some inputs in the type of the parameters, `[row]`."""
        tensors = self._run.table.unflatten(params) if isinstance(params, Tensor) else params
        inputs = self._inputs[next(iter(tensors.values())).dtype]
        if len(rows) < len(self._every):
            inputs = {name: tensor[rows] for name, tensor in inputs.items()}
        with modes(self._run.model, False), vectorizable(self._run.model), slopes or nullcontext():
            output = self._evaluate(tensors, inputs)
            if checked or not isinstance(self._output, Output):
                return self._output(output)
            return self._output.function(self._output.pick(output), self._targets[rows])

    def _evaluate(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
        """The model's output."""
        fixed = self._fixed[next(iter(tensors.values())).dtype]
        args, kwargs = rebuild(self._template, inputs)
        return call_function(self._function, self._run.model, {**fixed, **tensors}, args, kwargs)
