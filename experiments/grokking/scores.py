"""Parameter scores of single validation predictions, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import xarray as xr

import explaind
from explaind.analysis.embedding import embed

from .task import Split

__all__ = ["embedded", "parameter_scores", "sorted_by_sum", "validation_pairs"]


def validation_pairs(split: Split, *, num: int) -> explaind.Query:
    """Log-probability of the right answer of the first validation pairs, each called "a + b"."""
    tokens, labels = split.validation_tokens[:num], split.validation_labels[:num]
    names = tuple(f"{a} + {b}" for a, _, b, _ in tokens.tolist())
    return explaind.Query(tokens, output=explaind.outputs.log_prob(labels), names=names)


def parameter_scores(
    run: explaind.Run,
    split: Split,
    *,
    num_queries: int = 100,
    windows: int = 50,
    tolerance: float = 1e-4,
    out: Path | None = None,
    progress: bool = False,
) -> explaind.Attribution:
    """What every single parameter did to validation predictions, in windows of steps, for all examples together.

    Args:
        run: with the layer groups.
        split: its validation pairs.
        num_queries: how many of these.
        windows: steps of each.
        tolerance: of the path integral, as a part of a query's path.
        out: a new zarr store, read when it is used: two numbers per query, window and parameter.
        progress: show a progress bar.
    """
    return run.attribute(
        validation_pairs(split, num=num_queries),
        by=("query", "window", "element"),
        windows=windows,
        tolerance=tolerance,
        out=out,
        progress=progress,
    )


def sorted_by_sum(matrices: xr.DataArray, split: Split) -> xr.DataArray:
    """Similarities of the first validation pairs, sorted by a + b and then by a along both axes.

    Args:
        matrices: `[…, query, other]`, in the order of the split.
        split: the pairs.

    Returns:
        The same with the coordinate `sum`, a + b, along `query`.
    """
    pairs = split.validation_tokens[: matrices.sizes["query"], [0, 2]].tolist()
    order = sorted(range(len(pairs)), key=lambda place: (sum(pairs[place]), pairs[place]))
    labelled = matrices.assign_coords(sum=("query", [a + b for a, b in pairs]))
    return labelled.isel(query=order, other=order)


def embedded(term: xr.DataArray, split: Split, *, layer: str, seed: int = 0) -> pd.DataFrame:
    """The plane of `explaind.analysis.embedding.embed` for the first validation pairs, with their `class`.

    Args:
        term: contributions by query and element, in the order of the split.
        split: the pairs and their answers.
        layer: whose scores.
        seed: of the random start.
    """
    points = embed(term, layer=layer, seed=seed)
    return points.assign(**{"class": split.validation_labels[: len(points)].numpy()})
