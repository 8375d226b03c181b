"""How much happened in each step: model influence, layer influence and the layers' shares."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from matplotlib.axes import Axes

from explaind.analysis.dimensions import require, step_axis
from explaind.plots.style import axes_or_new, layer_styles, line_styles

__all__ = ["plot_layer_influence", "plot_layer_shares", "plot_model_influence"]


def plot_model_influence(influence: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Two lines over the steps, on a logarithmic scale: what the data and what the decay did.

    Args:
        influence: from `explaind.analysis.influence.model_influence`, smoothed or not.
        ax: where to draw.
    """
    ax = axes_or_new(ax)
    axis = step_axis(influence.data_vars["data"])
    names = {"data": "training examples", "decay": "weight decay"}
    for (term, style), label in zip(line_styles(list(names)).items(), names.values(), strict=True):
        line = influence.data_vars[term]
        if bool((line > 0).any()):
            ax.plot(influence[axis], line, label=label, **style)
    ax.set_yscale("log")
    ax.set_xlabel(_steps(axis))
    ax.set_ylabel("model influence\nΣ over queries |change|")
    ax.legend(fontsize="small")
    return ax


def plot_layer_influence(
    influence: xr.DataArray, *, study: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """A line per layer over the steps, on a logarithmic scale.

    Args:
        influence: `[step, layer]`, from `explaind.analysis.influence.layer_influence`, smoothed or not.
        study: all layers of the study, in the order of `run.layers`, which fixes their colours.
        ax: where to draw.

    Raises:
        ValueError: an axis is missing, or a layer is none of the study's.
    """
    ax = _layer_lines(influence, study, ax)
    ax.set_yscale("log")
    ax.set_ylabel("layer influence\nΣ |contribution|")
    return ax


def plot_layer_shares(shares: xr.DataArray, *, study: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """A line per layer over the steps, from zero: its part of the step's layer influence.

    Args:
        shares: `[step, layer]`, from `explaind.analysis.influence.layer_shares`.
        study: as in `plot_layer_influence`.
        ax: where to draw.

    Raises:
        ValueError: an axis is missing, or a layer is none of the study's.
    """
    ax = _layer_lines(shares, study, ax)
    ax.set_ylim(0, None)
    ax.set_ylabel("share of the layer influence")
    return ax


def _layer_lines(term: xr.DataArray, study: Sequence[str] | None, ax: Axes | None) -> Axes:
    axis = step_axis(term)
    require(term, "layer")
    ax = axes_or_new(ax)
    for layer, style in layer_styles(term["layer"].values.tolist(), study).items():
        ax.plot(term[axis], term.sel(layer=layer), label=layer, **style)
    ax.set_xlabel(_steps(axis))
    ax.legend(title="layer", fontsize="small", ncols=2)
    return ax


def _steps(axis: str) -> str:
    return "window of steps" if axis == "window" else "optimizer step"
