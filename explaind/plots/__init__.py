"""Figures of computed data: one family per file, each draws into an Axes and returns it."""

from explaind.plots.balance import plot_balance
from explaind.plots.bands import plot_bands
from explaind.plots.change_points import plot_change_points
from explaind.plots.curves import plot_curves
from explaind.plots.embedding import plot_embedding
from explaind.plots.examples import plot_examples
from explaind.plots.heatmap import plot_heatmap
from explaind.plots.influence import plot_layer_influence, plot_layer_shares, plot_model_influence
from explaind.plots.layers import plot_layers
from explaind.plots.nodes import plot_closure_by_nodes
from explaind.plots.phases import plot_phases
from explaind.plots.saving import save_figure
from explaind.plots.similarity import plot_similarity
from explaind.plots.steps import plot_steps

__all__ = [
    "plot_balance",
    "plot_bands",
    "plot_change_points",
    "plot_closure_by_nodes",
    "plot_curves",
    "plot_embedding",
    "plot_examples",
    "plot_heatmap",
    "plot_layer_influence",
    "plot_layer_shares",
    "plot_layers",
    "plot_model_influence",
    "plot_phases",
    "plot_similarity",
    "plot_steps",
    "save_figure",
]
