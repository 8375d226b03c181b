"""How few weights the grokked network needs, if those are kept that training's influence picks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

import explaind
from explaind.agreement import accuracy, argmax_agreement, mean_kl
from explaind.evaluation import evaluate
from explaind.interventions import prune

from .task import Split

__all__ = ["FRACTIONS", "prune_curves"]

FRACTIONS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The parts of the elements that are kept."""


def prune_curves(
    run: explaind.Run,
    split: Split,
    importance: xr.DataArray,
    *,
    fractions: Sequence[float] = FRACTIONS,
    num_draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Keep a part of the final weights and compare with all of them, on validation.

    Elements are kept by |influence|, by |weight|, and at random. Those that no step ever had a gradient for come last
    in each: the network does not use them.

    Args:
        run: the recorded run.
        split: the validation pairs.
        importance: of every element, `[element]`: the paper's absolute importance Σ_q |score[q, element]|, with
            scores as `experiments.grokking.perturbations.element_scores` gives them.
        fractions: the parts of the elements to keep.
        num_draws: how many random orders.
        seed: of these.

    Returns:
        One row per pruned network: `criterion` ("influence", "magnitude" or "random"), `draw` (0 but for random ones),
        `fraction` kept, `accuracy`, `agreement` with the unpruned network's argmax, and `kl` from it, in nats.
    """
    trained = run.params(run.num_steps)
    outputs = evaluate(run.model, trained, split.validation_tokens)
    rows = []
    for criterion, draw, scores in _orders(run, importance, num_draws, seed):
        for fraction in fractions:
            pruned = evaluate(run.model, prune(trained, scores, fraction=fraction), split.validation_tokens)
            rows.append(
                {
                    "criterion": criterion,
                    "draw": draw,
                    "fraction": fraction,
                    "accuracy": accuracy(pruned, split.validation_labels),
                    "agreement": argmax_agreement(outputs, pruned),
                    "kl": mean_kl(outputs, pruned),
                }
            )
    return pd.DataFrame(rows)


def _orders(
    run: explaind.Run, importance: xr.DataArray, num_draws: int, seed: int
) -> Iterator[tuple[str, int, NDArray[np.float64]]]:
    """Criterion, number of the draw, and the scores `[element]` of each order to prune in."""
    used = run.table.expand([float(column.any()) for column in run.updated.T]).numpy() > 0
    magnitudes = run.flat_params(run.num_steps).abs().numpy()
    random = np.random.default_rng(seed)
    yield "influence", 0, np.where(used, importance.sortby("element").values, -np.inf)
    yield "magnitude", 0, np.where(used, magnitudes, -np.inf)
    for draw in range(num_draws):
        yield "random", draw, np.where(used, random.random(len(used)), -np.inf)
