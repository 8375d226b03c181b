"""The path kernel between predictions and training examples."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from explaind.plots import plot_heatmap
from explaind.plots.style import RAISED

from ..measures import class_difference_profile

__all__ = ["kernel_by_class", "kernel_in_windows"]


def kernel_by_class(kernels: xr.DataArray) -> Figure:
    """Kernel between validation and training classes in each phase, and its profile over their difference.

    Args:
        kernels: `[phase, query, group]`, from `measures.phase_kernels`.
    """
    columns = kernels.sizes["phase"]
    figure, grid = plt.subplots(2, columns, figsize=(4.6 * columns, 8), layout="constrained", squeeze=False)
    for place in range(columns):
        kernel = kernels.isel(phase=place)
        heat, profile = grid[:, place]
        named = kernel.rename({"query": "validation class, the right answer", "group": "training class"})
        plot_heatmap(named.rename("contribution (nats)"), ax=heat)
        heat.set_title(f"{kernel['phase'].item()}\nsteps {int(kernel['first_step'])}–{int(kernel['last_step'])}")
        differences = class_difference_profile(kernel)
        profile.bar(differences["difference"], differences, color=RAISED, width=0.8)
        profile.axhline(0, color="black", linewidth=0.8)
        profile.set_xlabel("training class − validation class (mod p)")
        profile.set_ylabel("mean contribution (nats)" if place == 0 else "")
    figure.suptitle(
        "Path kernel between classes, weighted as in the run: examples of the right class raise, the others lower"
    )
    return figure


def kernel_in_windows(kernel: xr.DataArray) -> Figure:
    """Heat maps of the kernel, a row per layer group and a column per window; each has a colour scale of its own.

    Args:
        kernel: `[query, example, window, layer]`, from `kernels.kernel_in_windows`: both sorted by a + b.
    """
    layers, windows = kernel["layer"].values.tolist(), kernel["window"].values.tolist()
    shape = (len(layers), len(windows))
    figure, grid = plt.subplots(
        *shape, figsize=(2.9 * shape[1] + 1, 2.3 * shape[0]), layout="constrained", squeeze=False
    )
    rows, columns = "validation, a + b", "training, a + b"
    named = kernel.assign_coords(query=kernel["query_sum"].values, example=kernel["example_sum"].values)
    named = named.rename({"query": rows, "example": columns})
    for row, layer in enumerate(layers):
        for column, window in enumerate(windows):
            ax = grid[row, column]
            matrix = named.sel(layer=layer, window=window).transpose(rows, columns)
            limit = float(np.quantile(np.abs(matrix), 0.999))
            plot_heatmap(matrix.rename("nats"), limit=limit, ax=ax)
            if row < len(layers) - 1:
                ax.set_xlabel("")
            if column:
                ax.set_ylabel("")
            else:
                ax.set_ylabel(f"{layer}\n{rows}")
            if row == 0:
                first, last = (int(kernel[name].sel(window=window)) for name in ("first_step", "last_step"))
                ax.set_title(f"{window}\nsteps {first}–{last}", fontsize="medium")
    figure.suptitle("Path kernel per layer group: orange raised the right answer, purple lowered it (log scale)")
    return figure
