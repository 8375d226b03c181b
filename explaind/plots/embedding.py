"""Predictions as points in a plane, coloured by their class."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from explaind.plots.style import CYCLIC, axes_or_new

__all__ = ["plot_embedding"]


def plot_embedding(
    points: pd.DataFrame, *, colour: str = "class", colour_bar: bool = True, ax: Axes | None = None
) -> Axes:
    """A scatter plot whose colours go round in a circle, so that the last class is next to the first.

    Args:
        points: a row per prediction, with columns `x`, `y` and the class, numbers from 0.
        colour: the column with the class.
        colour_bar: draw one.
        ax: where to draw.

    Raises:
        ValueError: a column is missing.
    """
    if missing := [name for name in ("x", "y", colour) if name not in points]:
        raise ValueError(f"an embedding needs the columns x, y and {colour}; there is no {missing[0]!r}.")
    ax = axes_or_new(ax, width=5.5, height=4.8)
    # The colours of both ends are the same one, which only class 0 is to have.
    scattered = ax.scatter(
        points["x"],
        points["y"],
        c=points[colour],
        cmap=CYCLIC,
        vmin=0,
        vmax=points[colour].max() + 1,
        s=24,
        edgecolors="black",
        linewidths=0.4,
    )
    ax.set_xlabel("first coordinate")
    ax.set_ylabel("second coordinate")
    if colour_bar:
        assert ax.figure is not None
        ax.figure.colorbar(scattered, ax=ax, label=colour)
    return ax
