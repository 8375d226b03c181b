"""How much happened in each step, and through which layers: sums of absolute values, told from contributions."""

from __future__ import annotations

import numpy as np
import xarray as xr

from explaind.analysis.dimensions import require, step_axis
from explaind.sums import sums

__all__ = ["layer_influence", "layer_shares", "model_influence", "smooth"]


def model_influence(data: xr.Dataset) -> xr.Dataset:
    """Model influence: the L1 norm over queries of what the data, and the decay, did to them in each step.

        data[s] = Σ_q |Σ_k,l contribution[q, k, s, l]|        decay[s] = Σ_q |Σ_l decay[q, s, l]|

    Called so in ExPLAIND (arXiv 2505.20076); in the unit of the queries.

    Args:
        data: `result.dataset` with the axes `query` and `step` (or `update_step` or `window`); the others are summed
            before the absolute values are taken.

    Returns:
        `data` and `decay`, `[step]`.

    Raises:
        ValueError: an axis is missing.
    """
    axis = step_axis(data.contribution)
    parts = {}
    for name, term in (("data", data.contribution), ("decay", data.decay)):
        require(term, "query")
        (change,) = sums(term, ("query", axis), np.positive)
        parts[name] = abs(change).sum("query")
    return xr.Dataset(parts)


def layer_influence(data: xr.Dataset) -> xr.DataArray:
    """Layer influence: the sum of |contribution| over queries and examples, per step and layer.

        influence[s, l] = Σ_q,k |contribution[q, k, s, l]|

    Called so in ExPLAIND (arXiv 2505.20076); in the unit of the queries. Read in blocks if the result lies in a store.

    Args:
        data: `result.dataset` with the axes `layer` and `step` (or `update_step` or `window`). Absolute values are
            those of its entries: with groups of examples, what cancels within a group is gone.

    Returns:
        `[step, layer]`.

    Raises:
        ValueError: an axis is missing.
    """
    axis = step_axis(data.contribution)
    require(data.contribution, "layer")
    (influence,) = sums(data.contribution, (axis, "layer"), np.abs)
    return influence.rename("influence").transpose(axis, "layer")


def layer_shares(influence: xr.DataArray) -> xr.DataArray:
    """Each layer's part of the layer influence of its step, in 0…1; NaN where there is none.

    Args:
        influence: `[step, layer]`.

    Example:
        >>> layer_shares(xr.DataArray([[1.0, 3.0]], dims=("step", "layer"))).values
        array([[0.25, 0.75]])
    """
    total = influence.sum("layer")
    return (influence / total.where(total > 0)).rename("share")


def smooth(term: xr.DataArray, window: int = 5) -> xr.DataArray:
    """Centred running mean over steps; over fewer of them at both ends.

    Args:
        term: has an axis of steps.
        window: number of steps.

    Raises:
        ValueError: there is no such axis, or `window` is not positive.

    Example:
        >>> smooth(xr.DataArray([0.0, 3.0, 6.0], dims="step"), window=3).values
        array([1.5, 3. , 4.5])
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 step, got {window}.")
    return term.rolling({step_axis(term): window}, center=True, min_periods=1).mean()
