"""The two sides of the path kernel at one step: average gradients of queries, and what examples brought to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind.axes import check_size, select_steps
from explaind.errors import ClosureError
from explaind.path.forward import ForwardSweep
from explaind.path.integral import StepIntegral, integrate
from explaind.path.sources import select_sources
from explaind.path.step import Step
from explaind.path.strategy import choose_gradients
from explaind.path.sweep import step_tolerances
from explaind.query import Query
from explaind.request import PathSettings, Request, check_request
from explaind.run import Run

__all__ = ["path_errors", "query_features", "train_features"]


def path_errors(run: Run, query: Query, steps: Sequence[int], **settings: Unpack[PathSettings]) -> xr.Dataset:
    """What the path integral over single steps costs and misses, without any of what is made of it.

    Args:
        run: opened with its model.
        query: as in `Run.attribute`.
        steps: which updates. The tolerance is divided among them as among the steps of a run.
        settings: as in `Run.query_features`.

    Returns:
        `quadrature`, the change of q over the step minus ⟨φ, Δ⟩, and `num_nodes`, `[query, update_step]`.
    """
    request = check_request(run, query, by=("query",), steps=steps, **settings)
    integrals = [(integral.residual, integral.num_nodes) for integral, _ in _integrals(request)]
    residuals, nodes = (torch.stack(column, dim=1).cpu().numpy() for column in zip(*integrals, strict=True))
    axes = ("query", "update_step")
    coordinates = {"query": list(request.function.names), "update_step": request.wanted}
    return xr.Dataset({"quadrature": (axes, residuals), "num_nodes": (axes, nodes)}, coordinates)


def query_features(run: Run, query: Query, step: int, **settings: Unpack[PathSettings]) -> dict[str, Tensor]:
    """See `explaind.Run.query_features`."""
    request = check_request(run, query, by=("query",), steps=[step], **settings)
    ((integral, wanted),) = _integrals(request)
    error = integral.residual.abs()
    if bool((error > wanted).any()):
        worst = int((error / wanted).argmax())
        raise ClosureError(
            f"the average gradient of query {request.function.names[worst]!r} over step {step} gives its change up to "
            f"{float(error[worst]):.1e}, wanted is {float(wanted[worst]):.1e}. Allow more with tolerance=…, or try "
            "dtype=torch.float64 or explaind.quadrature.adaptive(max_depth=…)."
        )
    return run.table.unflatten(integral.gradient)


def _integrals(request: Request) -> Iterator[tuple[StepIntegral, Tensor]]:
    """The path integral over each of the wanted steps, as if the run had no others, and its tolerance `[query]`."""
    function = request.function

    def load(index: int) -> Step:
        return Step(request.run, index, request.device)

    ends = [(function.at(step.params), function.at(step.next_params)) for step in map(load, request.wanted)]
    changes = torch.stack([(after - before).abs() for before, after in ends], dim=1)
    size = torch.stack([value.abs() for end in ends for value in end], dim=1)
    tolerances = step_tolerances(changes, size.amax(dim=1, keepdim=True), request.tolerance)
    for step, change, wanted in zip(map(load, request.wanted), ends, tolerances.T, strict=True):
        yield (
            integrate(function, step.params, step.update, change=change, tolerance=wanted, quadrature=request.rule),
            wanted,
        )


def train_features(run: Run, step: int, examples: Sequence[int] | None = None) -> dict[str, Tensor]:
    """See `explaind.Run.train_features`."""
    run.require_rules()
    (last,) = select_steps(run, [step])
    sources = select_sources(run.examples, axis="example", examples=examples, groups=None)
    check_size({"example": len(sources), "element": run.table.num_elements}, 0, stored=False)
    host = torch.device("cpu")
    sweep = ForwardSweep(
        run,
        products=choose_gradients(run, dtype=run.table.dtype, device=host),
        sources=sources,
        slices=[[slice(0, run.table.num_elements)]],
        device=host,
    )
    for index in range(last):
        sweep.advance(Step(run, index, host))
    applied = sweep.applied(Step(run, last, host))
    order = np.searchsorted(sources.labels, sources.labels if examples is None else np.asarray(examples))
    return run.table.unflatten(applied[torch.from_numpy(order)])
