"""Phases found by a statistic, beside those read off the accuracies."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from explaind.plots import plot_change_points, plot_layer_shares

from .layout import Phases, over_steps

__all__ = ["change_points"]

_TITLE_WIDTH = 90
"""Characters of a line above the figure."""


def change_points(
    shares: xr.DataArray, points: pd.DataFrame, phases: Phases, *, accuracies: Mapping[str, int]
) -> Figure:
    """Shares of the layer groups with the change points found in them, and the accuracies' boundaries.

    Args:
        shares: `[step, layer]`, from `explaind.analysis.influence.layer_shares`.
        points: with `step`, `low` and `high`, from `explaind.analysis.change_points`.
        phases: by the accuracies.
        accuracies: steps at which they were first reached, by what is written beside them.
    """
    figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    plot_layer_shares(shares, ax=ax)
    plot_change_points(points, ax=ax)
    over_steps([ax], phases)
    top = ax.get_ylim()[1]
    for label, step in accuracies.items():
        ax.annotate(
            label,
            (step, top),
            (3, -4),
            textcoords="offset points",
            rotation=90,
            ha="left",
            va="top",
            size=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
        ax.axvline(step, color="0.3", linewidth=1, linestyle=":")
    ax.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    found = ", ".join(f"{row.step} ({row.low}–{row.high})" for row in points.itertuples()) or "none"
    title = textwrap.fill(f"Change points of the layer shares, with their intervals: {found}", _TITLE_WIDTH)
    figure.suptitle(f"{title}\ndotted: accuracies first reached")
    return figure
