"""The two sides of the path kernel at one step: average gradients of queries, and what examples brought to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind.axes import check_size, select_steps
from explaind.errors import ClosureError
from explaind.path.forward import ForwardSweep
from explaind.path.integral import integrate
from explaind.path.sources import select_sources
from explaind.path.step import Step
from explaind.path.strategy import choose_gradients
from explaind.path.sweep import step_tolerances
from explaind.quadrature import Quadrature
from explaind.query import Query
from explaind.request import check_request
from explaind.run import Run

__all__ = ["FeatureSettings", "path_errors", "query_features", "train_features"]


class FeatureSettings(TypedDict, total=False):
    """The optional arguments of `Run.query_features`; see `Run.attribute`."""

    tolerance: float
    quadrature: Quadrature | str
    dtype: torch.dtype | None
    device: torch.device | str | None
    memory: int | None


def path_errors(run: Run, query: Query, steps: Sequence[int], **settings: Unpack[FeatureSettings]) -> xr.Dataset:
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
    function, recorded = request.function, [Step(run, step, request.device) for step in request.wanted]
    ends = [(function.at(step.params), function.at(step.next_params)) for step in recorded]
    changes = torch.stack([(after - before).abs() for before, after in ends], dim=1)
    size = torch.stack([after.abs() for _, after in ends], dim=1).amax(dim=1, keepdim=True)
    tolerances = step_tolerances(changes, size, request.tolerance)
    integrals = [
        integrate(function, step.params, step.update, change=change, tolerance=wanted, quadrature=request.rule)
        for step, change, wanted in zip(recorded, ends, tolerances.T, strict=True)
    ]
    found = {
        "quadrature": torch.stack([integral.residual for integral in integrals], dim=1),
        "num_nodes": torch.stack([integral.num_nodes for integral in integrals], dim=1),
    }
    coordinates = {"query": list(function.names), "update_step": request.wanted}
    return xr.Dataset({n: (("query", "update_step"), v.cpu().numpy()) for n, v in found.items()}, coordinates)


def query_features(run: Run, query: Query, step: int, **settings: Unpack[FeatureSettings]) -> dict[str, Tensor]:
    """See `explaind.Run.query_features`."""
    request = check_request(run, query, by=("query",), steps=[step], **settings)
    function, recorded = request.function, Step(run, request.wanted[0], request.device)
    before, after = (function.at(params) for params in (recorded.params, recorded.next_params))
    change, size = (after - before).abs(), torch.maximum(before.abs(), after.abs())
    wanted = step_tolerances(change[:, None], size[:, None], request.tolerance)[:, 0]
    integral = integrate(
        function,
        recorded.params,
        recorded.update,
        change=(before, after),
        tolerance=wanted,
        quadrature=request.rule,
    )
    missed = integral.residual.abs() > wanted
    if bool(missed.any()):
        worst = int((integral.residual.abs() / wanted).argmax())
        raise ClosureError(
            f"the average gradient of query {function.names[worst]!r} over step {step} gives its change up to "
            f"{float(integral.residual[worst].abs()):.1e}, wanted is {float(wanted[worst]):.1e}. Allow more with "
            "tolerance=…, or try dtype=torch.float64 or explaind.quadrature.adaptive(max_depth=…)."
        )
    return run.table.unflatten(integral.gradient)


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
