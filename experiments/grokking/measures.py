"""Summaries of the study's decompositions, arrays in and arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from explaind.analysis.influence import layer_influence, model_influence, smooth
from explaind.attribution import TERMS
from explaind.sums import sums

__all__ = [
    "certificate_by_step",
    "class_difference_profile",
    "layer_influence",
    "phase_kernels",
    "running_totals",
    "same_class_share",
    "smooth",
    "step_sizes",
]


def step_sizes(data: xr.Dataset) -> xr.Dataset:
    """Mean over queries of |change of the prediction| in every step, by `contribution` and by `decay`, `[step]`."""
    return model_influence(data).rename(data="contribution") / data.sizes["query"]


def running_totals(data: xr.Dataset) -> xr.Dataset:
    """Mean over queries of what `data` and `decay` did up to every step, `[step]`."""
    totals = {}
    for name, term in (("data", data.contribution), ("decay", data.decay)):
        (change,) = sums(term, ("query", "step"), np.positive)
        totals[name] = change.mean("query").cumsum("step").assign_coords(step=change["step"])
    return xr.Dataset(totals)


def phase_kernels(data: xr.Dataset, phases: Mapping[str, slice]) -> xr.DataArray:
    """The kernel between classes, accumulated over each phase and all layers, `[phase, query, group]`.

    Args:
        data: by query, group and step.
        phases: half-open ranges of steps.
    """
    (kernel,) = sums(data.contribution, ("query", "group", "step"), np.positive)
    parts = [kernel.sel(step=slice(span.start, span.stop - 1)).sum("step") for span in phases.values()]
    joined = xr.concat(parts, "phase", coords="minimal")
    labels = {
        "phase": list(phases),
        "first_step": ("phase", [span.start for span in phases.values()]),
        "last_step": ("phase", [span.stop - 1 for span in phases.values()]),
    }
    return joined.assign_coords(labels).rename("kernel")


def certificate_by_step(data: xr.Dataset) -> pd.DataFrame:
    """Of every step Σ |terms| and |measured quadrature error|, means over queries: `explained` and `unexplained`."""
    changes = [sums(data[name], ("query", "step"), np.positive)[0] for name in TERMS]
    explained = sum((abs(change).mean("query") for change in changes), start=xr.DataArray(0.0))
    unexplained = abs(data.quadrature).mean("query").rename(update_step="step")
    return xr.Dataset({"explained": explained, "unexplained": unexplained}).to_dataframe()


def class_difference_profile(kernel: xr.DataArray, cycle: Sequence[int]) -> xr.DataArray:
    """Mean of a class × class matrix by place of the group − place of the query, `[difference]`, zero in the middle.

    Args:
        kernel: `[query, group]`, labelled by classes; NaN at differences that none of them have.
        cycle: the classes in cyclic order; a difference is one of places in it.
    """
    n, place = len(cycle), {label: k for k, label in enumerate(cycle)}
    half = n // 2
    rows, columns = (np.array([place[label] for label in kernel[axis].values.tolist()]) for axis in ("query", "group"))
    difference = (columns[None, :] - rows[:, None] + half) % n - half
    entries = pd.Series(kernel.transpose("query", "group").values.ravel())
    means = entries.groupby(difference.ravel()).mean().reindex(range(-half, n - half))
    return xr.DataArray(means.to_numpy(), {"difference": means.index.to_numpy()}, ["difference"])


def same_class_share(kernel: xr.DataArray) -> float:
    """Part of Σ |kernel| that lies between equal classes; `1 / num_classes` if classes did not matter."""
    equal = kernel["group"].values[None, :] == kernel["query"].values[:, None]
    return float(np.abs(kernel.values[equal]).sum() / np.abs(kernel.values).sum())
