"""Accuracy of hybrid networks over the checkpoints."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind.plots.style import line_styles

from ..model import LAYER_GROUPS
from .layout import Phases, over_steps

__all__ = ["SET_STYLES", "swapped_accuracy"]

# Four of Paul Tol's muted colours, none of which is one of the layer groups'.
SET_STYLES: dict[str, dict[str, Any]] = {
    "outer": {"color": "#882255", "linestyle": "-"},
    "pipeline": {"color": "#44AA99", "linestyle": "--"},
    "attention": {"color": "#332288", "linestyle": "-."},
    "MLP": {"color": "#999933", "linestyle": ":"},
}
"""Colour and line style of each set of layer groups, in all figures."""


def swapped_accuracy(curves: pd.DataFrame, phases: Phases) -> Figure:
    """What the final weights of each layer group and of each set do to the networks of earlier steps.

    Args:
        curves: what `experiments.grokking.swaps.swap_curves` returned.
        phases: to shade.
    """
    figure, panels = plt.subplots(2, 1, figsize=(8, 8), sharex=True, sharey=True, layout="constrained")
    for axes, styles, title in zip(
        panels, (line_styles(list(LAYER_GROUPS)), SET_STYLES), ("layer group", "set of groups"), strict=True
    ):
        for name, style in styles.items():
            line = curves[curves["set"] == name]
            axes.plot(line["step"], line["difference"], label=name, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("validation accuracy,\nhybrid − network of the step")
        axes.legend(title=f"final weights in this {title}", fontsize="small", ncols=2, loc="lower left")
    over_steps(panels, phases)
    panels[1].set_xlabel("step whose weights all other layers have")
    figure.suptitle(
        "Final weights in earlier networks, without training.\n"
        "Above zero: the rest of the network could already use what these layers had still to learn"
    )
    return figure
