"""Pictures of the results: work against precision, scaling, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

__all__ = ["draw", "exponents"]

_STYLES = {
    "midpoint": ("#999999", "o"),
    "Gauss–Legendre": ("#E69F00", "s"),
    "kink-aware": ("#0072B2", "^"),
    "adaptive": ("#009E73", "D"),
}
_FITTED = 3
"""The exponents are fitted to this many of the largest sizes."""


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a PNG for each benchmark that has a picture; returns their paths."""
    pictures = {"precision": _precision, "scaling": _scaling, "products": _hot}
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures.items():
        if name in results:
            figure = picture(results[name]["records"])
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
            plt.close(figure)
    return paths


def exponents(records: Sequence[Mapping[str, Any]], axis: str) -> tuple[float, float]:
    """Slopes of log time and log memory by the log of what the axis is named after, at its largest sizes."""
    points = [record for record in records if record["axis"] == axis][-_FITTED:]
    sizes = np.log([point[axis] for point in points])
    time, memory = (np.polyfit(sizes, np.log([point[of] for point in points]), 1)[0] for of in ("seconds", "bytes"))
    return float(time), float(memory)


def _precision(records: Sequence[Mapping[str, Any]]) -> Figure:
    runs = list(dict.fromkeys(record["run"] for record in records))
    figure, axes = plt.subplots(
        1, len(runs), figsize=(5.2 * len(runs), 4.2), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, run in zip(axes[0], runs, strict=True):
        for rule, (colour, marker) in _STYLES.items():
            points = [record for record in records if (record["run"], record["rule"]) == (run, rule)]
            work, error = ([point[of] for point in points] for of in ("evaluations", "error"))
            ax.loglog(work, error, color=colour, marker=marker, markersize=5, label=rule)
        ax.set_title(run)
        ax.set_xlabel("gradient evaluations per query and step")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("mean over queries of Σ |residual of a step|, nats")
    axes[0, 0].legend()
    return figure


def _scaling(records: Sequence[Mapping[str, Any]]) -> Figure:
    axes_of_size = list(dict.fromkeys(record["axis"] for record in records))
    figure, (above, below) = plt.subplots(
        2, len(axes_of_size), figsize=(2.7 * len(axes_of_size), 5), sharex="col", sharey="row", layout="constrained"
    )
    for time_ax, memory_ax, axis in zip(above, below, axes_of_size, strict=True):
        points = [record for record in records if record["axis"] == axis]
        sizes = [point[axis] for point in points]
        slopes = exponents(records, axis)
        pictures = zip((time_ax, memory_ax), ("seconds", "bytes"), (1, 2**-20), slopes, strict=True)
        for ax, of, unit, slope in pictures:
            ax.loglog(sizes, [unit * point[of] for point in points], marker="o", color="#0072B2")
            ax.set_xticks([sizes[0], sizes[-1]], [f"{sizes[0]:,}", f"{sizes[-1]:,}"])
            ax.minorticks_off()
            ax.set_title(f"∝ {axis}^{slope:.2f}", fontsize="medium")
            ax.grid(alpha=0.3)
        memory_ax.set_xlabel(axis)
    for ax in (above[0], below[0]):
        low, high = np.log10(ax.get_ylim())
        ax.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))  # whole decades, else a row may have no label
    above[0].set_ylabel("time, s")
    below[0].set_ylabel("memory beside the result, MiB")
    return figure


def _hot(records: Sequence[Mapping[str, Any]]) -> Figure:
    shares = next(record["shares"] for record in records if "shares" in record)
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    ax.barh(list(shares), [100 * share for share in shares.values()], color="#0072B2")
    ax.invert_yaxis()
    ax.set_xlabel("% of the time of many queries by example, step and layer")
    return figure
