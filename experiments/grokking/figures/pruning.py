"""What is left of the trained network when few of its weights are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind.plots.style import line_styles

__all__ = ["pruned_accuracy"]

_LABELS = {"influence": "|influence|", "magnitude": "|weight|", "random": "random"}
_MEASURES = {
    "accuracy": "validation accuracy",
    "agreement": "argmax agreement\nwith the whole network",
    "kl": "KL from the whole network (nats)",
}


def pruned_accuracy(curves: pd.DataFrame) -> Figure:
    """Accuracy, argmax agreement and KL against the fraction kept; random orders as mean and range.

    Args:
        curves: what `experiments.grokking.pruning.prune_curves` returned.
    """
    figure, panels = plt.subplots(1, 3, figsize=(13, 5), sharex=True, layout="constrained")
    for axes, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
        for criterion, style in line_styles(list(_LABELS)).items():
            values = curves[curves["criterion"] == criterion].groupby("fraction")[measure]
            mean = values.mean()
            axes.plot(mean.index, mean, marker="o", markersize=3, label=_LABELS[criterion], **style)
            axes.fill_between(mean.index, values.min(), values.max(), color=style["color"], alpha=0.2, linewidth=0)
        axes.set_xlabel("fraction of the parameter elements kept")
        axes.set_ylabel(label)
    panels[2].set_yscale("symlog", linthresh=1e-2)
    panels[2].set_ylim(0, None)
    draws = curves.loc[curves["criterion"] == "random", "draw"].nunique()
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title=f"kept first (random: mean and range of {draws} draws)",
        loc="outside lower center",
        ncols=3,
    )
    figure.suptitle("Pruning the trained network: what was influential in training, what is large, and anything")
    return figure
