"""Scores of parameters and layers: importance, the balance of data and decay, and how much cancels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from explaind.analysis.dimensions import by_layer, require, without_examples
from explaind.sums import sums

__all__ = ["absolute_importance", "cancellation_ratio", "data_decay_balance"]


def absolute_importance(term: xr.DataArray, *, keep: Sequence[str] = ("element",)) -> xr.DataArray:
    """Absolute importance: absolute values are taken before, and only before, the sum over predictions.

        importance[keep] = Σ_q |Σ_others term[q, others, keep]|

    Named so after ExPLAIND (arXiv 2505.20076); in the unit of the queries.

    Args:
        term: `result.dataset.contribution`, or `.decay`, with the axis `query`; read in blocks if it lies in a store.
        keep: axes of the result. `("element",)` scores single parameters over the whole run.

    Raises:
        ValueError: an axis is missing.

    Example:
        >>> term = xr.DataArray([[[1.0, 2.0], [-3.0, 2.0]]], dims=("query", "window", "element"))
        >>> absolute_importance(term).values, absolute_importance(term, keep=("window", "element")).values
        (array([2., 4.]), array([[1., 2.],
               [3., 2.]]))
    """
    require(term, "query", *keep)
    (summed,) = sums(term, ("query", *keep), np.positive)
    return abs(summed).sum("query").rename("importance")


def data_decay_balance(data: xr.Dataset) -> xr.DataArray:
    """Data–decay balance: D = |kernel part| − |decay part|, summed over predictions and all parameters of a layer.

        D[w, l] = Σ_q Σ_{i ∈ l} (|contribution[q, w, i]| − |decay[q, w, i]|)

    Positive where the data dominates. D of ExPLAIND (arXiv 2505.20076), over every tensor of a layer; in the unit of
    the queries. Stored results are read in blocks; what is kept in memory is one number per window and element.

    Args:
        data: `result.dataset` by `query`, `element` and usually `window`. With the axis `layer` in place of `element`
            the absolute values are those of whole layers, and what cancels within one is gone.

    Returns:
        `[window, layer]`, or without windows `[layer]`.

    Raises:
        ValueError: an axis is missing.
    """
    parts = []
    for term in (data.contribution, data.decay):
        if "layer" not in term.coords:
            require(term, "element")
        require(term, "query")
        summed = without_examples(term)
        (absolute,) = sums(summed, [str(dim) for dim in summed.dims if dim != "query"], np.abs)
        parts.append(by_layer(absolute))
    return (parts[0] - parts[1]).rename("balance")


def cancellation_ratio(term: xr.DataArray, *, over: Sequence[str]) -> xr.DataArray:
    """Cancellation ratio: |signed sum| / sum of absolute values over the named axes, in 0…1.

    1 where all entries have one sign, near 0 where large entries cancel, NaN where all are zero.

    Args:
        term: a term of `result.dataset`; read in blocks if it lies in a store.
        over: the axes that are summed; the others are those of the ratio.

    Raises:
        ValueError: an axis is missing.

    Example:
        >>> cancellation_ratio(xr.DataArray([[3.0, -1.0], [2.0, 2.0]], dims=("query", "step")), over=["step"]).values
        array([0.5, 1. ])
    """
    require(term, *over)
    signed, absolute = sums(term, [str(dim) for dim in term.dims if dim not in over], np.positive, np.abs)
    return (abs(signed) / absolute.where(absolute > 0)).rename("cancellation ratio")
