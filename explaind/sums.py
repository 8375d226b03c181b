"""Sums over the axes of arrays that may lie in a store and be larger than memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

__all__ = ["sums"]

_Function = Callable[[NDArray[Any]], NDArray[Any]]


def sums(array: xr.DataArray, keep: Collection[str], *functions: _Function) -> list[xr.DataArray]:
    """Σ f(x) over all axes but some, for several functions f of the entries; every chunk of a store is read once.

    Example:
        >>> signed, absolute = sums(xr.DataArray([[1.0, -2.0]], dims=("query", "step")), ["query"], np.positive, np.abs)
        >>> signed.values, absolute.values
        (array([-1.]), array([3.]))
    """
    kept = [dim for dim in array.dims if dim in keep]
    summed = tuple(axis for axis, dim in enumerate(array.dims) if dim not in keep)
    totals = [np.zeros([array.sizes[dim] for dim in kept]) for _ in functions]
    for block in _blocks(array):
        values = array.isel(block).values
        place = tuple(block[str(dim)] for dim in kept)
        for total, function in zip(totals, functions, strict=True):
            total[place] += function(values).sum(axis=summed)
    coordinates = {name: c for name, c in array.coords.items() if set(c.dims) <= set(kept)}
    return [xr.DataArray(total, coordinates, kept, array.name) for total in totals]


def _blocks(array: xr.DataArray) -> Iterator[Mapping[str, slice]]:
    """The store's chunks; one block for what is in memory."""
    chunks = array.encoding.get("preferred_chunks", {})
    ranges = []
    for dim, size in array.sizes.items():
        length = chunks.get(dim, max(1, size))
        ranges.append([slice(first, min(first + length, size)) for first in range(0, size, length)])
    for block in itertools.product(*ranges):
        yield dict(zip(map(str, array.dims), block, strict=True))
