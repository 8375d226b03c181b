"""A few steps of an attribution, made to see what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from explaind.path.averaged import Adjoint
from explaind.path.elements import split_by_element
from explaind.path.factored import FactorProducts
from explaind.path.factors import strategy
from explaind.path.forward import ForwardSweep
from explaind.path.integral import StepIntegral, integrate
from explaind.path.products import ExampleGradients, ExampleProducts
from explaind.path.queries import QueryFunction
from explaind.path.reverse import ReverseSweep
from explaind.path.slices import layer_of
from explaind.path.step import Step
from explaind.path.sweep import step_tolerances
from explaind.planning.metering import Meter
from explaind.request import Request

__all__ = ["INTEGRAL", "PREPARATION", "REPLAYS", "SKIPPED", "TERMS", "VALUES", "Trial"]

PREPARATION, VALUES, INTEGRAL = "preparation", "values of queries", "path integral"
REPLAYS, TERMS, SKIPPED = "replays of batches", "terms of the steps", "steps that are left out"


class Trial:
    """Single steps of a sweep, each as if the run ended with it.

    Args:
        request: the attribution.
        function: queries that share a sweep.
        products: how products with the examples' gradients are made.
        meter: for all parts of the work.
    """

    def __init__(
        self,
        request: Request,
        function: QueryFunction,
        products: ExampleProducts | None,
        *,
        meter: Meter,
    ) -> None:
        self._request, self._run, self._function, self._products = request, request.run, function, products
        self._path, self._meter = request.new_path(), meter
        self._phi: Tensor | None = None
        """Memory of the gradients, as in a sweep."""
        self._known, self._trusts = all(self._run.rules), False
        self._known_steps = dict(self._run.examples_alone)
        self._skips = self._known and len(request.wanted) < self._run.num_steps

    def integrals(self, sampled: Sequence[int]) -> list[StepIntegral]:
        """Make steps, and meter them; without the gradients."""
        changes = [self._change(index) for index in sampled]
        moved = torch.stack([(after - before).abs() for before, after in changes], dim=1)
        # The tolerances of a run of these steps only are those of the whole run.
        size = torch.stack([after.abs() for _, after in changes], dim=1).amax(dim=1, keepdim=True)
        tolerances = step_tolerances(moved, size, self._request.tolerance)
        integrals = []
        for index, change, tolerance in zip(sampled, changes, tolerances.T, strict=True):
            with self._meter.timed(INTEGRAL):
                integral = self._integrate(index, change, tolerance)
            with self._meter.timed(REPLAYS):
                self._replay(index)
            with self._meter.timed(TERMS):
                adjoint = self._adjoint(index, integral)
                self._terms(index, adjoint)
            integrals.append(replace(integral, gradient=integral.gradient.new_empty(0)))
        if self._skips:
            with self._meter.timed(SKIPPED):
                self._skip(index, adjoint)
        self._count(index, change, tolerance)
        nodes = torch.stack([each.num_nodes.sum() for each in integrals]).to(torch.float64)
        self._meter.operations[INTEGRAL] *= float(nodes.mean() / nodes[-1].clamp_min(1))
        return integrals

    def strategies(self, index: int) -> dict[str, str]:
        """How a step's products are made, by layer."""
        request, products = self._request, self._products
        if not isinstance(products, FactorProducts):
            return dict.fromkeys(request.layers, products.name if products else "none: the batch's gradient is enough")
        ways: dict[str, set[str]] = {name: set() for name in request.layers}
        for uses in self._step(index).uses:
            for parameter in self._run.table:
                layer = layer_of(parameter, request.slices)
                if layer is not None:
                    factors = uses.factors(parameter.name)
                    found = ["vmap"] if factors is None else [strategy(f, self._function.num_queries) for f in factors]
                    ways[request.layers[layer]].update(found)
        return {layer: " and ".join(sorted(own)) or "none: no gradient" for layer, own in ways.items()}

    def _count(self, index: int, change: tuple[Tensor, Tensor], tolerance: Tensor) -> None:
        """Repeat a step to count its operations."""
        with self._meter.counted(VALUES):
            self._function.at(self._path.segment(self._step(index))[0])
        with self._meter.counted(INTEGRAL):
            integral = self._integrate(index, change, tolerance)
        with self._meter.counted(REPLAYS):
            self._replay(index)
        with self._meter.counted(TERMS):
            adjoint = self._adjoint(index, integral)
            self._terms(index, adjoint)
        if self._skips:
            with self._meter.counted(SKIPPED):
                self._skip(index, adjoint)

    def _step(self, index: int) -> Step:
        rows_dtype = self._request.dtype if isinstance(self._products, FactorProducts) else None
        return Step(self._run, index, self._request.device, rows_dtype=rows_dtype, without_rows=self._products is None)

    def _change(self, index: int) -> tuple[Tensor, Tensor]:
        start, move = self._path.segment(self._step(index))
        with self._meter.timed(VALUES):
            before = self._function.at(start)
        return before, self._function.at(start + move)

    def _integrate(self, index: int, change: tuple[Tensor, Tensor], tolerance: Tensor) -> StepIntegral:
        start, move = self._path.segment(self._step(index))
        rule = self._request.rule
        with self._function.ready():
            integral = integrate(
                self._function, start, move, change=change, tolerance=tolerance, quadrature=rule, out=self._phi
            )
        self._phi = integral.gradient
        return integral

    def _adjoint(self, index: int, integral: StepIntegral) -> Adjoint:
        """As a sweep makes it, with all that is checked of it."""
        step, adjoint = self._step(index), Adjoint(integral.gradient, integral.products)
        if self._path.averaged or not self._known or self._request.steps_axis == "update_step":
            adjoint.rounding(step, self._path.segment(step)[1])
        vectors = self._path.adjoint(index, adjoint.vectors)
        return adjoint if vectors is adjoint.vectors else Adjoint.of(vectors, step)

    def _replay(self, index: int) -> bool:
        """Find out what is in a step's gradient, if nothing is asked of its rows."""
        return self._known and self._step(index).stands_for_examples

    def _terms(self, index: int, adjoint: Adjoint) -> object:
        step = self._step(index)
        if self._trusts:
            step.trust()
        if self._known:
            sweep = self._sweep(index)
            terms = sweep.terms(step, adjoint)
            if self._request.elements is not None and isinstance(sweep, ReverseSweep):
                terms = split_by_element(terms, step, adjoint.vectors, sweep.psi, self._request.elements)
            by_factors = isinstance(self._products, FactorProducts) and self._request.steps_axis != "update_step"
            self._trusts = by_factors and not self._request.sources.restricted and step.is_the_examples
            self._run.examples_alone = dict(self._known_steps)  # each of them is replayed as if for the first time
            return terms
        return adjoint

    def _skip(self, index: int, adjoint: Adjoint) -> object:
        sweep, step = self._sweep(index), self._step(index)
        return sweep.advance(step) if isinstance(sweep, ForwardSweep) else sweep.skip(step, adjoint)

    def _sweep(self, index: int) -> ForwardSweep | ReverseSweep:
        request = self._request
        if request.steps_axis == "update_step":
            gradients = cast("ExampleGradients | None", self._products)
            return ForwardSweep(
                self._run, products=gradients, sources=request.sources, slices=request.slices, device=request.device
            )
        return ReverseSweep(
            self._run,
            products=self._products,
            sources=request.sources,
            num_tokens=request.num_tokens or 1,
            slices=request.slices,
            first=index,
        )
