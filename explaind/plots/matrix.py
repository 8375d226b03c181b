"""A matrix as an image: what heat maps and similarities share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter

from explaind.plots.style import DIVERGING, axes_or_new

__all__ = ["draw_matrix"]


def draw_matrix(
    matrix: xr.DataArray, *, norm: Normalize, ticks: Sequence[float], colour_bar: bool, ax: Axes | None
) -> Axes:
    """Rows and columns in their order, with a few of their labels; entries that are not numbers are grey.

    Args:
        matrix: two-dimensional.
        norm: of the colours.
        ticks: values that are written at the colour bar.
        colour_bar: draw one.
        ax: where to draw.

    Raises:
        ValueError: not two dimensions.
    """
    if matrix.ndim != 2:
        raise ValueError(f"a heat map needs two axes, got {matrix.dims}.")
    ax = axes_or_new(ax, width=5.5, height=4.8)
    colours = colormaps[DIVERGING].with_extremes(bad="0.6")
    image = ax.imshow(matrix.values, cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
    rows, columns = (str(dim) for dim in matrix.dims)
    ax.set_ylabel(rows)
    ax.set_xlabel(columns)
    for axis, dim in ((ax.yaxis, rows), (ax.xaxis, columns)):
        places = np.linspace(0, matrix.sizes[dim] - 1, min(matrix.sizes[dim], 6)).round().astype(int)
        axis.set_ticks(places, [str(label) for label in matrix[dim].values[places]])
    if colour_bar:
        assert ax.figure is not None
        bar = ax.figure.colorbar(image, ax=ax, label=str(matrix.name or "value"), ticks=list(ticks), format=_two_digits)
        bar.minorticks_off()
    return ax


@FuncFormatter
def _two_digits(value: float, _: int) -> str:
    return f"{float(f'{value:.2g}'):g}"
