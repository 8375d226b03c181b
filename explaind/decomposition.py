"""Exact decomposition of predictions: runs the sweeps over the steps, and labels their sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from explaind.attribution import Attribution
from explaind.ledger import Ledger, certificate, term_sizes
from explaind.memory import queries_at_once, working_set
from explaind.path.products import ExampleProducts
from explaind.path.strategy import row_split
from explaind.path.sweep import Sweep
from explaind.request import Request, products_of
from explaind.stream import Kept, Sink, Stored, new_store, write_dataset

__all__ = ["attribute", "attributes"]


def attribute(request: Request) -> Attribution:
    """Decompose predictions; see `explaind.Run.attribute`, which says what everything means."""
    products = products_of(request)
    at_once = queries_at_once(request, working_set(request))
    sizes = term_sizes(request.coordinates)
    if request.out is None:
        kept = Kept(sizes)
        beside = _sweeps(request, products, at_once, kept)
        terms = {name: (tuple(sizes[name]), array) for name, array in kept.arrays.items()}
        return Attribution(xr.Dataset(terms, request.coordinates).merge(beside, combine_attrs="no_conflicts"))
    with new_store(request.out) as path:
        with Stored(path, sizes, num_queries=at_once) as stored:
            beside = _sweeps(request, products, at_once, stored)
            stored.finish()
        write_dataset(path, beside)
    return Attribution.open(request.out)


def _sweeps(request: Request, products: ExampleProducts | None, at_once: int, sink: Sink) -> xr.Dataset:
    """Fill the sink with the terms of all queries; returns what stands beside them."""
    function, beside = request.function, list[dict[str, tuple[tuple[str, ...], Any]]]()
    for first in range(0, function.num_queries, at_once):
        queries = slice(first, min(first + at_once, function.num_queries))
        sweep = Sweep(
            request.run,
            function.part(queries),
            path=request.new_path(),
            products=products,
            sources=request.sources,
            num_tokens=request.num_tokens,
            slices=request.slices,
            elements=request.elements,
            wanted=request.wanted,
            rule=request.rule,
            tolerance=request.tolerance,
            progress=request.progress,
            dtype=request.dtype,
            device=request.device,
        )
        ledger = Ledger(request.coordinates, sink, queries, request.windows)
        by_step = sweep.by_update_step() if request.steps_axis == "update_step" else sweep.by_step()
        for step, terms in by_step:
            ledger.enter(step, terms)
            del terms  # the next ones are made before they are replaced here
        ledger.finish()
        updates = request.coordinates.get("update_step", sorted(sweep.integrals))
        beside.append(certificate(sweep, updates))
    joined = {n: (dims, np.concatenate([part[n][1] for part in beside])) for n, (dims, _) in beside[0].items()}
    coordinates = {"query": list(function.names), **request.coordinates, "update_step": updates}
    dataset = xr.Dataset(joined, coordinates, attributes(request, products)).assign_coords(request.beside)
    return dataset if "query" in request.axes else dataset.squeeze("query", drop=True)


def attributes(request: Request, products: ExampleProducts | None) -> dict[str, Any]:
    """What the result says of how it was made."""
    run, output = request.run, request.query.output
    return {
        "run": str(run.path),
        "output": getattr(output, "name", getattr(output, "__name__", "query")),
        "num_steps": run.num_steps,
        "weights": request.new_path().name,
        "optimizer": run.optimizer,
        "update_rule": "known" if all(run.rules) else "not known: contribution is the whole update, decay included",
        "quadrature": request.rule.name,
        "tolerance": request.tolerance,
        "dtype": str(request.dtype).removeprefix("torch."),
        "query_evaluation": "each query alone" if request.function.separate else "all inputs as one batch",
        "example_products": products.name if products else "none",
        "row_split": row_split(run, products) if products else "none",
    }
