"""Which predictions were made in the same way."""

from __future__ import annotations

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure

from explaind.plots import plot_similarity

from ..task import ModularTask

__all__ = ["similarity", "similarity_in_windows"]


def similarity(matrices: xr.DataArray, task: ModularTask) -> Figure:
    """A matrix per layer group, over the whole run.

    Args:
        matrices: `[layer, query, other]`, from `scores.sorted_by_answer`.
        task: that the predictions are of.
    """
    layers = matrices["layer"].values.tolist()
    figure, grid = plt.subplots(2, -(-len(layers) // 2), figsize=(11, 7), layout="compressed", squeeze=False)
    for ax, layer in zip(grid.flat, layers, strict=False):
        plot_similarity(_named(matrices.sel(layer=layer), task), colour_bar=False, ax=ax)
        ax.set_title(layer)
    for ax in grid.flat[len(layers) :]:
        ax.set_visible(False)
    figure.colorbar(grid[0, 0].get_images()[0], ax=grid, label="cosine of the parameter scores")
    figure.suptitle(
        "Similarity of validation predictions, per layer group, over the whole run\n"
        f"Sorted by {task.expression}, {task.order}"
    )
    return figure


def similarity_in_windows(matrices: xr.DataArray, task: ModularTask, *, most: int = 6) -> Figure:
    """The same in windows of steps: a row per layer group, a column per window.

    Args:
        matrices: `[window, layer, query, other]`, from `scores.sorted_by_answer`.
        task: that the predictions are of.
        most: columns; of more windows, some at equal distances are drawn, the first and the last among them.
    """
    count = matrices.sizes["window"]
    chosen = sorted({round(place * (count - 1) / max(min(most, count) - 1, 1)) for place in range(min(most, count))})
    layers = matrices["layer"].values.tolist()
    figure, grid = plt.subplots(
        len(layers), len(chosen), figsize=(2 * len(chosen) + 1.5, 2 * len(layers)), layout="compressed", squeeze=False
    )
    for row, layer in enumerate(layers):
        for column, place in enumerate(chosen):
            ax, matrix = grid[row, column], matrices.sel(layer=layer).isel(window=place)
            plot_similarity(_named(matrix, task), colour_bar=False, ax=ax)
            ax.set(xlabel="", ylabel=layer if column == 0 else "", xticks=[], yticks=[])
            if row == 0:
                ax.set_title(f"{int(matrix['first_step'])}–{int(matrix['last_step'])}", fontsize="medium")
    figure.colorbar(grid[0, 0].get_images()[0], ax=grid, label="cosine of the parameter scores", shrink=0.5)
    figure.suptitle(
        f"Similarity of validation predictions in windows of steps\nSorted by {task.expression}, {task.order}"
    )
    return figure


def _named(matrix: xr.DataArray, task: ModularTask) -> xr.DataArray:
    classes = matrix["class"].values
    labelled = matrix.drop_vars("class").assign_coords(query=classes, other=classes)
    return labelled.rename({"query": task.expression, "other": f"{task.expression}, of the other"})
