"""`result.plot`: the figures of one attribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from explaind.analysis.dimensions import EXAMPLE_AXES
from explaind.analysis.influence import layer_influence, model_influence, smooth
from explaind.analysis.scores import data_decay_balance
from explaind.analysis.similarity import similarity
from explaind.plots.balance import plot_balance
from explaind.plots.examples import plot_examples
from explaind.plots.heatmap import plot_heatmap
from explaind.plots.influence import plot_layer_influence, plot_model_influence
from explaind.plots.layers import plot_layers
from explaind.plots.similarity import plot_similarity
from explaind.plots.steps import plot_steps
from explaind.sums import sums

if TYPE_CHECKING:
    from explaind.attribution import Attribution

__all__ = ["AttributionPlots"]


class AttributionPlots:
    """Figures of a result; every method returns the Axes it drew into."""

    def __init__(self, result: Attribution) -> None:
        self._result = result

    def layers(self, *, query: Any | None = None, ax: Axes | None = None) -> Axes:
        """What each layer contributed; see `explaind.plots.plot_layers`."""
        return plot_layers(self._result, query=query, ax=ax)

    def steps(self, *, query: Any | None = None, ax: Axes | None = None) -> Axes:
        """How the prediction came about; see `explaind.plots.plot_steps`."""
        return plot_steps(self._result, query=query, ax=ax)

    def examples(
        self,
        *,
        query: Any | None = None,
        num: int = 8,
        label: Callable[[Any], str] = str,
        ax: Axes | None = None,
    ) -> Axes:
        """Examples that raised and lowered a query most; see `explaind.plots.plot_examples`."""
        return plot_examples(self._result, query=query, num=num, label=label, ax=ax)

    def kernel(self, *, layer: str | None = None, limit: float | None = None, ax: Axes | None = None) -> Axes:
        """The kernel between queries and training examples (or groups), summed over all other axes, as a heat map.

        Args:
            layer: only this one.
            limit: as in `explaind.plots.plot_heatmap`.
            ax: where to draw.

        Raises:
            ValueError: the result has no axis of queries or of examples, or no such layer.
        """
        kernel = self._result.dataset.contribution
        axes = [axis for axis in ("query", *EXAMPLE_AXES[:2]) if axis in kernel.dims]
        if len(axes) != 2:
            raise ValueError("a kernel is between queries and examples; attribute by=('query', 'example').")
        if layer is not None:
            kernel = kernel.sel(layer=self._one_of(layer))
        (matrix,) = sums(kernel, axes, np.positive)
        unit = self._result.dataset.attrs["output"]
        ax = plot_heatmap(matrix.rename(f"contribution to the {unit}"), limit=limit, ax=ax)
        ax.set_xlabel(f"training {axes[1]}")
        ax.set_title("Kernel, summed over the run" + ("" if layer is None else f": {layer}"))
        return ax

    def influence(self, *, smoothing: int = 1, ax: Axes | None = None) -> Axes:
        """What data and decay did in each step; see `explaind.analysis.influence.model_influence`.

        Args:
            smoothing: steps of a running mean.
            ax: where to draw.
        """
        influence = model_influence(self._result.dataset)
        return plot_model_influence(influence.map(smooth, window=smoothing), ax=ax)

    def layer_influence(self, *, smoothing: int = 1, ax: Axes | None = None) -> Axes:
        """How much went through each layer in each step; see `explaind.analysis.influence.layer_influence`.

        Args:
            smoothing: steps of a running mean.
            ax: where to draw.
        """
        return plot_layer_influence(smooth(layer_influence(self._result.dataset), smoothing), ax=ax)

    def balance(self, *, ax: Axes | None = None) -> Axes:
        """Whether data or decay dominates; see `explaind.analysis.scores.data_decay_balance`."""
        return plot_balance(data_decay_balance(self._result.dataset), ax=ax)

    def similarity(self, layer: str, *, ax: Axes | None = None) -> Axes:
        """How alike the queries' parameter scores are in a layer; see `explaind.analysis.similarity`.

        Raises:
            ValueError: the result has no single elements, or no such layer.
        """
        self._one_of(layer)
        ax = plot_similarity(similarity(self._result.dataset.contribution).sel(layer=layer), ax=ax)
        ax.set_title(f"Similarity of predictions: {layer}")
        return ax

    def _one_of(self, layer: str) -> str:
        """The layer, if the result tells layers apart and has this one.

        Raises:
            ValueError: it does not.
        """
        coordinates = self._result.dataset.contribution.coords
        names = list(dict.fromkeys(coordinates["layer"].values.tolist())) if "layer" in coordinates else []
        if layer not in names:
            raise ValueError(
                f"there is no layer {layer!r} in this result; it has {names}."
                if names
                else "this result does not tell layers apart; name the axis 'layer' or 'element' in by=."
            )
        return layer
