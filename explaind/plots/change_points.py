"""Change points over curves, with the intervals in which they may lie."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from explaind.plots.style import axes_or_new

__all__ = ["plot_change_points"]


def plot_change_points(points: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A vertical line per change point, in a hatched band from the first to the last step of its interval.

    Args:
        points: a row per change point with columns `step`, `low` and `high`, from `explaind.analysis.change_points`.
        ax: where to draw.

    Raises:
        ValueError: a column is missing.
    """
    if missing := [name for name in ("step", "low", "high") if name not in points]:
        raise ValueError(f"change points need the columns step, low and high; there is no {missing[0]!r}.")
    ax = axes_or_new(ax)
    rows = points[["step", "low", "high"]].itertuples(index=False)
    for place, (step, low, high) in enumerate(rows):
        ax.axvspan(low, high, facecolor="none", edgecolor="0.3", hatch="////", linewidth=0, alpha=0.6, zorder=1)
        ax.axvline(step, color="black", linewidth=1.6, zorder=3, label="change point" if place == 0 else None)
    return ax
