"""What was asked of a run, checked: the axes, restrictions, rule and place that a decomposition is made by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor

from explaind.averages import Average
from explaind.axes import check_axes, check_size, select_elements, select_layers, select_steps
from explaind.path.averaged import ExplainedPath, explained_path
from explaind.path.budget import Budget, check_memory
from explaind.path.products import ExampleProducts, TangentProducts
from explaind.path.queries import QueryFunction
from explaind.path.sources import Sources, select_sources
from explaind.path.strategy import choose_gradients, choose_products, count_tokens
from explaind.places import Place, place_of
from explaind.quadrature import Adaptive, FixedRule, Quadrature, adaptive
from explaind.query import Query
from explaind.run import Run
from explaind.stream import STEP_AXES, check_unused
from explaind.windows import Windows, select_windows

__all__ = ["KernelSettings", "PathSettings", "Request", "Settings", "check_request", "products_of"]


class PathSettings(TypedDict, total=False):
    """How the path is integrated, and where; `Run.attribute` says what they mean."""

    tolerance: float
    quadrature: Quadrature | str
    dtype: torch.dtype | None
    device: torch.device | str | None
    memory: int | None


class KernelSettings(PathSettings, total=False):
    """The optional arguments of `Run.kernel`; `Run.attribute` says what they mean."""

    steps: range | Sequence[int] | None
    layers: Sequence[str] | None
    groups: Mapping[int, Any] | Sequence[Any] | None
    windows: int | Mapping[Any, range | slice] | None
    average: Average | None
    out: str | Place | None
    progress: bool


class Settings(KernelSettings, total=False):
    """The optional arguments of `Run.attribute`."""

    examples: Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A decomposition that can be made; `check_request` makes it."""

    run: Run
    query: Query
    axes: tuple[str, ...]
    """The axes to keep."""
    sources: Sources
    """The example axis."""
    wanted: list[int]
    """The steps to keep, sorted."""
    layers: list[str]
    """Names along the layer axis."""
    slices: list[list[slice]]
    """Their elements."""
    elements: Tensor | None
    """The element axis; None without it."""
    windows: Windows | None
    """The window axis; None without it."""
    num_tokens: int | None
    """Length of the token axis; None without it."""
    function: QueryFunction
    """All queries."""
    average: Average | None
    rule: Quadrature
    tolerance: float
    dtype: torch.dtype
    device: torch.device
    out: Place | None
    memory: Budget
    progress: bool

    @property
    def steps_axis(self) -> str | None:
        """`"step"`, `"update_step"`, `"window"`, or None if the steps are summed."""
        return next((axis for axis in STEP_AXES if axis in self.axes), None)

    @cached_property
    def coordinates(self) -> dict[str, Any]:
        """Labels of all axes that are kept, in the result's order."""
        layers_axis = next((axis for axis in self.axes if axis in ("layer", "parameter")), None)
        return (
            ({"query": list(self.function.names)} if "query" in self.axes else {})
            | ({self.sources.dimension: self.sources.labels} if self.sources.dimension else {})
            | ({self.steps_axis: self.windows.labels if self.windows else self.wanted} if self.steps_axis else {})
            | ({"token": list(range(self.num_tokens))} if self.num_tokens else {})
            | ({layers_axis: self.layers} if layers_axis else {})
            | ({"element": self.elements.tolist()} if self.elements is not None else {})
        )

    @property
    def beside(self) -> dict[str, tuple[str, list[Any]]]:
        """Further labels along the axes that are kept, as coordinates for xarray."""
        labels: dict[str, tuple[str, list[Any]]] = {}
        if self.windows:
            labels["first_step"] = ("window", [steps[0] for steps in self.windows.steps])
            labels["last_step"] = ("window", [steps[-1] for steps in self.windows.steps])
        if self.elements is not None:
            groups = {member: layer for layer, members in self.run.layers.items() for member in members}
            names = [parameter.name for parameter in self.run.table for _ in range(parameter.num_elements)]
            kept = [names[element] for element in self.elements.tolist()]
            labels["parameter"] = ("element", kept)
            labels["layer"] = ("element", [groups[name] for name in kept])
        return labels

    def new_path(self) -> ExplainedPath:
        """The path that the queries are integrated along, at its beginning."""
        return explained_path(self.run, self.average, self.device)


