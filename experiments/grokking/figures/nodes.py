"""How many nodes are enough."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind.plots import plot_closure_by_nodes

__all__ = ["closure_by_nodes"]


def closure_by_nodes(closure: pd.DataFrame) -> Figure:
    """Summed residuals against nodes per step, for three families of rules.

    Args:
        closure: from `nodes.closure_by_nodes`.
    """
    figure, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    plot_closure_by_nodes(closure, ax=ax)
    ax.set_ylabel("Σ over steps |measured error| (nats)")
    figure.suptitle(f"Error of the path integral, {int(closure['num_steps'].iloc[0])} steps")
    return figure
