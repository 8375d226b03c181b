"""Exact decomposition of predictions: asks for the axes, runs the sweep over the steps, labels the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind.attribution import TERMS, Attribution
from explaind.averages import Average
from explaind.axes import check_axes, check_size, select_layers, select_steps
from explaind.path.averaged import explained_path
from explaind.path.queries import QueryFunction
from explaind.path.sources import select_sources
from explaind.path.step import StepTerms
from explaind.path.strategy import count_tokens, row_split
from explaind.path.sweep import Sweep
from explaind.quadrature import Adaptive, FixedRule, Quadrature, adaptive
from explaind.query import Query
from explaind.run import Run

__all__ = ["attribute"]


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
    dtype: torch.dtype | None = None,
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
    dtype = dtype or run.table.dtype

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

    sweep = Sweep(
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
        "row_split": row_split(run, sweep.products) if sweep.products else "none",
    }
    return Attribution(dataset)


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

    def dataset(self, sweep: Sweep) -> xr.Dataset:
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
