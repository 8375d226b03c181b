"""Accuracy of fresh networks that were given some layers."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind.plots import plot_bands

from .swaps import SET_STYLES

__all__ = ["retrained_accuracy"]

_STYLES: dict[str, dict[str, Any]] = {
    "grokked outer layers": SET_STYLES["outer"],
    "grokked pipeline": SET_STYLES["pipeline"],
    "memorised outer layers": {"color": "#CC6677", "linestyle": (0, (3, 1, 1, 1))},
    "half-memorised outer layers": {"color": "#997700", "linestyle": ":"},
    "nothing": {"color": "0.45", "linestyle": (0, (5, 1))},
}


def retrained_accuracy(curves: pd.DataFrame) -> Figure:
    """Training and validation accuracy over the epochs, mean and standard deviation of the seeds, by what was copied.

    Args:
        curves: what `experiments.grokking.retraining.retrain` returned, joined.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for axes, (split, title) in zip(panels, (("train", "training"), ("validation", "validation")), strict=True):
        part = curves[curves["split"] == split]
        plot_bands(part, x="epoch", y="accuracy", line="condition", styles=_STYLES, ax=axes)
        axes.get_legend().remove()
        axes.set(xlabel="epoch (one step on the whole training set)", ylabel="", title=f"{title} pairs", ylim=(0, 1.02))
    panels[0].set_ylabel("accuracy, mean ± standard deviation")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title="copied; all else drawn from 0.1 · N(0, 1)",
        loc="outside lower center",
        ncols=3,
    )
    figure.suptitle("All weights trained again, with some copied at the beginning")
    return figure
