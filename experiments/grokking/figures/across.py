"""Layer shares over tasks and seeds."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from explaind.plots.style import line_styles

__all__ = ["layer_shares"]

_MARKERS = "os^Dv"


def layer_shares(layers: pd.DataFrame) -> Figure:
    """Share of each layer group in the influence of each phase: a dot per seed, a line through the means.

    Args:
        layers: `mean_share` by `task`, `architecture`, `seed`, `phase` and `layer`.
    """
    panels = list(layers.groupby(["task", "architecture"], sort=False))
    phases, names = (list(dict.fromkeys(layers[column])) for column in ("phase", "layer"))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(1.5 + 3.2 * len(panels), 4.5), sharey=True, layout="constrained", squeeze=False
    )
    offsets = np.linspace(-0.22, 0.22, len(phases)) if len(phases) > 1 else [0.0]
    for axes, ((task, architecture), panel) in zip(grid.flat, panels, strict=True):
        for (phase, style), offset, marker in zip(line_styles(phases).items(), offsets, _MARKERS, strict=False):
            part = panel[panel["phase"] == phase]
            places = part["layer"].map(names.index) + offset
            axes.plot(places, part["mean_share"], marker, color=style["color"], markersize=4, alpha=0.5, linewidth=0)
            means = part.groupby("layer")["mean_share"].mean().reindex(names)
            axes.plot(np.arange(len(names)) + offset, means, marker=marker, markersize=7, label=phase, **style)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        runs = panel["seed"].nunique()
        axes.set_title(f"{task}, {architecture}\n{runs} seed{'s' if runs > 1 else ''}", fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
    grid[0, 0].set_ylim(0, 1.05 * layers["mean_share"].max())
    grid[0, 0].set_ylabel("share of a step's Σ |contribution|,\nmean over the phase")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle("Through which layers the training examples act")
    return figure
