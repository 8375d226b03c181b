"""All figures of the two decompositions: by class, and by single examples."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from explaind import Attribution
from explaind.analysis.influence import layer_influence, model_influence
from explaind.plots import save_figure
from explaind.plots.saving import Data

from .. import measures
from ..phases import Phases
from ..task import Split
from . import certificate, curves, examples, influence, kernel

__all__ = ["draw_all"]


def draw_all(
    learning_curves: pd.DataFrame,
    phases: Phases,
    classes: Attribution,
    singles: Attribution,
    split: Split,
    directory: Path,
) -> list[Path]:
    """Draw and save every figure with its data; returns the files."""
    data, spans = classes.dataset, phases.spans
    sizes, totals = model_influence(data), measures.running_totals(data)
    layers, kernels = layer_influence(data), measures.phase_kernels(data, spans)
    steps = measures.certificate_by_step(data)
    drawn: dict[str, tuple[Figure, Data | dict[str, Data]]] = {
        "training_curves": (curves.training_curves(learning_curves, spans), learning_curves),
        "data_and_decay": (influence.model_influence(sizes, totals, spans), {"influence": sizes, "totals": totals}),
        "layer_influence": (influence.layer_influence(layers, spans), layers),
        "top_examples": (examples.top_examples(singles, split), singles.top(6)),
        "kernel_by_class": (kernel.kernel_by_class(kernels), kernels),
        "certificate": (certificate.certificate(steps, classes.closure, spans), steps),
    }
    files = []
    for name, (figure, shown) in drawn.items():
        files += save_figure(figure, directory / name, data=shown)
        plt.close(figure)
    return files
