"""Learning curves: columns of a table over its steps."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from explaind.plots.style import axes_or_new, line_styles

__all__ = ["plot_curves"]


def plot_curves(curves: pd.DataFrame, columns: Mapping[str, str], *, label: str, ax: Axes | None = None) -> Axes:
    """A line per column.

    Args:
        curves: a row per step, with the step as index.
        columns: what is drawn, and how it is called in the legend: `{"train_loss": "training"}`.
        label: what the values are, with their unit.
        ax: where to draw.

    Raises:
        ValueError: a column is missing.
    """
    if missing := [name for name in columns if name not in curves]:
        raise ValueError(f"there is no column {missing[0]!r}; the table has {', '.join(map(str, curves.columns))}.")
    ax = axes_or_new(ax)
    for column, style in line_styles(list(columns)).items():
        ax.plot(curves.index, curves[column], label=columns[column], **style)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(label)
    if len(columns) > 1:
        ax.legend(fontsize="small")
    return ax
