"""Measures a row: against the slow reference, against stored gradients, and whether its sum closes."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr

import explaind
from explaind import quadrature, reference
from tests.loops.row import Row, Traced

NUM_NODES = 4
FLOOR = 1e-6
"""An entry smaller than this part of the largest one is compared with that part: below it is rounding."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a row showed; numbers are the worst of its runs."""

    difference: float = np.nan
    """Of any contribution or decay from the slow reference, relative to that very entry."""
    closure: float = np.nan
    """Of the sum of all terms from the prediction, relative to the summed absolute terms."""
    other: float = np.nan
    """What comes from no example, relative to the length of the query's path."""
    rounding: float = np.nan
    """Floating-point error of the training, relative to the length of the query's path."""
    stored_difference: float = np.nan
    """Of any contribution from stored example gradients from that of replayed ones."""
    products: str = ""
    """How the examples were told apart."""
    refusal: str = ""
    """Why there are no numbers."""


def measure(row: Row) -> Measurement:
    """Train a row in both modes and compare."""
    if row.refused:
        return Measurement(refusal=refusal(row))
    differences = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        replayed = trained(row, "replayed")
        results = [attribute(traced) for traced in replayed]
        for traced, result in zip(replayed, results, strict=True):
            expected = decompose(traced)
            differences.append(difference(result, expected))
            if not traced.by_token:
                differences.append(difference(attribute(traced, "update_step"), expected))
        stored = [attribute(replace(traced, by_token=False)) for traced in trained(row, "stored")]
    with warnings.catch_warnings():
        if row.foreign:
            warnings.simplefilter("ignore", explaind.errors.UnattributedWarning)
        closures = [result.check() for result in results]
    return Measurement(
        difference=max(differences),
        closure=max(closure.error for closure in closures),
        other=max(closure.other for closure in closures),
        rounding=max(closure.rounding for closure in closures),
        stored_difference=max(
            worst_relative_difference(other.dataset.contribution, summed_tokens(result))
            for other, result in zip(stored, results, strict=True)
        ),
        products=products(results[0]),
    )


def summed_tokens(result: explaind.Attribution) -> xr.DataArray:
    """Stored gradients are those of whole examples."""
    contribution = result.dataset.contribution
    return contribution.sum("token") if "token" in contribution.dims else contribution


def products(result: explaind.Attribution) -> str:
    """How the examples were told apart."""
    attributes = result.dataset.attrs
    coupled = attributes["row_split"].startswith("coupled rows")
    return f"{attributes['example_products']}, coupled rows" if coupled else attributes["example_products"]


def refusal(row: Row) -> str:
    """The message that a row is refused with."""
    assert row.refused
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            for traced in trained(row, "replayed"):
                attribute(traced)
        except row.refused as error:
            return str(error)
    raise AssertionError(f"'{row}' was not refused")


def trained(row: Row, mode: str) -> Sequence[Traced]:
    """Run the loop, by itself or several together."""
    torch.manual_seed(0)
    found = row.run(example_grads=mode)
    return [found] if isinstance(found, Traced) else found


def opened(traced: Traced) -> tuple[explaind.Run, dict[str, Any]]:
    """The run, and what to ask of it besides the query."""
    objective = {} if traced.objective is None else {"objective": traced.objective}
    run = explaind.open_run(traced.store, model=traced.model, **objective)
    return run, {} if traced.average is None else {"average": traced.average}


def attribute(traced: Traced, step_axis: str = "step") -> explaind.Attribution:
    """The fast decomposition in float64, by all axes."""
    run, options = opened(traced)
    options["dtype"] = torch.float64
    axes = [
        axis for axis in ("query", "example", "token", step_axis, "parameter") if axis != "token" or traced.by_token
    ]
    return run.attribute(traced.query, by=axes, quadrature=quadrature.gauss_legendre(NUM_NODES), **options)


def decompose(traced: Traced) -> reference.Reference:
    """The slow one, by both step axes."""
    run, options = opened(traced)
    return reference.decompose(run, traced.query, num_nodes=NUM_NODES, by_token=traced.by_token, **options)


def difference(result: explaind.Attribution, expected: reference.Reference) -> float:
    """Of any contribution or decay, relative to that very entry."""
    return max(
        worst_relative_difference(actual, term.sum([dim for dim in term.dims if dim not in actual.dims]))
        for actual, term in (
            (result.dataset.contribution, expected.contribution),
            (result.dataset.decay, expected.decay),
        )
    )


def worst_relative_difference(actual: xr.DataArray, expected: xr.DataArray) -> float:
    """Largest difference of any single entry, relative to that very entry."""
    actual, expected = xr.align(actual, expected, join="exact")
    size = np.abs(expected)
    scale = np.maximum(size, FLOOR * size.max())
    return float((np.abs(actual - expected) / scale.where(scale > 0, 1.0)).max(skipna=False))
