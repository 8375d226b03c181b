"""Exact decomposition of predictions: asks for the axes, runs the sweep over the steps, labels the sums."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from explaind.attribution import TERMS, Attribution
from explaind.averages import Average
from explaind.axes import check_axes, check_size, select_layers, select_steps
from explaind.path.averaged import ExplainedPath, explained_path
from explaind.path.forward import ForwardSweep
from explaind.path.gradients import batch_gradient
from explaind.path.products import (
    ExampleProducts,
    GradientProducts,
    TangentProducts,
    choose_gradients,
    choose_products,
    count_tokens,
)
from explaind.path.queries import QueryFunction
from explaind.path.reverse import ReverseSweep
from explaind.path.slices import dot
from explaind.path.sources import Sources, select_sources
from explaind.path.step import Step, StepTerms
from explaind.quadrature import Adaptive, FixedRule, Quadrature, StepIntegral, adaptive, integrate
from explaind.query import Query
from explaind.run import Run

__all__ = ["attribute"]

_Entry = TypeVar("_Entry")


def attribute(
    run: Run,
    query: Query,
    *,
    by: Sequence[str],
    steps: range | Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    groups: Mapping[int, Any] | Sequence[Any] | None = None,
    average: Average | None = None,
    tolerance: float = 1e-6,
    quadrature: Quadrature | str = "adaptive",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Attribution:
    """Decompose predictions; see `explaind.Run.attribute`, which says what everything means."""
    axes = check_axes(by)
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"tolerance is a part of the path length, zero or more; got {tolerance!r}.")
    examples_axis = next((axis for axis in axes if axis in ("example", "group")), None)
    steps_axis = next((axis for axis in axes if axis in ("step", "update_step")), None)
    layers_axis = next((axis for axis in axes if axis in ("layer", "parameter")), None)
    if examples_axis or examples is not None:
        run.require_rules()
    if groups is not None and examples_axis != "group":
        raise ValueError("groups= is given, so name their axis: by=('query', 'group', …).")
    if average is not None and not isinstance(average, Average):
        raise TypeError(f"average must be one of explaind.averages, such as averages.ema(0.9); got {average!r}.")
    rule = adaptive() if quadrature == "adaptive" else quadrature
    if not isinstance(rule, (FixedRule, Adaptive)):
        raise ValueError(f"quadrature must be 'adaptive' or a rule of explaind.quadrature, got {rule!r}.")
    place = torch.device(device) if device is not None else torch.device("cpu")

    sources = select_sources(run.examples, axis=examples_axis, examples=examples, groups=groups)
    wanted = select_steps(run, steps)
    names, slices = select_layers(run, axis=layers_axis, layers=layers)
    path = explained_path(run, average, place)
    function = QueryFunction(run, query, fixed=path.fixed, combined="query" not in axes, dtype=dtype, device=place)
    coordinates: dict[str, Any] = {"query": list(function.names)}
    coordinates |= {examples_axis: sources.labels} if examples_axis else {}
    coordinates |= {steps_axis: wanted} if steps_axis else {}
    num_tokens = count_tokens(run) if "token" in axes else None
    coordinates |= {"token": list(range(num_tokens))} if num_tokens else {}
    coordinates |= {layers_axis: names} if layers_axis else {}
    vectors = len(sources) + (function.num_queries * len(wanted) if path.averaged else 0)
    buffers = vectors * run.table.num_elements if steps_axis == "update_step" else 0
    check_size({axis: len(labels) for axis, labels in coordinates.items()}, buffers=buffers)

    sweep = _Sweep(
        run,
        function,
        path=path,
        sources=sources,
        num_tokens=num_tokens,
        slices=slices,
        wanted=wanted,
        rule=rule,
        tolerance=tolerance,
        by_update_step=steps_axis == "update_step",
        progress=progress,
        dtype=dtype,
        device=place,
    )
    ledger = _Ledger(coordinates)
    for step, terms in sweep.by_update_step() if steps_axis == "update_step" else sweep.by_step():
        ledger.enter(step, terms)
    dataset = ledger.dataset(sweep)
    if "query" not in axes:
        dataset = dataset.squeeze("query", drop=True)
    dataset.attrs = {
        "run": str(run.path),
        "output": getattr(query.output, "name", getattr(query.output, "__name__", "query")),
        "num_steps": run.num_steps,
        "weights": path.name,
        "optimizer": run.optimizer,
        "update_rule": "known" if all(run.rules) else "not known: contribution is the whole update, decay included",
        "quadrature": rule.name,
        "tolerance": tolerance,
        "dtype": str(dtype).removeprefix("torch."),
        "query_evaluation": "each query alone" if function.separate else "all inputs as one batch",
        "example_products": sweep.products.name if sweep.products else "none",
    }
    return Attribution(dataset)


class _Sweep:
    """Integrates every step that is needed once, and hands its average gradient to the filter's sweep."""

    def __init__(
        self,
        run: Run,
        function: QueryFunction,
        *,
        path: ExplainedPath,
        sources: Sources,
        num_tokens: int | None,
        slices: list[list[slice]],
        wanted: list[int],
        rule: Quadrature,
        tolerance: float,
        by_update_step: bool,
        progress: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._run, self._function, self._path, self._sources, self._slices = run, function, path, sources, slices
        self._wanted, self._rule, self._num_tokens = set(wanted), rule, num_tokens
        self._progress, self._device = progress, device
        self.products: ExampleProducts | None = None
        if num_tokens is not None:
            self.products = TangentProducts(run, num_tokens=num_tokens, dtype=dtype, device=device)
        elif sources.needs_rows and by_update_step:
            self.products = choose_gradients(run, dtype=dtype, device=device)
        elif sources.needs_rows:
            self.products = choose_products(run, dtype=dtype, device=device)
        points = self._bar(path.points(), "query values", run.num_steps + 1)
        self.values = torch.stack([function.at(point) for point in points], dim=1)
        """q along the path, float64 `[query, snapshot]`."""
        changes = self.values.diff(dim=1).abs()
        self.path_length = changes.sum(dim=1)
        """Summed absolute changes of q along the path, `[query]`."""
        share = 0.5 * torch.maximum(changes, self.path_length[:, None] / run.num_steps)
        floor = 64 * torch.finfo(torch.float64).eps * self.values.abs().amax(dim=1, keepdim=True)
        self._tolerance = torch.maximum(tolerance * share, floor)
        self.omitted = torch.zeros(function.num_queries, dtype=torch.float64, device=device)
        """What restrictions left out, `[query]`."""
        self.integrals: dict[int, StepIntegral] = {}
        """Residual and nodes of the integrated steps (their gradients are dropped after use)."""

    def by_step(self) -> Iterator[tuple[int, StepTerms]]:
        """Terms of the wanted steps, credited when the gradient was taken; last to first."""
        if not all(self._run.rules):
            yield from self._undivided()
            return
        first = min(self._wanted)
        sweep = ReverseSweep(
            self._run,
            products=self.products,
            sources=self._sources,
            num_tokens=self._num_tokens or 1,
            slices=self._slices,
            first=first,
        )
        for step, adjoint in self._backward(range(first, self._run.num_steps)):
            if step.index in self._wanted:
                terms = sweep.terms(step, adjoint)
                self.omitted += terms.omitted
                yield step.index, terms
            else:
                self.omitted += sweep.skip(step, adjoint)

    def by_update_step(self) -> Iterator[tuple[int, StepTerms]]:
        """Terms of the wanted steps, credited when the optimizer applied them; first to last."""
        if not all(self._run.rules):
            yield from self._undivided()
            return
        assert self.products is None or isinstance(self.products, GradientProducts)
        sweep = ForwardSweep(
            self._run, products=self.products, sources=self._sources, slices=self._slices, device=self._device
        )
        # The adjoints of averages are known from the last to the first.
        held = {step.index: adjoint for step, adjoint in self._wanted_backward()} if self._path.averaged else {}
        for index in self._bar(range(self._run.num_steps), "steps"):
            step = Step(self._run, index, self._device)
            if index in self._wanted:
                terms = sweep.terms(step, held.pop(index) if self._path.averaged else self._adjoint(step))
                self.omitted += terms.omitted
                yield index, terms
            else:
                sweep.advance(step)
                if not self._path.averaged:
                    self.omitted += self.values[:, index + 1] - self.values[:, index]

    def _undivided(self) -> Iterator[tuple[int, StepTerms]]:
        """⟨λ_s, Δ_s⟩ for optimizers without a rule: exact by step and layer, with nothing told apart in it."""
        batch_gradient(self._run, self._run.num_steps - 1)  # nothing else here would notice another forward pass
        for step, adjoint in self._wanted_backward():
            change = dot(adjoint, step.update, self._slices)
            nothing = torch.zeros_like(change)
            self.omitted += adjoint @ step.update - change.sum(dim=1)
            yield (
                step.index,
                StepTerms(
                    contribution=change[:, None, None],
                    decay=nothing,
                    other=nothing,
                    rounding=nothing,
                    omitted=nothing.sum(dim=1),
                ),
            )

    def _wanted_backward(self) -> Iterator[tuple[Step, Tensor]]:
        """The wanted steps from the last to the first, with λ_s; what the others add is omitted."""
        needed = range(min(self._wanted), self._run.num_steps) if self._path.averaged else self._wanted
        for step, adjoint in self._backward(needed):
            if step.index in self._wanted:
                yield step, adjoint
            else:
                self.omitted += adjoint @ step.update

    def _backward(self, needed: Collection[int]) -> Iterator[tuple[Step, Tensor]]:
        """The needed steps from the last to the first, with λ_s."""
        first = min(needed)
        for index in self._bar(range(self._run.num_steps - 1, -1, -1), "steps"):
            if index not in needed:
                # The path integral over a whole segment is just the difference of two predictions.
                self.omitted += self.values[:, index + 1] - self.values[:, index]
                continue
            step = Step(self._run, index, self._device)
            adjoint = self._adjoint(step)
            if index == first:
                self.omitted += adjoint @ self._path.lead(step)
            yield step, adjoint

    def _adjoint(self, step: Step) -> Tensor:
        """λ_s, `[query, element]`; of weights that are not averaged, φ_s."""
        phi = self._integrate(step)
        return self._path.adjoint(step.index, phi)

    def _integrate(self, step: Step) -> Tensor:
        """φ_s, `[query, element]`."""
        s = step.index
        start, move = self._path.segment(step)
        if not self._path.moves(s):
            nothing = torch.zeros_like(self.path_length)
            self.integrals[s] = StepIntegral(start.new_empty(0), nothing, nothing.to(torch.int64))
            return start.new_zeros(len(nothing), len(start))
        integral = integrate(
            self._function,
            start,
            move,
            change=(self.values[:, s], self.values[:, s + 1]),
            tolerance=self._tolerance[:, s],
            quadrature=self._rule,
        )
        self.integrals[s] = replace(integral, gradient=integral.gradient.new_empty(0))
        return integral.gradient

    def _bar(self, steps: Iterable[_Entry], what: str, total: int | None = None) -> Iterable[_Entry]:
        hidden = None if self._progress else True
        return tqdm(steps, desc=what, total=total, unit="step", disable=hidden, leave=False)


class _Ledger:
    """Adds the terms of each step into labelled arrays."""

    def __init__(self, coordinates: dict[str, Any]) -> None:
        self._coordinates = coordinates
        self._dims = {name: tuple(coordinates) for name in TERMS}
        for name in TERMS[1:]:
            self._dims[name] = tuple(d for d in coordinates if d not in ("example", "group", "token"))
        self._arrays = {name: np.zeros([len(coordinates[dim]) for dim in dims]) for name, dims in self._dims.items()}
        self._steps = {step: i for i, step in enumerate(coordinates.get("step", coordinates.get("update_step", [])))}

    def enter(self, step: int, terms: StepTerms) -> None:
        """Add a step's terms."""
        for name, dims in self._dims.items():
            block = getattr(terms, name).cpu().numpy()
            if name == "contribution":
                block = block if "token" in dims else block[:, :, 0]
                block = block if {"example", "group"} & set(dims) else block[:, 0]
            if not {"layer", "parameter"} & set(dims):
                block = block[..., 0]
            array = self._arrays[name]
            if self._steps:
                axis = next(i for i, dim in enumerate(dims) if dim in ("step", "update_step"))
                np.moveaxis(array, axis, 0)[self._steps[step]] += block
            else:
                array += block

    def dataset(self, sweep: _Sweep) -> xr.Dataset:
        """All terms, and the certificate beside them."""
        steps = sorted(sweep.integrals)
        labels = self._coordinates.get("update_step", steps)
        # A segment that only an average needed counts with the wanted one before it.
        place = torch.as_tensor(np.searchsorted(labels, steps, side="right") - 1)

        def by_label(rows: list[Tensor]) -> Tensor:
            total = rows[0].new_zeros(len(labels), len(rows[0]))
            return total.index_add_(0, place.to(total.device), torch.stack(rows)).T

        certificate = {
            "quadrature": by_label([sweep.integrals[s].residual for s in steps]),
            "num_nodes": by_label([sweep.integrals[s].num_nodes for s in steps]),
        }
        per_query = {
            "initial": sweep.values[:, 0],
            "prediction": sweep.values[:, -1],
            "omitted": sweep.omitted,
            "path_length": sweep.path_length,
        }
        return xr.Dataset(
            {name: (self._dims[name], array) for name, array in self._arrays.items()}
            | {name: (("query", "update_step"), array.cpu().numpy()) for name, array in certificate.items()}
            | {name: (("query",), array.cpu().numpy()) for name, array in per_query.items()},
            coords=self._coordinates | {"update_step": labels},
        )
