"""Learning curves."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind.plots import plot_curves

from .layout import Phases, over_steps

__all__ = ["training_curves"]


def training_curves(curves: pd.DataFrame, phases: Phases) -> Figure:
    """Accuracy, loss and parameter norm before every step.

    Args:
        curves: from `training.train`, with the step as index.
        phases: of the run.
    """
    figure, rows = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for ax, what, label in zip(rows, ("accuracy", "loss"), ("accuracy", "loss (nats)"), strict=False):
        plot_curves(curves, {f"train_{what}": "training", f"validation_{what}": "validation"}, label=label, ax=ax)
    rows[1].set_yscale("log")
    plot_curves(curves, {"parameter_norm": "‖θ‖"}, label="parameter norm ‖θ‖", ax=rows[2])
    over_steps(rows, phases)
    figure.suptitle("First the training set is memorised, then validation follows: grokking")
    return figure
