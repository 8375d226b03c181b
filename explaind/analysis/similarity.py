"""Whether two predictions were made in the same way: cosines of their parameter scores."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from explaind.analysis.dimensions import require
from explaind.sums import sums

__all__ = ["similarity", "window_similarity"]


def similarity(term: xr.DataArray) -> xr.DataArray:
    """Similarity of predictions: the cosine of their parameter scores in each layer, over all steps and windows.

        Sim[l, q, r] = ⟨c_q, c_r⟩ / (‖c_q‖ ‖c_r‖)  with  c_q = Σ_w contribution[q, w, i ∈ l]

    Sim of ExPLAIND (arXiv 2505.20076), in −1…1; NaN for a query without any score in the layer.

    Args:
        term: `result.dataset.contribution`, by `query` and `element`; read in blocks if it lies in a store.

    Returns:
        `[layer, query, other]`.

    Raises:
        ValueError: an axis is missing.

    Example:
        >>> scores = xr.DataArray([[3.0, 4.0], [6.0, 8.0]], {"layer": ("element", ["a", "a"])}, ["query", "element"])
        >>> similarity(scores).values.round(12)
        array([[[1., 1.],
                [1., 1.]]])
    """
    require(term, "query", "element")
    (scores,) = sums(term, ("query", "element"), np.positive)
    return _cosines(scores)


def window_similarity(term: xr.DataArray) -> xr.DataArray:
    """`similarity` within every window of steps, `[window, layer, query, other]`; one window is in memory at a time.

    Raises:
        ValueError: an axis is missing.
    """
    require(term, "query", "window", "element")
    windows = [_cosines(term.isel(window=place).load()) for place in range(term.sizes["window"])]
    joined = xr.concat([matrix.reset_coords(drop=True) for matrix in windows], "window", coords="minimal")
    return joined.assign_coords({name: c for name, c in term.coords.items() if c.dims == ("window",)})


def _cosines(scores: xr.DataArray) -> xr.DataArray:
    """Cosines between the rows `[query, element]` in each layer."""
    layers = scores["layer"].values
    names = list(dict.fromkeys(layers.tolist()))
    rows = scores.transpose("query", "element").values
    matrices = np.stack([_cosine(rows[:, layers == name]) for name in names])
    queries = scores["query"].values if "query" in scores.coords else np.arange(len(rows))
    coordinates = {"layer": names, "query": queries, "other": queries}
    return xr.DataArray(matrices, coordinates, ["layer", "query", "other"], name="similarity")


def _cosine(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = np.divide(rows, lengths, out=np.full_like(rows, np.nan), where=lengths > 0)
    cosines: NDArray[np.float64] = np.clip(units @ units.T, -1, 1)
    return cosines