def check_request(
    run: Run,
    query: Query,
    *,
    by: Sequence[str],
    steps: range | Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    groups: Mapping[int, Any] | Sequence[Any] | None = None,
    windows: int | Mapping[Any, range | slice] | None = None,
    average: Average | None = None,
    tolerance: float = 1e-6,
    quadrature: Quadrature | str = "adaptive",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: str | Place | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> Request:
    """Check the arguments of `Run.attribute`, which says what they mean and what is raised."""
    if out is not None:
        check_unused(place_of(out))
    axes = check_axes(by)
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"tolerance is a part of the path length, zero or more; got {tolerance!r}.")
    examples_axis = next((axis for axis in axes if axis in ("example", "group")), None)
    layers_axis = next((axis for axis in axes if axis in ("layer", "parameter")), None)
    if examples_axis or examples is not None or "token" in axes:
        run.require_rules()
    if groups is not None and examples_axis != "group":
        raise ValueError("groups= is given, so name their axis: by=('query', 'group', …).")
    if average is not None and not isinstance(average, Average):
        raise TypeError(f"average must be one of explaind.averages, such as averages.ema(0.9); got {average!r}.")
    rule = adaptive() if quadrature == "adaptive" else quadrature
    if not isinstance(rule, (FixedRule, Adaptive)):
        raise ValueError(f"quadrature must be 'adaptive' or a rule of explaind.quadrature, got {rule!r}.")
    place = torch.device(device) if device is not None else torch.device("cpu")
    budget = check_memory(memory, place)
    dtype = dtype or run.table.dtype
    sources = select_sources(run.examples, axis=examples_axis, examples=examples, groups=groups)
    if "element" in axes and sources.restricted:
        raise ValueError("by with 'element' is for all examples together; leave examples= out.")
    chosen = select_windows(windows, num_steps=run.num_steps, asked="window" in axes)
    wanted = select_steps(run, steps)
    if chosen is not None:
        chosen, wanted = chosen.of(wanted)
    names, slices = select_layers(run, axis=layers_axis, layers=layers)
    fixed = explained_path(run, average, place).fixed
    request = Request(
        run=run,
        query=query,
        axes=axes,
        sources=sources,
        wanted=wanted,
        layers=names,
        slices=slices,
        elements=select_elements(slices, place) if "element" in axes else None,
        windows=chosen,
        num_tokens=count_tokens(run) if "token" in axes else None,
        function=QueryFunction(
            run, query, fixed=fixed, combined="query" not in axes, dtype=dtype, device=place, memory=budget
        ),
        average=average,
        rule=rule,
        tolerance=tolerance,
        dtype=dtype,
        device=place,
        out=None if out is None else place_of(out),
        memory=budget,
        progress=progress,
    )
    check_size({axis: len(labels) for axis, labels in request.coordinates.items()}, _buffers(request), stored=bool(out))
    return request


def _buffers(request: Request) -> int:
    """Entries of the momentum buffers that examples by `update_step` need."""
    if request.steps_axis != "update_step":
        return 0
    averaged = request.function.num_queries * len(request.wanted) if request.average is not None else 0
    return (len(request.sources) + averaged) * request.run.table.num_elements


def products_of(request: Request) -> ExampleProducts | None:
    """How the products with examples' gradients are made; None if none are needed."""
    run, dtype, device = request.run, request.dtype, request.device
    if request.num_tokens is not None:
        return TangentProducts(run, num_tokens=request.num_tokens, dtype=dtype, device=device)
    if not request.sources.needs_rows:
        return None
    choose = choose_gradients if request.steps_axis == "update_step" else choose_products
    return choose(run, dtype=dtype, device=device)
