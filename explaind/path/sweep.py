"""The sweep over the steps of a run: what each of them added to the queries, and the certificate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from explaind.path.averaged import Adjoint, ExplainedPath
from explaind.path.elements import split_by_element, undivided_by_element
from explaind.path.factored import FactorProducts
from explaind.path.forward import ForwardSweep
from explaind.path.gradients import batch_gradient
from explaind.path.integral import StepIntegral, integrate
from explaind.path.products import ExampleGradients, ExampleProducts
from explaind.path.queries import QueryFunction
from explaind.path.reading import read_ahead
from explaind.path.reverse import ReverseSweep
from explaind.path.slices import layer_of, product
from explaind.path.sources import Sources
from explaind.path.step import Step, StepTerms
from explaind.quadrature import Quadrature
from explaind.run import Run

__all__ = ["Sweep", "step_tolerances"]

_Entry = TypeVar("_Entry")


def step_tolerances(changes: Tensor, size: Tensor, tolerance: float) -> Tensor:
    """Largest quadrature error of each step, `[query, step]`.

    A step may have as large a part of the error as of the path, one of little change as much as an average one.

    Args:
        changes: |q(θ_{s+1}) − q(θ_s)|, `[query, step]`.
        size: largest |q|, which is not known better than its rounding, `[query, 1]`.
        tolerance: part of the path's length.
    """
    parts = torch.maximum(changes, changes.mean(dim=1, keepdim=True))
    parts *= (changes.sum(dim=1) / parts.sum(dim=1).clamp_min(torch.finfo(parts.dtype).tiny))[:, None]
    return torch.maximum(tolerance * parts, 64 * torch.finfo(size.dtype).eps * size)


class Sweep:
    """Integrates every step that is needed once, and hands its average gradient to the filter's sweep."""

    def __init__(
        self,
        run: Run,
        function: QueryFunction,
        *,
        path: ExplainedPath,
        products: ExampleProducts | None,
        sources: Sources,
        num_tokens: int | None,
        slices: list[list[slice]],
        elements: Tensor | None,
        wanted: list[int],
        rule: Quadrature,
        tolerance: float,
        progress: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._run, self._function, self._path, self._sources, self._slices = run, function, path, sources, slices
        self._elements = elements
        self._wanted, self._rule, self._num_tokens = set(wanted), rule, num_tokens
        self._progress, self._dtype, self._device = progress, dtype, device
        self._products = products
        points = self._bar(path.points(), "query values", run.num_steps + 1)
        self.values = torch.stack([function.at(point) for point in points], dim=1)
        """q along the path, float64 `[query, snapshot]`."""
        if not bool(self.values.isfinite().all()):
            query, snapshot = (~self.values.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"query {function.names[query]!r} is {float(self.values[query, snapshot])} with the weights of "
                f"snapshot {snapshot}; only changes between finite numbers can be explained."
            )
        changes = self.values.diff(dim=1).abs()
        self.path_length = changes.sum(dim=1)
        """Summed absolute changes of q along the path, `[query]`."""
        self._tolerance = step_tolerances(changes, self.values.abs().amax(dim=1, keepdim=True), tolerance)
        layers = [layer_of(parameter, slices) for parameter in run.table]
        self._columns = [len(slices) if layer is None else layer for layer in layers]
        self._rounded: dict[int, Tensor] = {}
        """What average gradients of wanted steps lost when they were put together, where the filter's sweep does not
        find that out, `[query, layer]`."""
        self.omitted = torch.zeros(function.num_queries, dtype=torch.float64, device=device)
        """What restrictions left out, `[query]`."""
        self._phi: Tensor | None = None
        """Memory of the gradients of a step, which are no longer needed when the next one's are found."""
        self.integrals: dict[int, StepIntegral] = {}
        """Residual and nodes of the integrated steps (their gradients are dropped after use)."""

    def by_step(self) -> Iterator[tuple[int, StepTerms]]:
        """Terms of the wanted steps, credited when the gradient was taken; last to first."""
        if not all(self._run.rules):
            yield from self._undivided()
            return
        first, is_the_examples = min(self._wanted), False
        sweep = ReverseSweep(
            self._run,
            products=self._products,
            sources=self._sources,
            num_tokens=self._num_tokens or 1,
            slices=self._slices,
            first=first,
        )
        for step, adjoint in self._backward(range(first, self._run.num_steps)):
            index = step.index
            if index not in self._wanted:
                self.omitted += sweep.skip(step, adjoint)
                continue
            # Only if all of its rows are multiplied can it be seen that they do not add up.
            if is_the_examples and isinstance(self._products, FactorProducts) and not self._sources.restricted:
                step.trust()
            terms = sweep.terms(step, adjoint)
            self.omitted += terms.omitted
            if self._elements is not None:
                terms = split_by_element(terms, step, adjoint.vectors, sweep.psi, self._elements)
            # What holds for one step's gradient is tried with the next one's, which then is cheaper.
            is_the_examples = self._products is not None and step.is_the_examples
            del step, adjoint  # they are large, and the next ones are made before they are replaced here
            yield index, self._with_rounding(index, terms)

    def by_update_step(self) -> Iterator[tuple[int, StepTerms]]:
        """Terms of the wanted steps, credited when the optimizer applied them; first to last."""
        if not all(self._run.rules):
            yield from self._undivided()
            return
        gradients = cast("ExampleGradients | None", self._products)
        sweep = ForwardSweep(
            self._run, products=gradients, sources=self._sources, slices=self._slices, device=self._device
        )
        # The adjoints of averages are known from the last to the first.
        held = {step.index: adjoint for step, adjoint in self._wanted_backward()} if self._path.averaged else {}
        for step in read_ahead(
            self._bar(range(self._run.num_steps), "steps"), self._step, alone=self._run.replays_gradients
        ):
            index = step.index
            if index in self._wanted:
                adjoint = held.pop(index) if self._path.averaged else self._as_rounded(step, self._adjoint(step))
                terms = sweep.terms(step, adjoint)
                self.omitted += terms.omitted
                yield index, self._with_rounding(index, terms)
            else:
                sweep.advance(step)
                if not self._path.averaged:
                    self.omitted += self.values[:, index + 1] - self.values[:, index]

    def _undivided(self) -> Iterator[tuple[int, StepTerms]]:
        """⟨λ_s, Δ_s⟩ for optimizers without a rule: exact by step and layer, with nothing told apart in it."""
        batch_gradient(self._run, self._run.num_steps - 1)  # nothing else here would notice another forward pass
        for step, adjoint in self._wanted_backward():
            change, rest = self._by_layer(adjoint.products)
            nothing = torch.zeros_like(change)
            self.omitted += rest
            terms = StepTerms(
                contribution=change[:, None, None],
                decay=nothing,
                other=nothing,
                rounding=nothing,
                omitted=nothing.sum(dim=1),
            )
            if self._elements is not None:
                terms = undivided_by_element(terms, step, adjoint.vectors, self._elements)
            yield step.index, self._with_rounding(step.index, terms)

    def _wanted_backward(self) -> Iterator[tuple[Step, Adjoint]]:
        """The wanted steps from the last to the first, with λ_s; what the others add is omitted."""
        needed = range(min(self._wanted), self._run.num_steps) if self._path.averaged else self._wanted
        for step, adjoint in self._backward(needed):
            if step.index in self._wanted:
                yield step, adjoint if self._path.averaged else self._as_rounded(step, adjoint)
            else:
                self.omitted += adjoint.products.sum(dim=1)

    def _backward(self, needed: Collection[int]) -> Iterator[tuple[Step, Adjoint]]:
        """The needed steps from the last to the first, with λ_s."""
        first, last = min(needed), self._run.num_steps - 1
        for index in set(range(last + 1)).difference(needed):
            # The path integral over a whole segment is just the difference of two predictions.
            self.omitted += self.values[:, index + 1] - self.values[:, index]
        for step in read_ahead(
            self._bar(sorted(needed, reverse=True), "steps"), self._step, alone=self._run.replays_gradients
        ):
            adjoint = self._adjoint(step)
            if step.index == first:
                self.omitted += product(adjoint.vectors, self._path.lead(step))
            yield step, adjoint
            del step, adjoint

    def _step(self, index: int) -> Step:
        rows_dtype = self._dtype if isinstance(self._products, FactorProducts) else None
        return Step(self._run, index, self._device, rows_dtype=rows_dtype, without_rows=self._products is None)

    def _adjoint(self, step: Step) -> Adjoint:
        """λ_s; of weights that are not averaged, φ_s."""
        integral, move = self._integrate(step)
        adjoint = Adjoint(integral.gradient, integral.products)
        vectors = self._path.adjoint(step.index, adjoint.vectors)
        if vectors is adjoint.vectors:
            return adjoint
        self._account_for_rounding(step.index, adjoint.rounding(step, move))
        return Adjoint.of(vectors, step)

    def _as_rounded(self, step: Step, adjoint: Adjoint) -> Adjoint:
        """φ_s with the products that it still has after it was rounded; the rest is accounted for."""
        lost = adjoint.rounding(step, step.update)
        self._account_for_rounding(step.index, lost)
        return Adjoint(adjoint.vectors, adjoint.products - lost)

    def _integrate(self, step: Step) -> tuple[StepIntegral, Tensor]:
        """The integral over a step's segment, and the segment, `[element]`."""
        s = step.index
        start, move = self._path.segment(step)
        if self._path.moves(s):
            with self._function.ready():
                integral = integrate(
                    self._function,
                    start,
                    move,
                    change=(self.values[:, s], self.values[:, s + 1]),
                    tolerance=self._tolerance[:, s],
                    quadrature=self._rule,
                    out=self._phi,
                )
            self._phi = integral.gradient
        else:
            nothing = start.new_zeros(len(self.path_length))
            phi, products = (nothing.new_zeros(len(nothing), size) for size in (len(start), len(self._run.table)))
            integral = StepIntegral(phi, products, nothing, nothing.to(torch.int64))
        self.integrals[s] = replace(integral, gradient=start.new_empty(0))
        return integral, move

    def _account_for_rounding(self, step: int, lost: Tensor) -> None:
        """What average gradients lost of their products with a step's segment, `[query, parameter]`, is rounding."""
        if step in self._wanted:
            self._rounded[step], rest = self._by_layer(lost)
            self.omitted += rest
        else:
            self.omitted += lost.sum(dim=1)

    def _by_layer(self, by_parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the parameters of each layer, `[query, layer]`, and over those of none, `[query]`."""
        total = by_parameter.new_zeros(len(by_parameter), len(self._slices) + 1)
        for place, column in enumerate(self._columns):
            total[:, column] += by_parameter[:, place]
        return total[:, :-1], total[:, -1]

    def _with_rounding(self, step: int, terms: StepTerms) -> StepTerms:
        return replace(terms, rounding=terms.rounding + self._rounded.pop(step, 0.0))

    def _bar(self, steps: Iterable[_Entry], what: str, total: int | None = None) -> Iterable[_Entry]:
        hidden = None if self._progress else True
        return tqdm(steps, desc=what, total=total, unit="step", disable=hidden, leave=False)
