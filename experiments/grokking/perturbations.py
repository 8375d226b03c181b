"""Do high scores matter? What a score says was added, against what is missing when its example or weight is taken away.

A contribution is additive: the part of the one prediction that training made which came from an example (or a single
weight), with everything else as it was. To remove it is counterfactual: all that followed would have been another
training. The two agree as far as the rest of the training does not answer to the removal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor
from tqdm import tqdm

import explaind
from explaind.evaluation import predict
from explaind.sums import sums

from .recipes import Recipe
from .removal import retrain_window

__all__ = ["correlations", "element_scores", "perturb_elements", "perturb_examples"]

_SCORED = ("contribution", "decay")


def perturb_examples(
    recipe: Recipe,
    run: explaind.Run,
    query: explaind.Query,
    *,
    num_chosen: int = 200,
    num_steps: int = 10,
    tolerance: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Contributions of examples in the last steps, against what changes when these steps are made without them.

    Args:
        recipe: that the run was trained by.
        run: the recorded run.
        query: the predictions.
        num_chosen: how many examples with the largest Σ_q |score|, and how many at random.
        num_steps: how many of the last steps.
        tolerance: of the decomposition; see `explaind.Run.attribute`.
        seed: of the random choice.
        progress: show progress bars.

    Returns:
        One row per chosen example and query: `kind` ("example"), `num_steps`, `chosen` ("top" or "random"), `item` (its
        id), `query`, `score` (its contribution to q, summed over the steps), and `change`, q with it − q without it.
    """
    window = range(run.num_steps - num_steps, run.num_steps)
    result = run.attribute(query, by=("query", "example"), steps=window, tolerance=tolerance, progress=progress)
    result.check()
    scores = result.dataset.contribution.transpose("example", "query").rename(example="item")
    chosen = _choose(scores, num_chosen, seed)
    items = chosen["item"].unique().tolist()

    def networks() -> Iterator[dict[str, Tensor]]:
        yield retrain_window(recipe, run, num_steps=num_steps)
        for example in _watched(items, "remove examples", progress):
            yield retrain_window(recipe, run, num_steps=num_steps, without=example)

    return _joined("example", num_steps, chosen, scores, _changes(run, query, networks(), items))


def element_scores(data: xr.Dataset) -> xr.DataArray:
    """Σ_s (contribution + decay)[q, s, i] of every parameter element i over the whole training, `[query, element]`.

    Args:
        data: terms of `run.attribute` with the axes `query` and `element`, and any others, which are summed.
    """
    (contribution,), (decay,) = (sums(data[name], ("query", "element"), np.positive) for name in _SCORED)
    return (contribution + decay).rename("score")


def perturb_elements(
    run: explaind.Run,
    query: explaind.Query,
    scores: xr.DataArray,
    *,
    num_chosen: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Scores of single weights over the whole training, against what changes when they are zero in the final network.

    Args:
        run: the recorded run.
        query: the predictions.
        scores: of every element, `[query, element]`; see `element_scores`.
        num_chosen: how many elements with the largest Σ_q |score|, and how many at random.
        seed: of the random choice.
        progress: show a progress bar.

    Returns:
        As `perturb_examples`, with `kind` "element", `item` its place in the flat parameters, and `num_steps` those of
        the run.
    """
    scores = scores.transpose("element", "query").rename(element="item")
    chosen = _choose(scores, num_chosen, seed)
    items = chosen["item"].unique().tolist()
    trained = run.flat_params(run.num_steps)

    def networks() -> Iterator[dict[str, Tensor]]:
        yield run.table.unflatten(trained)
        for element in _watched(items, "zero elements", progress):
            without = trained.clone()
            without[element] = 0
            yield run.table.unflatten(without)

    return _joined("element", run.num_steps, chosen, scores, _changes(run, query, networks(), items))


def correlations(perturbed: pd.DataFrame) -> pd.DataFrame:
    """Pearson's and Spearman's correlation of score and change.

    Returns:
        One row per `kind`, `num_steps` and `chosen` ("top", "random" or "all"): `num` pairs of item and query,
        `pearson`, `spearman`, and `mean_score` and `mean_change`, both of absolute values.
    """
    rows = []
    for (kind, num_steps), part in perturbed.groupby(["kind", "num_steps"], sort=False):
        for chosen, pairs in [("all", part), *part.groupby("chosen", sort=False)]:
            both = pairs[["score", "change"]]
            rows.append(
                {
                    "kind": kind,
                    "num_steps": num_steps,
                    "chosen": chosen,
                    "num": len(both),
                    "pearson": both.corr(method="pearson").loc["score", "change"],
                    "spearman": both.corr(method="spearman").loc["score", "change"],
                    "mean_score": both["score"].abs().mean(),
                    "mean_change": both["change"].abs().mean(),
                }
            )
    return pd.DataFrame(rows)


def _choose(scores: xr.DataArray, num: int, seed: int) -> pd.DataFrame:
    """The top and the random items, from scores `[item, query]`; an item may be both."""
    size = abs(scores).sum("query").to_series().sort_values(ascending=False, kind="stable")
    if not 1 <= num <= len(size):
        raise ValueError(f"num_chosen must be from 1 to the {len(size)} that there are; got {num}.")
    random = np.random.default_rng(seed).choice(scores["item"].values, num, replace=False)
    return pd.DataFrame({"chosen": ["top"] * num + ["random"] * num, "item": [*size.index[:num], *random.tolist()]})


def _changes(
    run: explaind.Run, query: explaind.Query, networks: Iterable[dict[str, Tensor]], items: Sequence[int]
) -> xr.DataArray:
    """The prediction of the first network, which is whole, minus those of the others, `[item, query]`."""
    values = predict(run, query, networks)
    changes: xr.DataArray = values[0] - values[1:]
    return changes.rename(network="item").assign_coords(item=list(items))


def _joined(
    kind: str, num_steps: int, chosen: pd.DataFrame, scores: xr.DataArray, changes: xr.DataArray
) -> pd.DataFrame:
    """One row per chosen item and query."""
    pairs = xr.Dataset({"score": scores.sel(item=changes["item"]).reset_coords(drop=True), "change": changes})
    table = chosen.merge(pairs.to_dataframe().reset_index(), on="item")[["chosen", "item", "query", "score", "change"]]
    table.insert(0, "num_steps", num_steps)
    table.insert(0, "kind", kind)
    return table


def _watched(items: Sequence[int], what: str, progress: bool) -> Iterable[Any]:
    return tqdm(items, desc=what, disable=None if progress else True)
