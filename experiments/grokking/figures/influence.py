"""How much data and decay, and the data through each layer, did in every step."""

from __future__ import annotations

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure

from explaind.analysis.influence import layer_shares, smooth
from explaind.plots import plot_layer_influence, plot_layer_shares, plot_model_influence
from explaind.plots.style import line_styles

from .layout import Phases, over_steps

__all__ = ["SMOOTHING", "layer_influence", "model_influence"]

SMOOTHING = 5
"""Steps of the running mean, as in the paper."""


def model_influence(influence: xr.Dataset, totals: xr.Dataset, phases: Phases) -> Figure:
    """Model influence of data and decay, and the running totals of what they did.

    Args:
        influence: `data` and `decay`, `[step]`, from `explaind.analysis.influence.model_influence`.
        totals: `data` and `decay`, `[step]`, from `measures.running_totals`.
        phases: of the run.
    """
    figure, rows = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    plot_model_influence(influence.map(smooth, window=SMOOTHING), ax=rows[0])
    rows[0].set_ylabel(f"model influence (nats)\nΣ over queries |change|, {SMOOTHING}-step mean")
    for term, style in line_styles(["data", "decay"]).items():
        rows[1].plot(totals["step"], totals[term], label=term, **style)
    rows[1].axhline(0, color="black", linewidth=0.8)
    rows[1].set_ylabel("running total,\nmean over queries (nats)")
    over_steps(rows, phases)
    figure.suptitle("What the data and the weight decay did to the validation log-probabilities")
    return figure


def layer_influence(influence: xr.DataArray, phases: Phases) -> Figure:
    """Layer influence and the shares of the layer groups in it.

    Args:
        influence: `[step, layer]`, from `explaind.analysis.influence.layer_influence`.
        phases: of the run.
    """
    figure, rows = plt.subplots(2, 1, figsize=(8, 7.5), sharex=True, layout="constrained")
    smoothed = smooth(influence, SMOOTHING)
    plot_layer_influence(smoothed, ax=rows[0])
    rows[0].set_ylabel(f"layer influence (nats)\nΣ |contribution|, {SMOOTHING}-step mean")
    plot_layer_shares(layer_shares(smoothed), ax=rows[1])
    rows[1].get_legend().remove()
    over_steps(rows, phases)
    figure.suptitle("Through which layers the training examples act")
    return figure
