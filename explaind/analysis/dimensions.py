"""Which axis of a decomposition plays which part."""

from __future__ import annotations

import numpy as np
import xarray as xr

from explaind.stream import STEP_AXES
from explaind.sums import sums

__all__ = ["EXAMPLE_AXES", "by_layer", "require", "step_axis", "without_examples"]

EXAMPLE_AXES = ("example", "group", "token")
"""The axes that only contributions have."""


def step_axis(term: xr.DataArray) -> str:
    """The axis that counts steps: `step`, `update_step` or `window`.

    Raises:
        ValueError: there is none.
    """
    for axis in STEP_AXES:
        if axis in term.dims:
            return axis
    raise ValueError(
        f"this needs an axis of steps or windows, the axes are {term.dims}. Ask for it: "
        "run.attribute(query, by=('query', 'step', …))."
    )


def require(term: xr.DataArray, *axes: str) -> None:
    """Refuse a term that lacks an axis.

    Raises:
        ValueError: with the axis, and how to get it.
    """
    for axis in axes:
        if axis not in term.dims:
            raise ValueError(
                f"this needs the axis {axis!r}, the axes are {term.dims}. Name it in by= of run.attribute."
            )


def without_examples(term: xr.DataArray) -> xr.DataArray:
    """The term summed over examples, groups and tokens; read in blocks if it lies in a store."""
    kept = [str(dim) for dim in term.dims if dim not in EXAMPLE_AXES]
    return term if len(kept) == term.ndim else sums(term, kept, np.positive)[0]


def by_layer(term: xr.DataArray) -> xr.DataArray:
    """The term with single elements summed to their layers, in the order of the elements.

    Example:
        >>> by_layer(xr.DataArray([1.0, 2.0, 4.0], {"layer": ("element", ["b", "a", "a"])}, ["element"])).values
        array([1., 6.])
    """
    if "element" not in term.dims:
        return term
    names = list(dict.fromkeys(term["layer"].values.tolist()))
    summed: xr.DataArray = term.groupby("layer").sum("element").sel(layer=names)
    return summed
