"""The geometry of predictions in the scores of one layer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from explaind.plots import plot_embedding

from ..task import ModularTask

__all__ = ["embedding"]


def embedding(points: pd.DataFrame, task: ModularTask, *, layer: str) -> Figure:
    """Validation predictions, near each other where the layer's parameters made them alike, coloured by their class.

    Colours go round with the classes in the order of the task's group.

    Args:
        points: a row per prediction with `x`, `y` and `class`, from `scores.embedded`.
        task: that the predictions are of.
        layer: whose scores.
    """
    figure, ax = plt.subplots(figsize=(6.5, 5.5), layout="constrained")
    colour = task.place_name(task.expression)
    places = task.places(torch.from_numpy(points["class"].to_numpy(copy=True)))
    plot_embedding(points.assign(**{colour: places.numpy()}), colour=colour, ax=ax)
    ax.set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)")
    figure.suptitle(f"UMAP of the {layer} scores of {len(points)} validation predictions, whole run")
    return figure
