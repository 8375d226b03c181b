"""Accuracy of fresh networks that were given some layers."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

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
        curves: what `experiments.grokking.retraining.mean_and_spread` returned.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for axes, split in zip(panels, ("train", "validation"), strict=True):
        for name, style in _STYLES.items():
            line = curves[(curves["condition"] == name) & (curves["split"] == split)]
            spread = line["std"].fillna(0.0)
            axes.plot(line["epoch"], line["mean"], label=name, **style)
            axes.fill_between(
                line["epoch"],
                (line["mean"] - spread).clip(0, 1),
                (line["mean"] + spread).clip(0, 1),
                color=style["color"],
                alpha=0.2,
                linewidth=0,
            )
        axes.set_xlabel("epoch (one step on the whole training set)")
        axes.set_title({"train": "training pairs"}.get(split, "validation pairs"))
    panels[0].set_ylabel("accuracy, mean ± standard deviation")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title="copied; all else drawn from 0.1 · N(0, 1)",
        loc="outside lower center",
        ncols=3,
    )
    figure.suptitle(f"All weights trained again, with some copied at the beginning ({curves['num_seeds'].max()} seeds)")
    return figure
