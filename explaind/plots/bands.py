"""Repeated measurements over several seeds: their mean and how far they spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from explaind.plots.style import axes_or_new, line_styles

__all__ = ["plot_bands"]


def plot_bands(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    line: str,
    styles: Mapping[Any, Mapping[str, Any]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A line per group through the means, in a band of one standard deviation (of the sample) on both sides.

    Args:
        frame: a row per measurement; those with the same `x` and `line` are repetitions, such as seeds.
        x: column along the horizontal axis.
        y: column with what was measured.
        line: column with the group; groups are drawn in the order in which they come.
        styles: colour and line style of every group; by default those of `explaind.plots.style`, in their order.
        ax: where to draw.

    Raises:
        ValueError: a column is missing.
    """
    if missing := [name for name in (x, y, line) if name not in frame]:
        raise ValueError(f"there is no column {missing[0]!r}; the table has {', '.join(map(str, frame.columns))}.")
    ax = axes_or_new(ax)
    frame = frame[[x, y, line]].reset_index(drop=True)
    names = list(dict.fromkeys(frame[line]))
    for name, style in (line_styles(names) if styles is None else {name: styles[name] for name in names}).items():
        values = frame[frame[line] == name].groupby(x)[y]
        mean, spread = values.mean(), values.std().fillna(0.0)
        ax.plot(mean.index, mean, label=f"{name} (n = {values.size().max()})", **style)
        ax.fill_between(mean.index, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)
    ax.set_xlabel(x)
    ax.set_ylabel(f"{y}, mean ± standard deviation")
    ax.legend(title=line, fontsize="small")
    return ax
