"""The path kernel between predictions and training examples."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from explaind.plots import plot_heatmap
from explaind.plots.style import RAISED

from ..measures import class_difference_profile
from ..task import ModularTask

__all__ = ["kernel_by_class", "kernel_in_windows"]


def kernel_by_class(kernels: xr.DataArray, task: ModularTask) -> Figure:
    """Kernel between validation and training classes in each phase, and its profile over their difference.

    Args:
        kernels: `[phase, query, group]`, from `measures.phase_kernels`.
        task: whose answers the classes are; they are drawn in the order of its group.
    """
    kernels = kernels.sel({axis: [c for c in task.cycle if c in kernels.indexes[axis]] for axis in ("query", "group")})
    rows, columns_name = (f"{whose} class: {task.expression}" for whose in ("validation", "training"))
    columns = kernels.sizes["phase"]
    figure, grid = plt.subplots(2, columns, figsize=(4.6 * columns, 8), layout="constrained", squeeze=False)
    for place in range(columns):
        kernel = kernels.isel(phase=place)
        heat, profile = grid[:, place]
        named = kernel.rename({"query": rows, "group": columns_name})
        plot_heatmap(named.rename("contribution (nats)"), ax=heat)
        heat.set_title(f"{kernel['phase'].item()}\nsteps {int(kernel['first_step'])}–{int(kernel['last_step'])}")
        differences = class_difference_profile(kernel, task.cycle)
        profile.bar(differences["difference"], differences, color=RAISED, width=0.8)
        profile.axhline(0, color="black", linewidth=0.8)
        profile.set_xlabel(task.difference_name("training class", "validation class"))
        profile.set_ylabel("mean contribution (nats)" if place == 0 else "")
    figure.suptitle(
        "Path kernel between classes, weighted as in the run: examples of the right class raise, the others lower\n"
        f"Classes {task.order}"
    )
    return figure


def kernel_in_windows(kernel: xr.DataArray, task: ModularTask) -> Figure:
    """Heat maps of the kernel, a row per layer group and a column per window; each has a colour scale of its own.

    Args:
        kernel: `[query, example, window, layer]`, from `kernels.kernel_in_windows`: both sorted by the answer.
        task: that the pairs are of.
    """
    layers, windows = kernel["layer"].values.tolist(), kernel["window"].values.tolist()
    shape = (len(layers), len(windows))
    figure, grid = plt.subplots(
        *shape, figsize=(2.9 * shape[1] + 1, 2.3 * shape[0]), layout="constrained", squeeze=False
    )
    rows, columns = f"validation, {task.expression}", f"training, {task.expression}"
    named = kernel.assign_coords(query=kernel["query_class"].values, example=kernel["example_class"].values)
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
    figure.suptitle(
        "Path kernel per layer group: orange raised the right answer, purple lowered it (log scale)\n"
        f"Pairs sorted by {task.expression}, {task.order}, then by a"
    )
    return figure
