"""The network's Fourier frequencies, their fit to the similarity of predictions, and Nanda's progress measures."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from explaind.plots.style import LOWERED, RAISED, line_styles

from ..task import ModularTask
from .layout import Phases, over_steps

__all__ = ["frequency_fit", "frequency_spectra", "progress_curves"]

_PLAIN, _KEY = "#9a9a9a", LOWERED


def frequency_fit(fit: pd.DataFrame, profile: pd.Series[float], key: Sequence[int], task: ModularTask) -> Figure:
    """Lasso weights of the similarity's cosines, with the network's key frequencies marked, and the similarity itself.

    Args:
        fit: `weight` by `frequency`.
        profile: Mean similarity by `difference` of classes.
        key: The network's key frequencies.
        task: That it was trained for.
    """
    figure, (bars, line) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    _mark(bars, fit["frequency"], fit["weight"], key)
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set_ylabel("Lasso weight of cos(2π f d / n)")
    bars.set_title("Frequencies in the similarity of predictions")
    line.plot(profile.index, profile, "o-", color=RAISED, markersize=3)
    line.set_xlabel(f"d = {task.difference_name('class', 'other class')}")
    line.set_ylabel("mean cosine of parameter scores")
    line.set_title(f"Similarity between answers {task.expression}")
    return figure


def frequency_spectra(shares: pd.DataFrame, key: Sequence[int], task: ModularTask) -> Figure:
    """Which frequencies the network computes with: one row of bars each for embedding, neurons and logits.

    Args:
        shares: `share` by `of` and `frequency`, of one network.
        key: Its key frequencies.
        task: That it was trained for.
    """
    parts = list(shares.groupby("of", sort=False))
    figure, grid = plt.subplots(len(parts), 1, figsize=(8, 2.2 * len(parts)), sharex=True, layout="constrained")
    for axes, (name, part) in zip(grid, parts, strict=True):
        _mark(axes, part["frequency"], part["share"], key)
        axes.set_ylabel("share of variance")
        axes.set_title(f"{name}: {part['share'].sum():.0%} in single frequencies", fontsize="medium")
        axes.set_xlabel("")
    grid[-1].set_xlabel(f"frequency f of waves cos(2π f k / {len(task.cycle)}), k = {task.place_name('residue')}")
    return figure


def progress_curves(losses: pd.DataFrame, phases: Phases) -> Figure:
    """Restricted and excluded loss beside the network's own, over the steps, with the phases as bands.

    Args:
        losses: `loss` by `step` and `measure`.
        phases: Of the run.
    """
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    measures = list(dict.fromkeys(losses["measure"]))
    for measure, style in line_styles(measures).items():
        part = losses[losses["measure"] == measure]
        axes.plot(part["step"], part["loss"], label=_LABELS.get(measure, measure), **style)
    axes.set_yscale("log")
    axes.set_ylabel("loss (nats)")
    over_steps([axes], phases)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    figure.suptitle("Losses with and without the network's key frequencies")
    return figure


_LABELS = {
    "restricted": "restricted: validation, only key frequencies",
    "excluded": "excluded: training, without key frequencies",
}


def _mark(axes: Axes, frequencies: pd.Series[int], values: pd.Series[float], key: Sequence[int]) -> None:
    """Bars over frequencies; those of key frequencies stand out."""
    for chosen, colour, hatch, label in ((False, _PLAIN, "", "other"), (True, _KEY, "//", "key frequency")):
        part = frequencies.isin(list(key)) == chosen
        axes.bar(frequencies[part], values[part], color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.set_xlabel("frequency f")
    axes.legend(fontsize="small")
