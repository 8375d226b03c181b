"""A matrix of contributions over two axes."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm

from explaind.plots.matrix import draw_matrix

__all__ = ["plot_heatmap"]


def plot_heatmap(
    matrix: xr.DataArray, *, limit: float | None = None, colour_bar: bool = True, ax: Axes | None = None
) -> Axes:
    """Signed values over two labelled axes; zero is white, the colour scale is logarithmic on both sides.

    Args:
        matrix: two-dimensional; rows and columns are drawn in its order.
        limit: value of the darkest colour; by default the largest absolute entry.
        colour_bar: draw one.
        ax: where to draw.

    Raises:
        ValueError: not two dimensions.
    """
    limit = limit or float(np.abs(matrix).max()) or 1.0
    norm = SymLogNorm(linthresh=limit / 10, vmin=-limit, vmax=limit)
    ticks = (-limit, -limit / 10, 0.0, limit / 10, limit)
    return draw_matrix(matrix, norm=norm, ticks=ticks, colour_bar=colour_bar, ax=ax)
