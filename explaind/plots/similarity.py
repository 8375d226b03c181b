"""How alike predictions are: a matrix of cosines."""

from __future__ import annotations

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from explaind.plots.matrix import draw_matrix

__all__ = ["plot_similarity"]


def plot_similarity(matrix: xr.DataArray, *, colour_bar: bool = True, ax: Axes | None = None) -> Axes:
    """Cosines between queries, −1…1 with white at zero; grey where a query has no scores.

    Args:
        matrix: `[query, other]`, one of the matrices of `explaind.analysis.similarity`, in the order to draw.
        colour_bar: draw one.
        ax: where to draw.

    Raises:
        ValueError: not two dimensions.
    """
    ax = draw_matrix(matrix, norm=Normalize(-1, 1), ticks=(-1, -0.5, 0, 0.5, 1), colour_bar=colour_bar, ax=ax)
    ax.set_aspect("equal")
    return ax
