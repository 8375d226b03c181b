"""The queries of one attribution as functions of the flat parameter vector, with their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from explaind.path.budget import Budget
from explaind.path.factors import Summed
from explaind.path.footprint import made_bytes
from explaind.path.inputs import QueryInputs
from explaind.path.intervals import Part
from explaind.path.kinks import KNOWN_POINTS, Kinks, KnownKinks, averaged, watched
from explaind.path.query_averages import QueryAverages, add_parts
from explaind.path.separation import input_bytes, row_orders
from explaind.path.uses import Uses
from explaind.quadrature import FixedRule
from explaind.query import Query
from explaind.run import Run

__all__ = ["QueryFunction"]

_GRAPHS = 2
"""How often the activations of a forward pass are kept: as they are, and the gradients that came back to them."""
_NUM_PROBES = 4
_HOST_BYTES = 64 << 20
"""Of inputs that are evaluated at once on the host, where larger blocks leave the caches and take longer."""


class QueryFunction:
    """q_j(θ) = Σ_i w_{ji} · output(f(x_i; θ))_i, evaluated in eval mode.

    Inputs that do not depend on each other are evaluated in blocks that fit in memory. Queries whose inputs fit in one
    are differentiated by one backward pass for all of them, and each one's gradient is put together from what it
    brings to the rows (`explaind.path.uses`); that of a query of more inputs is the sum over their blocks.

    Args:
        run: gives the model and the layout of θ.
        query: inputs x, output and weights w.
        fixed: buffers and frozen parameters by name.
        combined: sum all queries into one.
        dtype: type of the gradients; values are always float64.
        device: where to compute.
        memory: what the blocks are to fit in.

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
        memory: Budget,
    ) -> None:
        self._run, self._dtype, self._device, self._memory = run, dtype, device, memory
        self._inputs = QueryInputs(run, query, fixed=fixed, dtypes={dtype, torch.float64}, device=device)
        self._every = torch.arange(query.num_inputs, device=device)
        trained = run.flat_params(run.num_steps).to(device=device, dtype=torch.float64)
        self._input_bytes = input_bytes(self._inputs, trained) if self._inputs.by_row else None
        self._block = query.num_inputs
        if self._input_bytes is not None:
            fitting = memory.for_inputs if device.type != "cpu" else min(memory.for_inputs, _HOST_BYTES)
            self._block = max(1, fitting // (_GRAPHS * self._input_bytes))
        blocks, by_block, self._kink_bytes = self._every.split(self._block), list[Tensor](), 0
        for rows in blocks:
            kinks = dict[str, Tensor]()
            with torch.no_grad():
                by_block.append(self._inputs.scalars(trained, rows, watched(kinks)))
            self._kink_bytes += sum(argument.nbytes for argument in kinks.values())
        scalars = torch.cat(by_block)
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
        self.kinked = self._kink_bytes > 0
        """Whether the model computes functions whose slopes jump."""
        orders = None if self._input_bytes is None else row_orders(self._inputs, trained, scalars, blocks)
        self.separate = orders is not None
        """Whether every query is evaluated from its own inputs alone, else all inputs as one batch."""
        self._orders = orders or {}
        if not self.separate:
            self._block = query.num_inputs
        by_row = self.separate and self._are_by_row(trained, blocks[-1], kinks)
        self._kinks = KnownKinks(by_row=by_row, dtype=dtype, most_bytes=self.remembered_bytes)

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return len(self._weights)

    @property
    def is_blocked(self) -> bool:
        """Whether a query has more inputs than are evaluated at once."""
        return self._most_inputs > self._block

    @property
    def working_bytes(self) -> int:
        """What differentiating a query fills: the activations of its inputs, as many as are evaluated at once."""
        if self.separate and self._input_bytes is not None:
            made = self._input_bytes * min(self._most_inputs, self._block)
        else:
            trained = self._run.flat_params(self._run.num_steps).to(self._device, torch.float64)
            made = made_bytes(partial(self.at, trained))
        return _GRAPHS * made * self._dtype.itemsize // torch.float64.itemsize

    @property
    def remembered_bytes(self) -> int:
        """Most that is remembered of the arguments of kinked functions: all that may be needed again, or nothing."""
        points = KNOWN_POINTS * self._kink_bytes * self._dtype.itemsize // torch.float64.itemsize
        return points if points <= self._memory.for_inputs else 0

    def part(self, queries: slice) -> QueryFunction:
        """Some of the queries, with the inputs that they need."""
        part = copy.copy(self)
        rows, part._weights = self._members(torch.arange(self.num_queries, device=self._device)[queries])
        part._inputs = self._inputs.take(rows)
        part._every = torch.arange(len(rows), device=self._device)
        part._kink_bytes = self._kink_bytes * len(rows) // len(self._every)
        part.names, part._kinks = self.names[queries], self._kinks.anew(part.remembered_bytes)
        return part

    def ready(self) -> AbstractContextManager[None]:
        """See `explaind.path.inputs.QueryInputs.ready`."""
        return self._inputs.ready()

    def at(self, params: Tensor) -> Tensor:
        """q(θ) of all queries, float64 `[query]`."""
        with torch.no_grad():
            scalars = [self._inputs.scalars(params, rows) for rows in self._every.split(self._block)]
        return self._weights @ torch.cat(scalars)

    def values(self, start: Tensor, update: Tensor, position: float, which: Tensor) -> Tensor:
        """See `explaind.path.integral.PathFunction.values`."""
        members, weights = self._members(which)
        params, scalars = start + position * update, list[Tensor]()
        for rows in members.split(self._block):
            seen = dict[str, Tensor]()
            with torch.no_grad():
                watch = watched(seen) if self.remembered_bytes else None
                scalars.append(self._inputs.scalars(params, rows, watch))
            if seen:
                self._kinks.put(start, update, position, rows, seen)
        return weights @ torch.cat(scalars)

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
        left, length = ends[0], ends[1] - ends[0]
        average = kinks and self.kinked
        result = QueryAverages(self._run.table, len(which))
        for queries, blocks in self._together(which):
            sums = dict[str, Tensor]()
            for rows in blocks:
                seen = [self._kinks_at(start, update, end, rows, dtype) for end in ends] if average else []
                own = self._weights[which[queries]]
                own = own[:, rows] if self.separate else own  # whose scalars may be fewer or more than inputs
                weights = torch.zeros(len(which), own.shape[1], dtype=dtype, device=self._device)
                weights[queries] = (length * own).to(dtype)
                for node, weight in zip(rule.nodes, rule.weights, strict=True):
                    params = (start + (left + length * node) * update).to(dtype)
                    if self.separate and len(queries) > 1:
                        points = ((start + end * update).to(dtype) for end in ends if average)  # only if looked at
                        self._add_rows(result, params, rows, weight * weights, seen, points)
                    else:
                        self._add_sums(sums, params, rows, weight * weights[queries], seen)
            each = torch.eye(len(which), dtype=dtype, device=self._device)[:, queries]
            for name, total in sums.items():
                result.add(name, Summed(total), each)
        return result

    def gathered(self, parts: Sequence[Part], total: Tensor | None) -> Tensor:
        """See `explaind.path.integral.PathFunction.gathered`."""
        if total is None:
            total = torch.zeros(self.num_queries, self._run.table.num_elements, dtype=self._dtype, device=self._device)
        add_parts(self._run.table, total, parts)
        return total

    @property
    def _most_inputs(self) -> int:
        """Of a query."""
        return int((self._weights != 0).sum(dim=1).max()) if self.separate else len(self._every)

    def _kinks_at(self, start: Tensor, update: Tensor, position: float, rows: Tensor, dtype: torch.dtype) -> Kinks:
        """Arguments of the kinked functions at a point of a segment."""
        known = self._kinks.get(start, update, position, rows) if dtype == self._dtype else None
        if known is not None:
            return known
        seen = dict[str, Tensor]()
        with torch.no_grad():
            self._inputs.scalars((start + position * update).to(dtype), rows, watched(seen))
        if dtype == self._dtype and self.remembered_bytes:
            self._kinks.put(start, update, position, rows, seen)
        return seen

    def _are_by_row(self, params: Tensor, rows: Tensor, kinks: Kinks) -> bool:
        """Whether the arguments of kinked functions, as some inputs gave them together, have one after the other."""
        places = torch.arange(0, len(rows), max(1, len(rows) // _NUM_PROBES), device=rows.device)
        alone = dict[str, Tensor]()
        with torch.no_grad():
            self._inputs.scalars(params, rows[places], watched(alone))
        pairs = [(argument, kinks.get(name)) for name, argument in alone.items()]
        return len(alone) == len(kinks) and all(
            every is not None
            and argument.ndim > 0
            and (len(argument), len(every)) == (len(places), len(rows))
            and argument.shape[1:] == every.shape[1:]
            and torch.allclose(argument, every[places])
            for argument, every in pairs
        )

    def _members(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs that some queries need, `[row]`, and their weights in them, `[query, row]`."""
        weights = self._weights[which]
        if not self.separate:
            return self._every, weights
        rows = (weights != 0).any(dim=0).nonzero()[:, 0]
        return rows, weights[:, rows]

    def _together(self, which: Tensor) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """Queries that are differentiated together, as places in `which`, and the inputs that they need, in blocks.

        Of queries whose inputs do not depend on each other, only a single one has several blocks.
        """
        every = torch.arange(len(which), device=self._device)
        used = self._weights[which] != 0
        most = int(used.sum(dim=1).max()) if self.separate else 0
        for queries in every.split(max(1, self._block // most) if most else len(every)):
            rows = used[queries].any(dim=0).nonzero()[:, 0] if self.separate else self._every
            yield queries, rows.split(self._block)

    def _add_sums(
        self, sums: dict[str, Tensor], params: Tensor, rows: Tensor, weights: Tensor, seen: Sequence[Kinks]
    ) -> None:
        """Add Σ_i w_{qi} ∇ of the inputs' scalars at θ, for weights `[query, row]`, to `{name: [query, *shape]}`."""
        leaves, scalars = self._differentiable(params, rows, seen)
        tensors, several = list(leaves.values()), len(weights) > 1
        every = [
            torch.autograd.grad(scalars, tensors, w, retain_graph=several, materialize_grads=True) for w in weights
        ]
        for name, gradients in zip(leaves, zip(*every, strict=True), strict=True):
            total = torch.stack(gradients)
            sums[name] = sums[name].add_(total) if name in sums else total

    def _add_rows(
        self,
        result: QueryAverages,
        params: Tensor,
        rows: Tensor,
        weights: Tensor,
        seen: Sequence[Kinks],
        ends: Iterable[Tensor],
    ) -> None:
        """Add the inputs' gradients at θ to a result, with their weights `[query, row]`."""
        leaves, scalars = self._differentiable(params, rows, seen)
        uses = Uses([scalars], leaves)
        uses.backward([torch.ones_like(scalars)])
        rest = []
        for name in self._run.table.names:
            order = self._orders.get(name)
            factors = None if order is None else uses.split(name, len(rows), order)
            if factors is None:
                rest.append(name)
            for part in factors or ():
                result.add(name, part, weights)
        if rest:
            alone = self._inputs.gradients({name: leaves[name] for name in rest}, leaves, rows, ends)
            for name in rest:
                result.add(name, Summed(alone[name]), weights)

    def _differentiable(self, params: Tensor, rows: Tensor, seen: Sequence[Kinks]) -> tuple[dict[str, Tensor], Tensor]:
        """Parameters as leaves of a graph, and the scalars of some inputs that it leads to."""
        leaves = self._inputs.leaves(params)
        with torch.enable_grad():
            return leaves, self._inputs.scalars(leaves, rows, averaged(*seen) if seen else nullcontext())
