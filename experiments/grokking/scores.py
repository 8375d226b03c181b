"""Parameter scores of single validation predictions, and what is made of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

import explaind
from explaind.analysis.embedding import embed

from .recipe import Recipe
from .task import Split

__all__ = ["by_answer", "embedded", "sorted_by_answer", "validation_pairs"]


def validation_pairs(recipe: Recipe, *, num: int) -> explaind.Query:
    """Log-probability of the right answer of the first validation pairs, each called as in "3 + 4"."""
    split = recipe.make_split()
    tokens, labels = split.validation_tokens[:num], split.validation_labels[:num]
    names = tuple(recipe.task.text(pair) for pair in tokens)
    return explaind.Query(tokens, output=explaind.outputs.log_prob(labels), names=names)


def by_answer(matrices: xr.DataArray, recipe: Recipe) -> xr.DataArray:
    """Similarities of the first validation pairs, labelled by their answers; NaN for a pair with itself.

    Args:
        matrices: `[query, other]`, in the order of the split.
        recipe: that was trained.
    """
    labels = recipe.make_split().validation_labels[: matrices.sizes["query"]].tolist()
    others = matrices.where(~np.eye(len(labels), dtype=bool))
    return others.assign_coords(query=labels, other=labels)


def sorted_by_answer(matrices: xr.DataArray, recipe: Recipe) -> xr.DataArray:
    """Similarities of the first validation pairs, sorted along both axes by `ModularTask.sort`: by answer, then by a.

    Args:
        matrices: `[…, query, other]`, in the order of the split.
        recipe: that was trained.

    Returns:
        The same with the answers as the coordinate `class` along `query`.
    """
    split, num = recipe.make_split(), matrices.sizes["query"]
    order = recipe.task.sort(split.validation_tokens[:num]).numpy()
    labelled = matrices.assign_coords({"class": ("query", split.validation_labels[:num].numpy())})
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
