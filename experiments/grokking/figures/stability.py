"""Change points of all runs, beside the steps at which accuracies were reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from explaind.plots.style import MARKERS, line_styles

from ..stability import BOUNDARIES, clock, points_of

__all__ = ["change_points_over_seeds"]

_ABOVE = 0.3
_POINT: dict[str, Any] = {"color": "black", "linestyle": "none", "marker": "|", "markersize": 9, "markeredgewidth": 2.2}
_INTERVAL: dict[str, Any] = {"color": "0.6", "linewidth": 5}
_REACHED: dict[str, dict[str, Any]] = {
    name: {"color": style["color"], "marker": marker}
    for (name, style), marker in zip(line_styles(list(BOUNDARIES)).items(), MARKERS, strict=False)
}
_LABELS = {
    "memorised": "training accuracy ≥ 0.99",
    "half_generalised": "validation accuracy ≥ 0.5",
    "generalised": "validation accuracy ≥ 0.95",
}


def change_points_over_seeds(points: pd.DataFrame, runs: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:
    """A row per task, with a line per seed: in steps on the left, on the clock of the accuracies on the right.

    Args:
        points: from `stability.recurring`.
        runs: of `across`; those that did not grok are left out.
        verdicts: from `stability.verdicts`.
    """
    runs = runs.dropna(subset=["generalised"])
    heights = [2.5 + int(seeds) for seeds in verdicts["seeds"]]
    figure, grid = plt.subplots(
        len(verdicts),
        2,
        figsize=(11, 1.6 + 0.3 * sum(heights)),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for (in_steps, on_clock), verdict in zip(grid, verdicts.to_dict("records"), strict=True):
        of_task, found = (
            table[(table["task"] == verdict["task"]) & (table["architecture"] == verdict["architecture"])]
            for table in (runs, points)
        )
        for axes, place in ((in_steps, _in_steps), (on_clock, _on_clock)):
            for row, run in enumerate(of_task.to_dict("records")):
                named = {str(name): value for name, value in run.items()}
                _draw_run(axes, row, points_of(found, named), named, partial(place, named))
            axes.set_ylim(len(of_task) - 0.5, -0.7)
            axes.set_yticks(range(len(of_task)), [str(seed) for seed in of_task["seed"]])
        in_steps.set_ylabel("seed")
        in_steps.set_xlim(left=0)
        in_steps.set_title(f"{verdict['task']}, {verdict['architecture']}", fontsize="medium", loc="left")
        on_clock.set_xlim(0, 3)
        on_clock.set_xticks(range(4), ["start", "memorised", "half of validation", "end"])
        on_clock.tick_params(labelleft=False)
        on_clock.grid(axis="x", color="0.85")
        many = f": {verdict['recurring']} of {verdict['points']} recur in all other runs (p = {verdict['p_value']:.3f})"
        on_clock.set_title(
            f"{verdict['verdict']}{many if verdict['p_value'] >= 0 else ''}", fontsize="medium", loc="left"
        )
    grid[-1, 0].set_xlabel("optimizer step (= epoch, full batch)")
    grid[-1, 1].set_xlabel("time on the clock of the run's own accuracies")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle("Change points of the layers' shares, and the steps at which accuracies were reached")
    return figure


def _in_steps(run: Mapping[str, Any], steps: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(steps, dtype=np.float64)


def _on_clock(run: Mapping[str, Any], steps: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(np.interp(steps, clock(run), range(4)), dtype=np.float64)


def _draw_run(
    axes: Axes,
    row: int,
    points: pd.DataFrame,
    run: Mapping[str, Any],
    place: Callable[[Sequence[float]], NDArray[np.float64]],
) -> None:
    """A line from the first to the last step; change points above it, accuracies on it."""
    axes.plot(place([0, run["num_steps"]]), [row, row], color="0.75", linewidth=1, zorder=1)
    step, low, high = (place(points[name].tolist()) for name in ("step", "low", "high"))
    above = np.full(len(points), row - _ABOVE)
    axes.hlines(above, low, high, zorder=2, **_INTERVAL)
    axes.plot(step, above, zorder=3, **_POINT)
    for name, style in _REACHED.items():
        axes.plot(place([run[name]]), [row], zorder=4, linestyle="none", markersize=6, **style)


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], label="change point", **_POINT),
        Line2D([], [], label="its 95 % interval", **_INTERVAL),
        *(Line2D([], [], linestyle="none", label=_LABELS[name], **style) for name, style in _REACHED.items()),
    ]
