"""The geometry of predictions in the scores of one layer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind.plots import plot_embedding

__all__ = ["embedding"]


def embedding(points: pd.DataFrame, *, layer: str) -> Figure:
    """Validation predictions, near each other where the layer's parameters made them alike, coloured by their class.

    Args:
        points: a row per prediction with `x`, `y` and `class`, from `scores.embedded`.
        layer: whose scores.
    """
    figure, ax = plt.subplots(figsize=(6.5, 5.5), layout="constrained")
    plot_embedding(points.rename(columns={"class": "class, the right answer"}), colour="class, the right answer", ax=ax)
    ax.set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)")
    figure.suptitle(f"UMAP of the {layer} scores of {len(points)} validation predictions, whole run")
    return figure
