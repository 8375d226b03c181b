"""What is explained of every step, and what is not."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind import Closure
from explaind.plots import plot_curves

from .layout import Phases, over_steps

__all__ = ["certificate"]


def certificate(sizes: pd.DataFrame, closure: Closure, phases: Phases) -> Figure:
    """The measured error of every step's path integral, beside the change that it explains.

    Args:
        sizes: `explained` and `unexplained` by step, from `measures.certificate_by_step`.
        closure: of the same result.
        phases: of the run.
    """
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = {"explained": "explained: Σ |terms|", "unexplained": "unexplained: |measured quadrature error|"}
    plot_curves(sizes, names, label="nats per step, mean over queries", ax=ax)
    ax.set_yscale("log")
    over_steps([ax], phases)
    figure.suptitle(
        f"The certificate: terms sum to the prediction within {closure.error:.0e} of their absolute sum,\n"
        f"total quadrature error at most {closure.quadrature:.0e} of a query's path"
    )
    return figure
