"""Whether data or decay dominates, over windows of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from explaind.analysis.dimensions import require
from explaind.plots.style import MARKERS, axes_or_new, layer_styles

__all__ = ["plot_balance"]


def plot_balance(balance: xr.DataArray, *, study: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """A line per layer through the middle of every window; logarithmic on both sides of zero.

    Args:
        balance: `[window, layer]`, from `explaind.analysis.scores.data_decay_balance`.
        study: all layers of the study, in the order of `run.layers`, which fixes their colours.
        ax: where to draw.

    Raises:
        ValueError: an axis is missing, or a layer is none of the study's.
    """
    require(balance, "window", "layer")
    ax = axes_or_new(ax)
    middles = (balance["first_step"] + balance["last_step"] + 1) / 2
    styles = layer_styles(balance["layer"].values.tolist(), study)
    for place, layer in enumerate(study or styles):
        if layer in styles:
            line = balance.sel(layer=layer)
            ax.plot(middles, line, label=layer, marker=MARKERS[place % len(MARKERS)], markersize=4, **styles[layer])
    ax.axhline(0, color="black", linewidth=0.8)
    largest = float(np.abs(balance).max()) or 1.0
    decade = math.ceil(math.log10(largest / 1000))  # a whole one: ticks within the linear part would overlap
    ax.set_yscale("symlog", linthresh=10.0**decade)
    ax.set_xlabel("optimizer step, middle of the window")
    ax.set_ylabel("D = |data part| − |decay part|\nΣ over queries and parameters")
    ax.legend(title="layer", fontsize="small", ncols=2)
    return ax
