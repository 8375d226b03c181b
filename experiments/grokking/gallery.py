"""Every picture of the study, and the data that it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # figures go to files, also where there is no screen

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from tqdm import tqdm

from explaind.plots import save_figure
from explaind.plots.saving import Data

from .figures import (
    balance,
    certificate,
    change_points,
    curves,
    examples,
    frequencies,
    influence,
    kernel,
    nodes,
    perturbations,
    pruning,
    retraining,
    similarity,
    swaps,
    umap,
)
from .frequencies import similarity_profile
from .results import Results
from .scores import sorted_by_answer

__all__ = ["GALLERY", "draw_all"]

Drawn = tuple[Figure, Data | dict[str, Data]]


def _training_curves(r: Results) -> Drawn:
    return curves.training_curves(r.study.curves, r.study.phases.spans), r.study.curves


def _model_influence(r: Results) -> Drawn:
    figure = influence.model_influence(r.model_influence, r.running_totals, r.study.phases.spans)
    return figure, {"influence": r.model_influence, "totals": r.running_totals}


def _layer_influence(r: Results) -> Drawn:
    return influence.layer_influence(r.layer_influence, r.study.phases.spans), r.layer_influence


def _balance(r: Results) -> Drawn:
    return balance.balance(r.balance, r.study.phases.spans), r.balance


def _kernel(r: Results) -> Drawn:
    return kernel.kernel_in_windows(r.kernel, r.study.recipe.task), r.kernel


def _kernel_by_class(r: Results) -> Drawn:
    return kernel.kernel_by_class(r.phase_kernels, r.study.recipe.task), r.phase_kernels


def _similarity(r: Results) -> Drawn:
    matrices = sorted_by_answer(r.similarity, r.study.recipe)
    return similarity.similarity(matrices, r.study.recipe.task), matrices


def _similarity_in_windows(r: Results) -> Drawn:
    matrices = sorted_by_answer(r.similarity_in_windows, r.study.recipe)
    return similarity.similarity_in_windows(matrices, r.study.recipe.task), matrices


def _embedding(r: Results) -> Drawn:
    return umap.embedding(r.embedding, r.study.recipe.task, layer="linear2"), r.embedding


def _frequency_fit(r: Results) -> Drawn:
    task = r.study.recipe.task
    profile = similarity_profile(r.linear2_similarity, task.cycle)
    figure = frequencies.frequency_fit(r.frequency_fit, profile, r.key_frequencies, task)
    return figure, {"fit": r.frequency_fit, "profile": profile.reset_index()}


def _spectrum(r: Results) -> Drawn:
    return frequencies.frequency_spectra(r.spectrum, r.key_frequencies, r.study.recipe.task), r.spectrum


def _progress(r: Results) -> Drawn:
    return frequencies.progress_curves(r.progress, r.study.phases.spans), r.progress


def _swaps(r: Results) -> Drawn:
    return swaps.swapped_accuracy(r.swaps, r.study.phases.spans), r.swaps


def _retraining(r: Results) -> Drawn:
    return retraining.retrained_accuracy(r.retrained), r.retrained


def _pruning(r: Results) -> Drawn:
    return pruning.pruned_accuracy(r.pruned), r.pruned


def _perturbations(r: Results) -> Drawn:
    return perturbations.perturbed_predictions(r.perturbed), r.perturbed


def _change_points(r: Results) -> Drawn:
    phases = r.study.phases
    reached = {
        "training 0.99": phases.memorised,
        "validation 0.5": phases.half_generalised,
        "validation 0.95": phases.generalised,
    }
    figure = change_points.change_points(r.layer_shares, r.change_points, phases.spans, accuracies=reached)
    return figure, {"shares": r.layer_shares, "points": r.change_points, "number": r.change_point_number}


def _nodes(r: Results) -> Drawn:
    return nodes.closure_by_nodes(r.nodes), r.nodes


def _top_examples(r: Results) -> Drawn:
    return examples.top_examples(r.by_example, r.study.recipe), r.by_example.top(6)


def _certificate(r: Results) -> Drawn:
    return certificate.certificate(r.certificate, r.by_class.closure, r.study.phases.spans), r.certificate


GALLERY: dict[str, Callable[[Results], Drawn]] = {
    "training_curves": _training_curves,
    "model_influence": _model_influence,
    "layer_influence": _layer_influence,
    "change_points": _change_points,
    "balance": _balance,
    "kernel": _kernel,
    "kernel_by_class": _kernel_by_class,
    "top_examples": _top_examples,
    "similarity": _similarity,
    "similarity_in_windows": _similarity_in_windows,
    "embedding": _embedding,
    "frequency_fit": _frequency_fit,
    "spectrum": _spectrum,
    "progress": _progress,
    "swaps": _swaps,
    "retraining": _retraining,
    "pruning": _pruning,
    "perturbations": _perturbations,
    "nodes": _nodes,
    "certificate": _certificate,
}
"""Names of the files, in the order in which the story is told."""


def draw_all(results: Results, directory: Path) -> None:
    """Draw every picture that is not there yet, as PNG and SVG with its data beside it; computes what they need."""
    missing = [name for name in GALLERY if not (directory / f"{name}.drawn").is_file()]
    for name in tqdm(missing, "figures", unit="figure", disable=None if results.study.progress else True):
        figure, shown = GALLERY[name](results)
        save_figure(figure, directory / name, data=shown)
        plt.close(figure)
        (directory / f"{name}.drawn").touch()
