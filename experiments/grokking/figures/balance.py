"""Whether data or decay dominates, in windows of steps."""

from __future__ import annotations

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure

from explaind.plots import plot_balance

from .layout import Phases, over_steps

__all__ = ["balance"]


def balance(balances: xr.DataArray, phases: Phases) -> Figure:
    """D per window and layer group: above zero the data did more, below it the decay.

    Args:
        balances: `[window, layer]`, from `explaind.analysis.scores.data_decay_balance`.
        phases: of the run.
    """
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    plot_balance(balances, ax=ax)
    length = int((balances["last_step"] - balances["first_step"]).max()) + 1
    ax.set_ylabel(f"D = |data part| − |decay part| (nats)\nΣ over predictions and parameters, {length}-step windows")
    over_steps([ax], phases)
    figure.suptitle("Above zero the data did more to the layer's parameters, below it the decay")
    return figure
