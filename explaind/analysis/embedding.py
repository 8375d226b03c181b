"""Predictions as points in a plane: near each other where they were made in the same way."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from explaind.analysis.dimensions import require
from explaind.analysis.extras import optional
from explaind.sums import sums
from explaind.threads import num_threads

__all__ = ["embed"]


def embed(term: xr.DataArray, *, layer: str, num_neighbours: int = 15, seed: int = 0) -> pd.DataFrame:
    """UMAP of the queries' parameter scores in one layer, by their cosines, over all steps and windows.

    Distances in the plane have no unit, and those between far points no meaning.

    Args:
        term: `result.dataset.contribution`, by `query` and `element`; read in blocks if it lies in a store.
        layer: whose scores.
        num_neighbours: how many points each is to stay near.
        seed: of the random start; the same seed gives the same points on one machine.

    Returns:
        A row per query: `query`, `x` and `y`.

    Raises:
        ValueError: an axis is missing, there is no such layer, too few queries, or one has no scores in the layer.
        ImportError: umap-learn is not installed.
    """
    require(term, "query", "element")
    if layer not in term["layer"].values:
        raise ValueError(f"there is no layer {layer!r}; there are {', '.join(dict.fromkeys(term['layer'].values))}.")
    if term.sizes["query"] <= num_neighbours:
        raise ValueError(
            f"an embedding of {term.sizes['query']} queries needs fewer neighbours than that; got "
            f"num_neighbours={num_neighbours}."
        )
    (scores,) = sums(term, ("query", "element"), np.positive)
    rows = scores.isel(element=scores["layer"].values == layer).transpose("query", "element")
    if len(empty := np.flatnonzero(~rows.values.any(axis=1))):
        raise ValueError(
            f"query {rows['query'].values.tolist()[empty[0]]!r} has no scores in layer {layer!r}; leave it out."
        )
    umap = optional("umap", purpose="an embedding", package="umap-learn")
    mapper = umap.UMAP(n_neighbors=num_neighbours, metric="cosine", random_state=seed, n_jobs=1)
    with num_threads():  # numba's pool of threads can be torch's
        x, y = mapper.fit_transform(rows.values).T
    return pd.DataFrame({"query": rows["query"].values, "x": x, "y": y})
