"""How many nodes are enough: the error of the path integral against what it cost."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from explaind.plots.style import MARKERS, axes_or_new, line_styles

__all__ = ["plot_closure_by_nodes"]


def plot_closure_by_nodes(closure: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Error against nodes per step on logarithmic scales, a colour per family of rules.

    Lines are means over queries, hollow markers the largest.

    Args:
        closure: a row per rule, with columns `family`, `nodes` (per step, mean), `mean_error` and `max_error`.
        ax: where to draw.

    Raises:
        ValueError: a column is missing.
    """
    needed = ("family", "nodes", "mean_error", "max_error")
    if missing := [name for name in needed if name not in closure]:
        raise ValueError(f"closure by nodes needs the columns {', '.join(needed)}; there is no {missing[0]!r}.")
    ax = axes_or_new(ax)
    styles = line_styles(list(dict.fromkeys(closure["family"])))
    for place, (family, style) in enumerate(styles.items()):
        marker = MARKERS[place % len(MARKERS)]
        rows = closure[closure["family"] == family].sort_values("nodes")
        ax.plot(rows["nodes"], rows["mean_error"], label=f"{family}, mean", marker=marker, **style)
        ax.plot(
            rows["nodes"],
            rows["max_error"],
            label=f"{family}, largest",
            marker=marker,
            linestyle="none",
            markerfacecolor="none",
            color=style["color"],
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("nodes per step and query, mean")
    ax.set_ylabel("Σ over steps |residual|, over queries")
    ax.legend(fontsize="small")
    return ax
